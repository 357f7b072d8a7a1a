// What a model said, as elements. Its text only ever becomes text nodes: no markup in it is obeyed.

import { say } from "./words/words.js";

export function element(name, attributes = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") found.addEventListener("click", value);
    else if (value !== undefined && value !== false) found.setAttribute(key, value === true ? "" : value);
  }
  found.append(...children);
  return found;
}

// A shape of an SVG picture.
export function shape(name, attributes = {}, ...children) {
  const found = document.createElementNS("http:" + "//www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\$\$[^$]+\$\$|\$[^$\s](?:[^$\n]*[^$\s])?\$(?!\d)|\\\([^\n]+?\\\)|\\\[[\s\S]+?\\\])/;

function inline(text) {
  return text.split(INLINE).map((part, place) => {
    if (place % 2 === 0) return part;
    if (part.startsWith("`")) return element("code", {}, part.slice(1, -1));
    if (part.startsWith("**")) return element("strong", {}, part.slice(2, -2));
    const width = part.startsWith("$$") || part.startsWith("\\") ? 2 : 1;
    return element("span", { class: "formula" }, part.slice(width, -width));
  });
}

// Code between fences as blocks, the rest with code, bold and formulas within its lines.
export function formatted(text) {
  return text.split(/^```/m).flatMap((part, place, parts) => {
    if (place % 2 === 0) return inline(part);
    const [, name, code] = part.match(/^([^\n]*)\n?([\s\S]*)$/);
    const closed = place < parts.length - 1;
    return [element("pre", { "data-language": name.trim() }, element("code", {}, closed ? code.replace(/\n$/, "") : code))];
  });
}

// Tokens in groups that make whole characters: { text, tokens }.
function groups(tokens) {
  const decoder = new TextDecoder();
  const found = [];
  let held = [];
  for (const token of tokens) {
    held.push(token);
    const text = decoder.decode(new Uint8Array(token.bytes), { stream: true });
    if (text) {
      found.push({ text, tokens: held });
      held = [];
    }
  }
  return found;
}

export const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
export const share = (value) => percent(Math.log(value));
export const visible = (token) => token.replace(/\n/g, "⏎").replace(/^ | $/g, "␣");

function showAlternatives(span, group) {
  const box = document.getElementById("alternatives");
  const rows = group.tokens.flatMap((token) => {
    const others = token.top_logprobs.some((each) => each.token === token.token) ? [] : [token];
    return [...token.top_logprobs, ...others].map((each) => element(
      "tr", { class: each.token === token.token ? "chosen" : undefined },
      element("td", {}, visible(each.token)), element("td", {}, percent(each.logprob)),
    ));
  });
  box.replaceChildren(element("table", {}, ...rows));
  box.hidden = false;
  const { left, bottom, top } = span.getBoundingClientRect();
  const below = bottom + box.offsetHeight + 6 < innerHeight;
  box.style.left = `${Math.max(4, Math.min(left, innerWidth - box.offsetWidth - 4))}px`;
  box.style.top = `${below ? bottom + 4 : Math.max(4, top - box.offsetHeight - 4)}px`;
}

function hideAlternatives() {
  document.getElementById("alternatives").hidden = true;
}

// A text token by token, each underlined by how likely it was; the likeliest others by mouse, touch or arrow keys.
export function tokenised(tokens) {
  const all = groups(tokens);
  const spans = all.map((group) => {
    const value = Math.exp(Math.min(...group.tokens.map((token) => token.logprob)));
    const span = element("span", { class: `token ${value > 0.6 ? "likely" : value > 0.2 ? "fair" : "unlikely"}` }, group.text);
    span.addEventListener("pointerenter", () => showAlternatives(span, group));
    span.addEventListener("pointerleave", hideAlternatives);
    return span;
  });
  const found = element("div", { class: "text", tabindex: "0", role: "group", "aria-label": say("tokensHint") }, ...spans);
  let place = -1;
  const move = (to) => {
    spans[place]?.classList.remove("current");
    place = Math.max(0, Math.min(spans.length - 1, to));
    spans[place].classList.add("current");
    showAlternatives(spans[place], all[place]);
  };
  found.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !spans.length) return;
    event.preventDefault();
    move(place + step);
  });
  found.addEventListener("blur", () => {
    spans[place]?.classList.remove("current");
    place = -1;
    hideAlternatives();
  });
  return found;
}
