// Optimizers: the ways of three of them down the same slope. Nothing is loaded.

import { Plane } from "../small_network.js";
import { choice, make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: gradient descent, momentum and Adam take 100 steps each on a function of two weights, with its exact gradient. A model has millions of weights and a noisy gradient; the shapes are the same.",
    run: "Take 100 steps", set: "Function", sets: { valley: "Long valley", bend: "Bent valley", two: "Two valleys" }, names: { sgd: "Gradient descent", momentum: "Momentum 0.9", adam: "Adam" },
    plane: "Function of two weights, darker where it is larger, with the ways of three optimizers; the arrow keys move the start", hint: "Click the picture for another start. Each slider is a learning rate.",
    state: (step) => `Step ${step} of 100`, value: (name, value) => `${name}: ${value}`, gone: "left the picture",
    questions: [
      ["In the long valley, raise the learning rate of gradient descent. What stops it?", "The steep direction. Above 1 each step jumps over the valley further than before, and it leaves the picture, while it still creeps along the flat direction."],
      ["Why does Adam hardly care which direction is flat?", "It divides each weight's step by the size of that weight's gradients. Both weights move by about the learning rate, whatever the slope."],
      ["Choose two valleys, and start near the left one. Who finds the lower one?", "With the first settings gradient descent and momentum roll over the hill to the lower one, and Adam stays. At half its learning rate gradient descent stays too: the three follow the slope, and do not know that a lower place exists."],
    ],
  },
  ja: {
    about: "読み込みはありません。勾配降下法、モメンタム、Adam が、二つの重みの関数を正確な勾配で 100 歩ずつ下ります。実際のモデルでは重みが何百万もあり、勾配にはノイズがありますが、起きることは同じです。",
    run: "100 歩進む", set: "関数", sets: { valley: "長い谷", bend: "曲がった谷", two: "二つの谷" }, names: { sgd: "勾配降下法", momentum: "モメンタム 0.9", adam: "Adam" },
    plane: "二つの重みの関数。大きいところほど濃く、三つのオプティマイザの道を重ねて示します。矢印キーで出発点が動きます", hint: "絵をクリックすると出発点が変わります。つまみは学習率です。",
    state: (step) => `100 歩中 ${step}`, value: (name, value) => `${name}：${value}`, gone: "絵の外に出ました",
    questions: [
      ["長い谷で、勾配降下法の学習率を上げてください。何が限界になりますか。", "急な方向です。1 を超えると、一歩ごとに谷を前より大きく飛び越えて、絵の外に出ます。そのときも、平らな方向にはゆっくりとしか進みません。"],
      ["Adam は、どの方向が平らかをほとんど気にしません。なぜですか。", "重みごとに、歩幅をその重みの勾配の大きさで割るからです。傾きがどうであれ、どの重みも学習率ほど動きます。"],
      ["二つの谷を選び、左の谷の近くから始めてください。低いほうの谷を見つけるのはどれですか。", "最初の設定では、勾配降下法とモメンタムが丘を越えて低いほうへ行き、Adam は残ります。学習率を半分にすると、勾配降下法も残ります。三つとも傾きをたどるだけで、もっと低い場所があることは知りません。"],
    ],
  },
};

export const FUNCTIONS = { // value and gradient at (x, y)
  valley: { value: (x, y) => 0.025 * x * x + y * y, slope: (x, y) => [0.05 * x, 2 * y], start: [-1.8, 0.9] },
  bend: { value: (x, y) => 0.1 * (1 - x) ** 2 + (y - x * x / 2) ** 2, slope: (x, y) => [-0.2 * (1 - x) - 2 * x * (y - x * x / 2), 2 * (y - x * x / 2)], start: [-1.5, -0.5] },
  two: { value: (x, y) => 0.5 * (x * x - 1) ** 2 - 0.15 * x + y * y / 2 + 0.15, slope: (x, y) => [2 * x * (x * x - 1) - 0.15, y], start: [-1.8, 1.2] },
};

// The places after each step, as torch.optim takes them.
export const OPTIMIZERS = {
  sgd: (slope, start, rate, steps) => walk(start, steps, (w) => slope(...w).map((g) => rate * g)),
  momentum: (slope, start, rate, steps) => {
    let speed = [0, 0];
    return walk(start, steps, (w) => (speed = slope(...w).map((g, i) => 0.9 * speed[i] + g)).map((v) => rate * v));
  },
  adam: (slope, start, rate, steps) => {
    let [mean, square] = [[0, 0], [0, 0]];
    return walk(start, steps, (w, step) => {
      const g = slope(...w);
      mean = mean.map((m, i) => 0.9 * m + 0.1 * g[i]);
      square = square.map((v, i) => 0.999 * v + 0.001 * g[i] ** 2);
      return mean.map((m, i) => (rate * m) / (1 - 0.9 ** step) / (Math.sqrt(square[i] / (1 - 0.999 ** step)) + 1e-8));
    });
  },
};

function walk(start, steps, move) {
  const way = [start];
  for (let step = 1; step <= steps; step++) {
    const by = move(way.at(-1), step);
    way.push(way.at(-1).map((value, i) => value - by[i]));
  }
  return way;
}

const COLOURS = { sgd: "#c62828", momentum: "#1565c0", adam: "#2e7d32" };
const RATES = { sgd: -3, momentum: -5, adam: -4 };
const STEPS = 100;

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    const canvas = make("canvas", { class: "live-pad live-still", tabindex: 0, role: "img", "aria-label": this.text.plane });
    this.plane = new Plane(canvas);
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      this.move([((event.clientX - box.left) / box.width) * 4 - 2, 2 - ((event.clientY - box.top) / box.height) * 4]);
    });
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
      if (!by) return;
      event.preventDefault();
      this.move(this.start.map((value, i) => Math.max(-2, Math.min(2, value + by[i]))));
    });
    this.set = choice(this.text.set, Object.entries(this.text.sets), () => this.move(FUNCTIONS[this.set.value].start));
    const show = (power) => String(Number((2 ** (power / 2)).toPrecision(2)));
    this.rates = Object.fromEntries(Object.entries(this.text.names).map(([name, label]) => [name, slider(label, { min: -16, max: 3, value: 2 * RATES[name] + 2, show, onchange: () => this.show(this.step) })]));
    this.state = make("p", { class: "live-state" });
    this.values = make("ul", { class: "live-ways" });
    body.append(canvas, make("div", { class: "live-side" }, this.set.node, ...Object.values(this.rates).map(({ node }) => node), this.state, this.values, make("p", { class: "live-hint" }, this.text.hint)));
    this.step = STEPS;
    this.move(FUNCTIONS.valley.start);
  }

  move(start) {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
    this.start = start;
    this.show(this.step);
  }

  run() {
    if (this.timer) return;
    this.live.set("running");
    let step = 0;
    this.timer = setInterval(() => {
      this.show(++step);
      if (step < STEPS) return;
      clearInterval(this.timer);
      this.timer = null;
      this.live.set("done");
    }, 20);
  }

  show(step) {
    this.step = step;
    const { value, slope } = FUNCTIONS[this.set.value];
    const [side, cells] = [this.plane.side, 60];
    for (let row = 0; row < cells; row++) for (let column = 0; column < cells; column++) {
      const height = Math.min(1, Math.sqrt(value((4 * (column + 0.5)) / cells - 2, 2 - (4 * (row + 0.5)) / cells)) / 2);
      this.plane.pen.fillStyle = `hsl(45 20% ${98 - 10 * Math.round(7 * height)}%)`;
      this.plane.pen.fillRect((column * side) / cells, (row * side) / cells, side / cells + 1, side / cells + 1);
    }
    this.state.textContent = this.text.state(step);
    this.values.replaceChildren(...Object.entries(this.text.names).map(([name, label]) => {
      const way = OPTIMIZERS[name](slope, this.start, 2 ** (this.rates[name].value / 2), step);
      this.plane.line(way, COLOURS[name]);
      const inside = way.at(-1).every((place) => Math.abs(place) <= 2);
      return make("li", { style: `color: ${COLOURS[name]}` }, make("span", {}, this.text.value(label, inside ? value(...way.at(-1)).toFixed(4) : this.text.gone)));
    }));
  }
}
