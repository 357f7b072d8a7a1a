// Match: how well pictures and words fit each other, as a CLIP sees it.

import { ask } from "./api.js";
import { onFiles, onSend, panel } from "./panel.js";
import { element, percent } from "./render.js";
import { say } from "./words.js";

const match = panel("match");
let pictures = [];

const encoded = async (file) => {
  const bytes = new Uint8Array(await file.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
};

onFiles(match.form.querySelector(".drop"), (files) => {
  pictures = files;
  match.found.replaceChildren(...files.map((file) => thumb(file)));
});

const thumb = (file) => element("img", { class: "thumb", src: URL.createObjectURL(file), alt: file.name });

onSend(match, async (given) => {
  const texts = given.get("texts").split("\n").map((line) => line.trim()).filter(Boolean);
  if (!pictures.length) throw new Error(say("drop"));
  const images = await Promise.all(pictures.map(encoded));
  const found = await ask("/v1/match", { model: given.get("model"), images, texts });
  const cell = (value) => element("td", {}, element("meter", { value }), " ", percent(Math.log(value)));
  const head = element("tr", {}, element("td", {}), ...texts.map((text) => element("th", { scope: "col" }, text)));
  const rows = pictures.map((file, n) => element("tr", {}, element("td", {}, thumb(file)), ...found.shares[n].map(cell)));
  match.found.replaceChildren(element("table", {}, head, ...rows));
});
