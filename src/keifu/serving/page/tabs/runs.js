// Runs: the losses of a training run, read while they grow.

import { read } from "../api.js";
import { panel } from "../panel.js";
import { element, shape } from "../render.js";
import { say } from "../words/words.js";

const EVERY = 2000; // milliseconds between two looks
const POINTS = 400; // of a curve: more are averaged
const [HEIGHT, LEFT, RIGHT, BOTTOM] = [300, 60, 30, 44];
const CURVES = [["loss", "training"], ["validation_loss", "validation"]];
const runs = panel("runs");
const list = runs.form.elements.run;
const tab = document.getElementById("tab-runs");
let lines = [];
let next = 0;
let visible = false;
let timer = null;

const json = async (path) => (await read(path)).json();

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {}; // a damaged line
  }
}

// Round numbers that enclose these, at most so many steps and one more.
function ticks(low, high, most = 6) {
  const least = (high - low || Math.abs(high) || 1) / most;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((n) => n * power).find((each) => each >= least);
  const first = Math.floor(low / step);
  const count = Math.max(1, Math.ceil(high / step) - first);
  return Array.from({ length: count + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

function averaged(points) {
  const size = Math.ceil(points.length / POINTS) || 1;
  const parts = Array.from({ length: Math.ceil(points.length / size) }, (_, n) => points.slice(n * size, (n + 1) * size));
  const mean = (part, axis) => part.reduce((sum, point) => sum + point[axis], 0) / part.length;
  return parts.map((part) => [mean(part, 0), mean(part, 1)]);
}

function chart(curves) {
  const all = curves.flatMap(({ points }) => points);
  const width = Math.max(280, Math.min(760, runs.found.clientWidth));
  const steps = width < 500 ? 3 : 6; // marks along the steps
  const xs = ticks(0, Math.max(...all.map(([x]) => x)), steps);
  const ys = ticks(Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y)));
  const x = (value) => LEFT + (value / xs.at(-1)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - ys[0]) / (ys.at(-1) - ys[0])) * (HEIGHT - BOTTOM - 12);
  const text = (words, place, anchor) => shape("text", { ...place, "text-anchor": anchor }, words);
  return shape("svg", { class: "chart", width, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": say("loss") },
    ...ys.map((value) => shape("path", { class: "grid", d: `M${LEFT} ${y(value)}H${width - RIGHT}` })),
    ...ys.map((value) => text(value.toLocaleString(), { x: LEFT - 8, y: y(value) + 4 }, "end")),
    ...xs.map((value) => text(value.toLocaleString(), { x: x(value), y: HEIGHT - BOTTOM + 18 }, "middle")),
    text(say("axisStep"), { x: (width + LEFT) / 2, y: HEIGHT - 6 }, "middle"),
    text(say("loss"), { transform: `translate(14 ${(HEIGHT - BOTTOM) / 2}) rotate(-90)` }, "middle"),
    ...curves.map(({ name, points }) => shape("polyline", {
      class: `line ${name}`, points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "),
    })),
    ...curves.flatMap(({ name, points }) => (points.length < 40 ? points : points.slice(-1)).map(([a, b]) => shape("circle", {
      class: name, cx: x(a), cy: y(b), r: 3,
    }, shape("title", {}, `${b} (${a})`)))),
  );
}

function show({ seconds, running }) {
  const values = (name) => lines.filter((line) => Number.isFinite(line[name])).map((line) => [line.step, line[name]]);
  const curves = CURVES.map(([field, name]) => ({ name, points: averaged(values(field)) })).filter(({ points }) => points.length);
  if (!curves.length) {
    runs.found.replaceChildren();
    return runs.told(say("noFigures"));
  }
  const last = (name) => lines.findLast((line) => line[name] !== undefined)?.[name];
  const figures = CURVES.filter(([field]) => last(field) !== undefined)
    .map(([field, name]) => element("span", { class: `key ${name}` }, `${say(name)}: ${last(field).toFixed(4)}`));
  runs.found.replaceChildren(element("p", { class: "keys" }, ...figures), chart(curves));
  const step = lines.at(-1)?.step ?? 0;
  const all = last("planned_steps");
  const facts = all ? say("runFacts", { step, all }) : `${say("axisStep")} ${step}`;
  runs.told(`${facts}; ${say(running ? "following" : "ended", { s: Math.round(seconds).toLocaleString() })}`);
}

async function follow() {
  clearTimeout(timer);
  if (!visible || !list.value) return;
  const asked = list.value;
  try {
    const found = await json(`/v1/runs/${encodeURIComponent(asked)}?start=${next}`);
    if (asked === list.value) {
      if (found.next < next) return restart(); // the run began again
      lines.push(...found.lines.filter(Boolean).map(parsed).filter((line) => Number.isFinite(line.step)));
      next = found.next;
      show(found);
    }
  } catch (error) {
    runs.told(error instanceof TypeError ? say("lost") : error.message, true);
  }
  timer = setTimeout(follow, EVERY);
}

function restart() {
  lines = [];
  next = 0;
  follow();
}

async function listRuns() {
  const { data } = await json("/v1/runs");
  const kept = list.value;
  list.replaceChildren(...data.map(({ id }) => new Option(id, id)));
  if (data.some(({ id }) => id === kept)) list.value = kept;
  tab.hidden = !data.length;
  document.dispatchEvent(new Event("runs"));
}

list.addEventListener("change", restart);
document.addEventListener("models", listRuns);
document.addEventListener("language", () => visible && follow());
document.addEventListener("tab", ({ detail }) => {
  visible = detail === "runs";
  if (visible) listRuns().then(restart);
});
