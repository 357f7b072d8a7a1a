// The perceptron: points that can be dragged, and corrections one by one. Nothing is loaded.

import { Perceptron } from "../../engine/perceptron.js";
import { choice, make } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: the neuron has two weights and a bias, and learns in this page by the rule above.",
    run: "Learn", points: "Points", sets: { and: "AND", or: "OR", xor: "XOR" }, step: "One correction", reset: "Weights to 0",
    label: "Plane with the points: drag one, click one to change its class, or move one with the arrow keys",
    state: (w, b, n) => `w = (${w.map((x) => x.toFixed(2)).join(", ")}), b = ${b.toFixed(2)}, corrections: ${n}`,
    done: (n) => `No mistake is left, after ${n} corrections.`, never: "100 passes, and there are still mistakes: no line separates these points.",
    point: (t) => `Point of class ${t}`,
    questions: [
      ["How many corrections does AND take, from weights of zero?", "Eleven, as in the table above. OR takes five: choose it and learn again."],
      ["Can it learn XOR?", "No. The line turns for ever, because no line has (0, 1) and (1, 0) on one side and the other two on the other."],
      ["What happens if you drag two points of different classes close together?", "The margin becomes small, and the number of corrections grows: the bound is (R / margin)²."],
    ],
  },
  ja: {
    about: "読み込みはありません。重み二つとバイアス一つのニューロンが、このページの中で、上の規則で学習します。",
    run: "学習する", points: "点", sets: { and: "AND", or: "OR", xor: "XOR" }, step: "一回だけ修正", reset: "重みを 0 に戻す",
    label: "点のある平面。点はドラッグで動き、クリックでクラスが変わり、矢印キーでも動きます",
    state: (w, b, n) => `w = (${w.map((x) => x.toFixed(2)).join(", ")})、b = ${b.toFixed(2)}、修正 ${n} 回`,
    done: (n) => `${n} 回の修正で、間違いがなくなりました。`, never: "100 周しても間違いが残ります。この点を分ける直線はありません。",
    point: (t) => `クラス ${t} の点`,
    questions: [
      ["重みが 0 から始まるとき、AND は何回の修正で学べますか。", "上の表のとおり 11 回です。OR は 5 回です。選んでもう一度学習してください。"],
      ["XOR を学べますか。", "学べません。(0, 1) と (1, 0) を片側に、残りを反対側に分ける直線がないので、直線はいつまでも回ります。"],
      ["クラスの違う二点を近づけると、どうなりますか。", "マージンが小さくなり、修正の回数が増えます。上限は (R / マージン)² です。"],
    ],
  },
};

const TARGETS = { and: [0, 0, 0, 1], or: [0, 1, 1, 1], xor: [0, 1, 1, 0] };
const SIDE = 260;
const place = (value) => ((value + 0.5) / 2) * SIDE; // from -0.5 to 1.5
const value = (at) => Math.max(-0.45, Math.min(1.45, (at / SIDE) * 2 - 0.5));

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    const sets = choice(this.text.points, Object.entries(this.text.sets), (name) => this.choose(name));
    this.plane = make("div", { class: "live-plane", role: "group", "aria-label": this.text.label });
    this.state = make("p", { class: "live-state" });
    body.append(this.plane, make("div", { class: "live-side" }, sets.node,
      make("button", { type: "button", onclick: () => this.step() }, this.text.step),
      make("button", { type: "button", onclick: () => this.reset() }, this.text.reset), this.state));
    this.choose("and");
  }

  choose(name) {
    this.inputs = [[0, 0], [0, 1], [1, 0], [1, 1]];
    this.targets = [...TARGETS[name]];
    this.reset();
  }

  reset() {
    this.end();
    this.perceptron = new Perceptron(2);
    this.corrections = 0;
    this.lessons = this.perceptron.learn(this.inputs, this.targets, 100);
    this.show();
  }

  end() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
  }

  // One correction. Returns whether there was one.
  step() {
    const { value: correction, done } = this.lessons.next();
    if (done) {
      clearInterval(this.timer);
      this.timer = null;
      if (correction !== undefined) this.separated = correction;
      this.live.set("done", this.separated ? this.text.done(this.corrections) : this.text.never);
      return false;
    }
    this.corrections++;
    this.show();
    return true;
  }

  run() {
    if (this.timer) return;
    this.lessons = this.perceptron.learn(this.inputs, this.targets, 100);
    this.live.set("running");
    let shown = 0; // the first corrections one by one, the others faster
    this.timer = setInterval(() => {
      for (let i = shown++ < 30 ? 1 : 20; i > 0 && this.step();) i--;
    }, 60);
  }

  show() {
    const { weight: [a, b], bias } = this.perceptron;
    const shade = [];
    const step = 10;
    for (let y = 0; y < SIDE; y += step) for (let x = 0; x < SIDE; x += step) {
      if (a * value(x + step / 2) + b * value(SIDE - y - step / 2) + bias >= 0) shade.push(`M${x} ${y}h${step}v${step}h-${step}z`);
    }
    this.plane.innerHTML = `<svg viewBox="0 0 ${SIDE} ${SIDE}" aria-hidden="true"><path class="live-fires" d="${shade.join("")}"/>`
      + `<path class="live-axis" d="M${place(0)} 0v${SIDE}M0 ${SIDE - place(0)}h${SIDE}"/></svg>`;
    this.inputs.forEach((input, i) => this.plane.append(this.dot(input, i)));
    this.state.textContent = this.text.state([a, b], bias, this.corrections);
  }

  dot(input, i) {
    const target = this.targets[i];
    const dot = make("button", { type: "button", class: `live-dot live-dot-${target}`, "aria-label": this.text.point(target) }, String(target));
    const put = () => {
      dot.style.left = `${(100 * place(input[0])) / SIDE}%`;
      dot.style.bottom = `${(100 * place(input[1])) / SIDE}%`;
    };
    put();
    let [dragged, held] = [false, false];
    dot.addEventListener("pointerdown", (event) => { dot.setPointerCapture(event.pointerId); [dragged, held] = [false, true]; });
    dot.addEventListener("pointermove", (event) => {
      if (!held) return;
      const box = this.plane.getBoundingClientRect();
      const to = [((event.clientX - box.left) / box.width) * SIDE, ((box.bottom - event.clientY) / box.height) * SIDE].map(value);
      if (Math.hypot(to[0] - input[0], to[1] - input[1]) < 0.03 && !dragged) return;
      dragged = true;
      [input[0], input[1]] = to;
      put();
    });
    dot.addEventListener("pointerup", () => { held = false; if (dragged) this.changed(); });
    dot.addEventListener("click", () => {
      if (dragged) return;
      this.targets[i] = 1 - target;
      this.changed();
    });
    dot.addEventListener("keydown", ({ key }) => {
      const by = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[key];
      if (!by) return;
      [input[0], input[1]] = [input[0] + by[0], input[1] + by[1]];
      this.changed();
      this.plane.querySelectorAll(".live-dot")[i].focus();
    });
    return dot;
  }

  changed() { // the weights stay; learning goes on from them
    this.end();
    this.lessons = this.perceptron.learn(this.inputs, this.targets, 100);
    this.show();
  }
}
