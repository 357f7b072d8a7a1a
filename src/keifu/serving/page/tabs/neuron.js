// Neuron: a perceptron (Rosenblatt, 1958) and a small network, trained in this page on points that one sets.

import { onPlaces, panel } from "../panel.js";
import { say } from "../words/words.js";
import { inseparable } from "./separation.js";

const PATIENCE = 40; // steps of a perceptron that cannot succeed, before its proof is shown

const at = (id) => document.getElementById(id);
const plane = at("plane");
const { told } = panel("neuron");
let points = []; // { x, y, sign }, both from -1 to 1
let model = null;
let running = false;
let steps = 0;
let cursor = null;
let proof = null; // that no line parts the points

// One unit: on a mistake it moves towards the point.
function perceptron() {
  const w = [0, 0, 0];
  const say = ({ x, y }) => w[0] * x + w[1] * y + w[2];
  const learn = (rate) => {
    for (const point of points) {
      if (say(point) * point.sign > 0) continue;
      [point.x, point.y, 1].forEach((value, n) => { w[n] += rate * point.sign * value; });
    }
  };
  return { say, learn };
}

// One hidden layer of tanh units, trained by gradient descent on the logistic loss.
function network(count) {
  const random = () => 2 * Math.random() - 1;
  const units = Array.from({ length: count }, () => ({ w: [2 * random(), 2 * random(), random()], v: random() }));
  let bias = 0;
  const hidden = ({ w }, { x, y }) => Math.tanh(w[0] * x + w[1] * y + w[2]);
  const say = (point) => units.reduce((sum, unit) => sum + unit.v * hidden(unit, point), bias);
  const learn = (rate) => {
    for (let turn = 0; turn < 20; turn++) {
      for (const point of points) {
        const pull = (rate * point.sign) / (1 + Math.exp(point.sign * say(point)));
        for (const unit of units) {
          const h = hidden(unit, point);
          const back = pull * unit.v * (1 - h * h);
          unit.v += pull * h;
          [point.x, point.y, 1].forEach((value, n) => { unit.w[n] += back * value; });
        }
        bias += pull;
      }
    }
  };
  return { say, learn };
}

function show() {
  const pen = plane.getContext("2d");
  const size = plane.width;
  pen.clearRect(0, 0, size, size);
  for (let y = 0; model && y < size; y += 8) {
    for (let x = 0; x < size; x += 8) {
      const value = Math.tanh(model.say({ x: (2 * (x + 4)) / size - 1, y: (2 * (y + 4)) / size - 1 }) * 2);
      pen.fillStyle = value > 0 ? `rgb(0 114 178 / ${0.15 + 0.35 * value})` : `rgb(230 159 0 / ${0.15 - 0.35 * value})`;
      pen.fillRect(x, y, 8, 8);
    }
  }
  for (const { x, y, sign } of points) {
    const [left, top] = [((x + 1) * size) / 2, ((y + 1) * size) / 2];
    pen.fillStyle = sign > 0 ? "#0072b2" : "#b36b00";
    pen.strokeStyle = "#fff";
    pen.beginPath();
    if (sign > 0) pen.arc(left, top, 7, 0, 7);
    else [[0, -8], [8, 7], [-8, 7]].forEach(([a, b], n) => (n ? pen.lineTo(left + a, top + b) : pen.moveTo(left + a, top + b)));
    pen.closePath();
    pen.fill();
    pen.stroke();
  }
  if (cursor) {
    pen.strokeStyle = "#888";
    pen.strokeRect(cursor[0] - 8, cursor[1] - 8, 16, 16);
  }
  if (proof) showProof(pen, ({ x, y }) => [((x + 1) * size) / 2, ((y + 1) * size) / 2]);
  report();
}

// The two segments that cross, or the point in the triangle.
function showProof(pen, placeOf) {
  const outline = (corners) => {
    pen.beginPath();
    for (const corner of corners) pen.lineTo(...placeOf(corner));
    pen.stroke();
  };
  pen.strokeStyle = getComputedStyle(plane).color;
  pen.lineWidth = 2;
  for (const corners of proof.segments ?? [[...proof.triangle, proof.triangle[0]]]) outline(corners);
  const [left, top] = placeOf(proof.point);
  pen.lineWidth = 4;
  for (const way of [1, -1]) {
    pen.beginPath();
    pen.moveTo(left - 9, top - 9 * way);
    pen.lineTo(left + 9, top + 9 * way);
    pen.stroke();
  }
  pen.lineWidth = 1;
}

const isPerceptron = () => at("kind").value === "0";
const countWrong = () => points.filter((point) => model.say(point) * point.sign <= 0).length;

function report() {
  const values = { n: steps, wrong: countWrong(), all: points.length };
  if (!points.length) told("");
  else if (proof) told(say(proof.segments ? "proofCrossing" : "proofInside", values));
  else if (!steps) told(say("pressTrain", values));
  else told(say(isPerceptron() && !values.wrong ? "parted" : "progress", values));
}

function step() {
  if (!running) return;
  model.learn(Number(at("rate").value) || 0.1);
  steps += 1;
  if (isPerceptron() && steps >= PATIENCE) proof = inseparable(points);
  if (proof || (isPerceptron() && !countWrong())) run(false);
  show();
  requestAnimationFrame(step);
}

function begin() {
  at("units").closest("label").hidden = isPerceptron();
  model = isPerceptron() ? perceptron() : network(Math.min(32, Math.max(1, Number(at("units").value) || 6)));
  steps = 0;
  proof = null;
  show();
}

function run(wanted) {
  running = wanted && points.length > 0;
  if (running) proof = null;
  at("train").dataset.text = running ? "pause" : "train";
  at("train").textContent = say(at("train").dataset.text);
  if (running) step();
}

function set(made) {
  run(false);
  points = made;
  begin();
}

const group = (x, y, sign) => Array.from({ length: 12 }, () => (
  { x: x + 0.5 * (Math.random() - 0.5), y: y + 0.5 * (Math.random() - 0.5), sign }
));

onPlaces(plane, (x, y, began) => {
  if (!began) return;
  proof = null;
  points.push({ x: (2 * x) / plane.width - 1, y: (2 * y) / plane.height - 1, sign: Number(at("class").value) });
  show();
}, (x, y) => {
  cursor = [x, y];
  show();
});
at("train").addEventListener("click", () => run(!running));
const twoGroups = () => [...group(-0.4, -0.3, 1), ...group(0.4, 0.4, -1)];
at("line").addEventListener("click", () => set(twoGroups()));
at("xor").addEventListener("click", () => set([
  ...group(-0.5, -0.5, 1), ...group(0.5, 0.5, 1), ...group(-0.5, 0.5, -1), ...group(0.5, -0.5, -1),
]));
at("clear-points").addEventListener("click", () => set([]));
for (const id of ["kind", "units"]) at(id).addEventListener("change", () => set(points));
at("neuron").addEventListener("keydown", (event) => { if (event.key === "Escape") run(false); });
document.addEventListener("language", report);
set(twoGroups());
