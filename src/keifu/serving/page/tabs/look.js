// Look inside and Translate: attention, the layers' words, words for a mask, and the alignment of a translation.

import { ask } from "../api.js";
import { onSend, panel } from "../panel.js";
import { element, share, visible } from "../render.js";
import { say } from "../words/words.js";
import { choice, headsOf, isCausal, meanOf, pattern } from "./heads.js";
import { bar, matrix, scale } from "./matrix.js";

const EXAMPLES = { // a text for each kind of model, until the reader writes one
  writer: "The cat sat on the mat. The cat sat on the",
  encoder: "The cat sat on the mat.",
  masked: "The book was [MASK] by an American author.",
};

function chooser(word, options, chosen, change) {
  const list = element("select", {}, ...options.map((name, n) => new Option(name, n)));
  list.value = chosen;
  list.addEventListener("change", change);
  return [list, element("label", {}, element("span", {}, say(word)), list)];
}

// Tokens to choose from, of which the chosen one looks at the others; and the whole matrix of the head.
function attention(found, below) {
  const { rows, columns } = found;
  const same = !found.attention.some((each) => each.layer.includes("cross") || each.layer === "alignment");
  const layers = found.attention.map((each) => headsOf(each, rows.length, columns.length));
  const causal = same && isCausal(layers, rows.length);
  const begin = layers.length ? choice(layers, rows, columns, same, causal) : { layer: 0, head: 0, row: rows.length - 1 };
  let { row } = begin;
  const pick = (n) => { row = n; show(); };
  const chips = (names, act) => names.map((name, n) => element(
    "button", { type: "button", class: "chip", onclick: act && (() => act(n)), disabled: !act }, visible(name) || "·",
  ));
  const asking = chips(rows, pick);
  const seen = same ? asking : chips(columns);
  const names = found.attention.map((each, n) => (each.layer === "alignment" ? say("alignment") : say("layerOf", { n: n + 1, all: layers.length })));
  const layer = chooser("layer", names, begin.layer, () => { nameHeads(); show(); });
  const head = chooser("head", [], 0, () => show());
  const about = element("p", { class: "hint looked" });
  const cell = element("p", { class: "hint" }, say("pointAtCell"));
  const heading = element("h2");
  const box = element("div");
  function nameHeads(chosen = head[0].value) {
    const heads = layers[layer[0].value] ?? [];
    const named = heads.map((of, n) => {
      const found = same ? pattern(of, rows, causal) : null;
      return `${n + 1}${found ? ` · ${say(found.name)} (${Math.round(100 * found.value)} %)` : ""}`;
    });
    head[0].replaceChildren(...[say("mean"), ...named].map((name, n) => new Option(name, n)));
    head[0].value = Math.min(chosen, heads.length);
  }
  function show() {
    const heads = layers[layer[0].value];
    if (heads) {
      const n = Number(head[0].value);
      const of = heads[n - 1] ?? meanOf(heads);
      const title = say("matrix", { layer: Number(layer[0].value) + 1, head: n ? say("headOf", { n }) : say("mean") });
      const titles = { rows: say(same ? "query" : "written"), columns: say(same ? "keys" : "source") };
      const point = (at, to) => {
        cell.textContent = say("cell", { row: visible(rows[at]), column: visible(columns[to]), share: share(of(at, to)) });
      };
      heading.textContent = title;
      box.replaceChildren(matrix({ of, rows, columns, titles, row, about: title }, pick, point));
      seen.forEach((chip, n) => {
        chip.style.background = `rgb(60 150 220 / ${of(row, n)})`;
        chip.title = share(of(row, n));
      });
      about.textContent = say("looked", { token: visible(rows[row]) });
    }
    asking.forEach((chip, n) => chip.setAttribute("aria-pressed", String(n === row)));
    below?.(row);
  }
  const parts = [element("div", { class: "chips" }, ...asking)];
  if (!same) parts.push(element("div", { class: "chips" }, ...seen));
  if (layers.length) parts.unshift(element("div", { class: "row" }, layer[1], head[1]), about);
  if (layers.length) parts.push(heading, scale(), box, cell);
  nameHeads(begin.head + 1);
  show();
  return parts;
}

function lens(found, box) {
  const name = (token) => element("td", {}, visible(token[0]), element("small", {}, ` ${share(token[1])}`));
  const ranks = found.lens[0][0].map((_, n) => element("th", { scope: "col" }, say("rank", { n: n + 1 })));
  const head = element("tr", {}, element("th", { scope: "col" }, say("layer")), ...ranks);
  return (row) => box.replaceChildren(
    element("h2", {}, say("lens", { token: visible(found.rows[row]) })),
    element("div", { class: "wide" }, element("table", {}, element("thead", {}, head), element("tbody", {},
      ...found.lens.map((layer, n) => element("tr", {}, element("th", { scope: "row" }, String(n + 1)), ...layer[row].map(name))),
    ))),
  );
}

const look = panel("look");
const text = look.form.elements.input;
const uses = new Map();

document.addEventListener("models", ({ detail }) => detail.forEach((model) => uses.set(model.id, model)));
look.form.elements.model.addEventListener("change", ({ target }) => {
  const model = uses.get(target.value);
  if (!model || (text.value && !Object.values(EXAMPLES).includes(text.value))) return;
  text.value = EXAMPLES[model.uses.includes("completion") ? "writer" : model.fills_masks ? "masked" : "encoder"];
});

let showLook = () => {}; // what is shown, in the language of the page
onSend(look, async (given) => {
  const found = await ask("/v1/inspect", Object.fromEntries(given));
  showLook = () => {
    const box = element("div");
    const masks = found.masks.flatMap((words, n) => [
      element("h2", {}, say("maskWords", { n: n + 1 })), ...words.map(([word, value]) => bar(word, value)),
    ]);
    look.found.replaceChildren(...masks, ...attention(found, found.lens.length ? lens(found, box) : null), box);
  };
  showLook();
});

const translate = panel("translate");
let showTranslation = () => {};
onSend(translate, async (given) => {
  const { model, input, beam } = Object.fromEntries(given);
  const { data: [{ text: answer, sentences }] } = await ask("/v1/translations", { model, input, beam: Number(beam) });
  translate.found.replaceChildren(element("p", { class: "text answer" }, answer));
  if (!sentences.length) return;
  const found = await ask("/v1/inspect", { model, input: sentences[0].source });
  showTranslation = () => translate.found.replaceChildren(element("p", { class: "text answer" }, answer), ...attention(found));
  showTranslation();
});

document.addEventListener("language", () => {
  showLook();
  showTranslation();
});
