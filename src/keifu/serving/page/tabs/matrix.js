// A matrix of attention weights with the tokens on both sides, and the scale of its colours.

import { element, shape, share, visible } from "../render.js";
import { say } from "../words/words.js";

const SHADES = [0, 0.25, 0.5, 0.75, 1];
const LONGEST = 14; // signs of a token's label

const label = (token) => {
  const text = visible(token) || "·";
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
};
const width = (text, size) => [...text].reduce((sum, sign) => sum + (sign > "\u2e80" ? 1.05 : 0.62), 0) * size;

// The picture of a head's weights; pick(row) is called for a click on a row, point(row, column) while one points at it.
export function matrix({ of, rows, columns, titles, row, about }, pick, point) {
  const cell = Math.max(rows.length, columns.length) > 40 ? 12 : 22;
  const size = Math.min(13, cell - 2);
  const side = (tokens) => Math.ceil(Math.max(...tokens.map((each) => width(label(each), size)))) + 10;
  const [left, top] = [side(rows) + 18, side(columns) + 18];
  const [across, down] = [cell * columns.length, cell * rows.length];
  const wide = Math.max(left + across + 2, left + width(titles.columns, 12));
  const high = Math.max(top + down + 2, top + width(titles.rows, 12));
  const picture = shape("svg", { class: "map", width: wide, height: high, viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": about });
  const text = (words, place, end) => shape("text", { "font-size": size, ...place, ...(end ? { "text-anchor": "end" } : {}) }, words);
  picture.append(
    text(titles.columns, { x: left, y: 12, class: "axis" }),
    text(titles.rows, { transform: `translate(12 ${top}) rotate(-90)`, "text-anchor": "end", class: "axis" }),
    ...rows.map((each, n) => text(label(each), { x: left - 5, y: top + cell * (n + 0.5) + size / 3, class: n === row ? "chosen" : "" }, true)),
    ...columns.map((each, n) => text(label(each), { transform: `translate(${left + cell * (n + 0.5) + size / 3} ${top - 5}) rotate(-90)` })),
    shape("rect", { class: "frame", x: left, y: top, width: across, height: down }),
  );
  rows.forEach((_, n) => columns.forEach((_, m) => {
    const value = of(n, m);
    if (value > 0) {
      picture.append(shape("rect", {
        class: "cell", x: left + cell * m, y: top + cell * n, width: cell, height: cell, "fill-opacity": value,
      }));
    }
  }));
  picture.append(shape("rect", { class: "row", x: left, y: top + cell * row, width: across, height: cell }));
  const place = (event) => {
    const box = picture.getBoundingClientRect();
    const n = Math.floor((event.clientY - box.top - top) / cell);
    return [n, Math.floor((event.clientX - box.left - left) / cell)];
  };
  picture.addEventListener("click", (event) => {
    const [n] = place(event);
    if (n in rows) pick(n);
  });
  picture.addEventListener("pointermove", (event) => {
    const [n, m] = place(event);
    if (n in rows && m in columns) point(n, m);
  });
  return element("div", { class: "wide" }, picture);
}

// The shades of the weights, each with its number.
export function scale() {
  const swatch = (value) => {
    const box = element("span", { class: "swatch" });
    box.style.setProperty("--share", `${100 * value}%`);
    return element("span", { class: "step" }, box, `${100 * value} %`);
  };
  return element("p", { class: "scale" }, `${say("scale")}: `, ...SHADES.map(swatch));
}

// A name, a bar and its number.
export const bar = (name, value, ...more) => element(
  "div", { class: "share" }, element("span", { class: "name" }, visible(name)),
  element("meter", { value, "aria-label": `${name} ${share(value)}` }), element("span", { class: "number" }, share(value)), ...more,
);
