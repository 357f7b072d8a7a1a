// Look inside and Translate: attention, the layers' words, words for a mask, and the alignment of a translation.

import { ask } from "./api.js";
import { onSend, panel } from "./panel.js";
import { element, percent, visible } from "./render.js";
import { say } from "./words.js";

// The weights of each head of a layer: heads, then rows, then columns, from 0 to 1.
function weights({ bytes, heads }, rows, columns) {
  const all = Uint8Array.from(atob(bytes), (sign) => sign.charCodeAt(0));
  const head = (n) => (row, column) => all[(n * rows + row) * columns + column] / 255;
  const each = Array.from({ length: heads }, (_, n) => head(n));
  return { each, mean: (row, column) => each.reduce((sum, of) => sum + of(row, column), 0) / heads };
}

function chooser(word, options, change) {
  const list = element("select", {}, ...options.map((name, n) => new Option(name, n)));
  list.addEventListener("change", change);
  return [list, element("label", {}, element("span", {}, say(word)), list)];
}

function map(canvas, of, rows, columns) {
  canvas.width = columns;
  canvas.height = rows;
  const pen = canvas.getContext("2d");
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      pen.fillStyle = `rgb(11 92 143 / ${of(row, column)})`;
      pen.fillRect(column, row, 1, 1);
    }
  }
}

const share = (name, value) => element(
  "div", { class: "share" }, element("span", {}, visible(name)),
  element("meter", { value, "aria-label": `${name} ${percent(Math.log(value))}` }), element("span", {}, percent(Math.log(value))),
);

// Tokens to choose from; those that the chosen one looks at are the darker, the more it does.
function attention(found, below) {
  const { rows, columns } = found;
  const same = !found.attention.some((each) => each.layer.includes("cross") || each.layer === "alignment");
  let row = rows.length - 1;
  const pick = (n) => () => { row = n; show(); };
  const chips = (names, act) => names.map((name, n) => element(
    "button", { type: "button", class: "chip", onclick: act?.(n), disabled: !act }, visible(name) || "·",
  ));
  const asking = chips(rows, pick);
  const seen = same ? asking : chips(columns);
  const layers = chooser("layer", found.attention.map((each, n) => `${n + 1}: ${each.layer}`), () => show());
  const heads = Math.max(0, ...found.attention.map((each) => each.heads));
  const head = chooser("head", [say("mean"), ...Array.from({ length: heads }, (_, n) => String(n + 1))], () => show());
  const canvas = element("canvas", { class: "map", "aria-hidden": "true" });
  const about = element("p", { class: "hint" });
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    pick(Math.floor(((event.clientY - box.top) * rows.length) / box.height))();
  });
  function show() {
    const layer = found.attention[layers[0].value];
    if (layer) {
      const { each, mean } = weights(layer, rows.length, columns.length);
      const of = each[head[0].value - 1] ?? mean;
      map(canvas, of, rows.length, columns.length);
      seen.forEach((chip, n) => {
        chip.style.background = `rgb(60 150 220 / ${of(row, n)})`;
        chip.title = percent(Math.log(of(row, n)));
      });
      about.textContent = say("looked", { token: visible(rows[row]) });
    }
    asking.forEach((chip, n) => chip.setAttribute("aria-pressed", String(n === row)));
    below?.(row);
  }
  const parts = [element("div", { class: "chips" }, ...asking)];
  if (!same) parts.push(element("div", { class: "chips" }, ...seen));
  if (found.attention.length) parts.push(element("div", { class: "row" }, layers[1], head[1]), about, canvas);
  show();
  return parts;
}

function lens(found, box) {
  const name = (token) => element("td", {}, visible(token[0]), element("small", {}, ` ${percent(Math.log(token[1]))}`));
  return (row) => box.replaceChildren(element("h2", {}, say("lens")), element("div", { class: "wide" }, element("table", {},
    ...found.lens.map((layer, n) => element("tr", {}, element("th", { scope: "row" }, String(n + 1)), ...layer[row].map(name))),
  )));
}

const look = panel("look");
onSend(look, async (given) => {
  const found = await ask("/v1/inspect", Object.fromEntries(given));
  const box = element("div");
  const masks = found.masks.flatMap((words, n) => [
    element("h2", {}, say("maskWords", { n: n + 1 })), ...words.map(([word, value]) => share(word, value)),
  ]);
  look.found.replaceChildren(...masks, ...attention(found, found.lens.length ? lens(found, box) : null), box);
});

const translate = panel("translate");
onSend(translate, async (given) => {
  const { model, input, beam } = Object.fromEntries(given);
  const { data: [{ text, sentences }] } = await ask("/v1/translations", { model, input, beam: Number(beam) });
  const answer = element("p", { class: "text answer" }, text);
  translate.found.replaceChildren(answer);
  if (sentences.length) answer.after(...attention(await ask("/v1/inspect", { model, input: sentences[0].source })));
});
