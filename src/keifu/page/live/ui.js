// The few controls of the live elements, without a framework.

// A node: make("p", { class: "note", onclick: f }, "text", other nodes).
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
}

// A slider with its value; `value` reads it.
export function slider(label, { min, max, step = 1, value, onchange, show = (number) => String(number) }) {
  const output = make("output", {}, show(value));
  const input = make("input", { type: "range", min, max, step, value, "aria-label": label });
  input.addEventListener("input", () => { output.textContent = show(Number(input.value)); });
  input.addEventListener("input", () => onchange?.(Number(input.value)));
  return { node: make("label", { class: "live-slider" }, make("span", {}, label), input, output), get value() { return Number(input.value); } };
}

export function choice(label, options, onchange) { // options: [value, text] pairs
  const select = make("select", { "aria-label": label }, options.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", () => onchange?.(select.value));
  return { node: make("label", { class: "live-choice" }, make("span", {}, label), select), select, get value() { return select.value; } };
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
export const visible = (text) => text.replaceAll("\n", "⏎").replace(/^ /, "␣") || "∅";

// A line for each candidate: a name, a bar, a share. `ghost` is a second, lighter bar.
export function bars(list, onclick = null) {
  return make("div", { class: "live-bars" }, list.map(({ text, share, ghost = 0, ...more }) => make(
    onclick ? "button" : "div",
    { class: "live-bar", type: onclick ? "button" : null, onclick: () => onclick?.({ text, share, ...more }), "aria-label": `${text} ${percent(share)}` },
    make("span", { class: "live-name" }, visible(text)),
    make("span", { class: "live-track" },
      make("i", { class: "live-ghost", style: `width: ${100 * ghost}%` }), make("i", { style: `width: ${100 * share}%` })),
    make("span", { class: "live-share" }, percent(share)),
  )));
}

// Tokens, darker where more attention is.
export function heat(tokens, shares, onclick = null) {
  const most = Math.max(...shares, 1e-9);
  return make("div", { class: "live-tokens" }, tokens.map((text, i) => make(
    onclick ? "button" : "span",
    { type: onclick ? "button" : null, style: `--heat: ${(shares[i] ?? 0) / most}`, title: percent(shares[i] ?? 0), onclick: () => onclick?.(i) }, visible(text),
  )));
}

// A picture of side × side numbers from -1 to 1 (grey), or of three channels, on a canvas.
export function paint(canvas, pixels, side, channels = 1) {
  canvas.width = canvas.height = side;
  const data = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = 127.5 * (1 + pixels[i * channels + (channels === 1 ? 0 : c)]);
    data.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}
