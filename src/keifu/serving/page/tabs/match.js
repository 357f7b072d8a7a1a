// Match: how well pictures and words fit each other, as a CLIP sees it.

import { ask } from "../api.js";
import { onFiles, onSend, panel } from "../panel.js";
import { element } from "../render.js";
import { say } from "../words/words.js";
import { bar } from "./matrix.js";

const match = panel("match");
const field = match.form.elements;
let pictures = [];
let show = () => {}; // what is shown, in the language of the page

const encoded = async (file) => {
  const bytes = new Uint8Array(await file.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
};

function take(files) {
  pictures = files;
  show = () => {};
  match.found.replaceChildren(element("div", { class: "row" }, ...files.map(thumb)));
}

const thumb = (file) => element("img", { class: "thumb", src: URL.createObjectURL(file), alt: file.name });

// Three plain pictures: a red circle, a blue square, a green heart.
async function drawExamples() {
  const shapes = [
    ["circle", "#dd2e44", "M36 4a32 32 0 1 0 .1 0z"],
    ["square", "#55acee", "M6 6h60v60h-60z"],
    ["heart", "#78b159", "M36 66C14 48 4 38 4 24 4 6 28 2 36 18 44 2 68 6 68 24 68 38 58 48 36 66z"],
  ];
  return Promise.all(shapes.map(async ([name, colour, path]) => {
    const canvas = element("canvas", { width: 72, height: 72 });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, 72, 72);
    pen.fillStyle = colour;
    pen.fill(new Path2D(path));
    return new File([await new Promise((done) => canvas.toBlob(done))], `${name}.png`, { type: "image/png" });
  }));
}

onFiles(match.form.querySelector(".drop"), take);
document.getElementById("examples").addEventListener("click", async () => {
  take(await drawExamples());
  if (!field.texts.value.trim()) field.texts.value = say("exampleWords");
});

// The words for one picture: their share as a bar, and their cosine.
function fit(file, texts, shares, cosines) {
  const likeliest = Math.max(...shares);
  const rows = texts.map((text, n) => {
    const row = bar(text, shares[n], element("span", { class: "number", title: say("cosine") }, cosines[n].toFixed(3)));
    row.classList.toggle("best", shares[n] === likeliest);
    return row;
  });
  const head = element("div", { class: "share head" }, element("span", {}), element("span", {}),
    element("span", { class: "number" }, say("share")), element("span", { class: "number" }, say("cosine")));
  return element("section", { class: "fit" }, thumb(file), element("div", { class: "bars" }, head, ...rows));
}

onSend(match, async (given) => {
  const texts = given.get("texts").split("\n").map((line) => line.trim()).filter(Boolean);
  if (!pictures.length) throw new Error(say("drop"));
  const images = await Promise.all(pictures.map(encoded));
  const found = await ask("/v1/match", { model: given.get("model"), images, texts });
  const compared = pictures;
  show = () => match.found.replaceChildren(...compared.map((file, n) => fit(file, texts, found.shares[n], found.cosines[n])));
  show();
});
document.addEventListener("language", () => show());
