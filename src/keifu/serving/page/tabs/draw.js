// Draw: pictures step by step, on a picture with a mask painted by hand, or again from a PNG that was drawn here.

import { events } from "../api.js";
import { onFiles, onPlaces, onSend, panel } from "../panel.js";
import { element } from "../render.js";
import { say } from "../words/words.js";

const draw = panel("draw");
const field = draw.form.elements;
const paint = document.getElementById("paint");
const canvas = paint.querySelector("canvas");
const mask = document.createElement("canvas"); // white where it is drawn anew
const about = new Map();
let base = null; // the file to begin with
let painted = false;
let control = null;

// The text of a PNG file's chunk that keifu wrote; null where there is none.
async function recordOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const decode = (part) => new TextDecoder().decode(part);
  if (decode(bytes.subarray(1, 4)) !== "PNG") return null;
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const data = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (decode(bytes.subarray(at + 4, at + 8)) !== "iTXt" || !decode(data).startsWith("keifu\0")) continue;
    return JSON.parse(decode(data).split("\0").at(-1)); // keyword, two flags, two empty texts, the text
  }
  return null;
}

function takeSettings({ model, drawing, number }) {
  const known = [...field.model.options].find((each) => each.value === model || model.endsWith(`/${each.value}`));
  if (known) field.model.value = known.value;
  showAble();
  const taken = { prompt: drawing.text, negative: drawing.negative, steps: drawing.steps, guidance: drawing.guidance };
  taken.seed = drawing.seed + (number ?? 0);
  taken.label = drawing.label === null ? "" : field.label.options[drawing.label + 1]?.value;
  for (const [name, value] of Object.entries(taken)) field[name].value = value ?? "";
  draw.told(say("again"));
}

function showPicture(image) {
  canvas.width = mask.width = image.width;
  canvas.height = mask.height = image.height;
  mask.getContext("2d").fillRect(0, 0, mask.width, mask.height);
  painted = false;
  canvas.getContext("2d").drawImage(image, 0, 0);
  paint.hidden = false;
}

async function take([file]) {
  if (!file) return;
  try {
    const record = await recordOf(file);
    if (record) return takeSettings(record);
    showPicture(await createImageBitmap(file));
    base = file;
  } catch (error) {
    draw.told(error.message, true);
  }
}

onFiles(draw.form.querySelector(".drop"), take);
onPlaces(canvas, (x, y) => {
  for (const [of, colour] of [[mask, "#fff"], [canvas, "rgb(255 60 160 / .5)"]]) {
    const pen = of.getContext("2d");
    pen.fillStyle = colour;
    pen.beginPath();
    pen.arc(x, y, Math.max(1, canvas.width / 16), 0, 7);
    pen.fill();
  }
  painted = true;
});
document.getElementById("clear-mask").addEventListener("click", () => take([base]));
document.getElementById("drop-base").addEventListener("click", () => {
  base = null;
  paint.hidden = true;
});
document.getElementById("stop-drawing").addEventListener("click", () => control?.abort());

function showAble() {
  const { reads, labels } = about.get(field.model.value) ?? {};
  for (const each of draw.form.querySelectorAll(".reads")) each.hidden = !reads;
  draw.form.querySelector(".labels").hidden = !labels;
  field.label.replaceChildren(new Option(say("none"), ""), ...(labels ?? []).map((name) => new Option(name, name)));
}

document.addEventListener("models", ({ detail }) => {
  for (const model of detail) about.set(model.id, { reads: model.reads_text, labels: model.labels });
});
field.model.addEventListener("change", showAble);

async function request(given) {
  const numbers = ["seed", "steps", "guidance", ...(base ? ["strength"] : [])];
  const { reads, labels } = about.get(field.model.value) ?? {};
  const texts = ["model", ...(reads ? ["prompt", "negative"] : []), ...(labels ? ["label"] : [])];
  const filled = [...texts, ...numbers].filter((name) => given.get(name));
  const body = Object.fromEntries(filled.map((name) => [name, numbers.includes(name) ? Number(given.get(name)) : given.get(name)]));
  body.partial_images = 50;
  if (!base) return ["/v1/images/generations", body];
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.set(name, value);
  form.set("image", base);
  if (painted) form.set("mask", await new Promise((done) => mask.toBlob(done)), "mask.png");
  return ["/v1/images/edits", form];
}

onSend(draw, async (given) => {
  const image = element("img", { class: "drawing", alt: given.get("prompt") || given.get("label") || say("draw") });
  const stop = document.getElementById("stop-drawing");
  control = new AbortController();
  stop.hidden = false;
  draw.found.replaceChildren(image);
  try {
    const [path, body] = await request(given);
    for await (const event of events(path, body, control.signal)) {
      image.src = `data:image/png;base64,${event.b64_json}`;
      if (!event.type.endsWith("completed")) {
        draw.told(say("step", { n: event.partial_image_index + 1 }));
        continue;
      }
      image.after(element("a", { href: image.src, download: `keifu-${event.seed}.png` }, say("save")));
      return say("drawn", { seed: event.seed });
    }
  } finally {
    stop.hidden = true;
  }
});
