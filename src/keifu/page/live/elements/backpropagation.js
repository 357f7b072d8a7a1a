// Backpropagation: a network of one hidden layer learns XOR in the page, and every gradient is shown. Nothing is loaded.

import { choice, make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: two inputs, a few hidden units and one output, all with sigmoids, learn the four rows of XOR in this page by the equations above.",
    run: "Learn", rate: "Learning rate", units: "Hidden units", step: "One step", start: "New random weights", plane: "Output for every input from -0.5 to 1.5: dark where it is near 1, with the four rows of XOR",
    columns: ["from x₁", "from x₂", "bias", "to y"], unit: (n) => `h${n}`, output: "y", cell: "Each cell: the weight, and below it its gradient; darker where the gradient is larger.",
    state: (steps, error) => `Steps: ${steps}, error E = ${error.toFixed(4)}`,
    done: (steps) => `All four outputs are within 0.1 of their targets, after ${steps} steps.`, never: "20,000 steps, and an output is still more than 0.1 from its target.",
    questions: [
      ["Can one hidden unit learn XOR?", "No. Its output depends on one weighted sum and rises or falls along it, so it is a single line with soft edges, as for the perceptron."],
      ["What does the learning rate change?", "From the first weights, three hidden units take 3,901 steps at 0.25, 500 at 2 and 83 at 8. At 32 the steps are so long that the units reach the flat ends of their sigmoids: after 20,000 steps it has not learned."],
      ["Two hidden units are enough on paper. Do they always learn XOR?", "No. At rate 2, three of the first ten random starts have not learned it after 20,000 steps. With three units, all ten starts learn it: spare units make a good direction more likely."],
    ],
  },
  ja: {
    about: "読み込みはありません。入力 2 個、隠れユニット数個、出力 1 個（すべてシグモイド）が、このページの中で、上の式で XOR の四行を学習します。",
    run: "学習する", rate: "学習率", units: "隠れユニット", step: "一歩だけ", start: "重みを引き直す", plane: "-0.5 から 1.5 までの入力に対する出力。1 に近いところほど濃く、XOR の四行を重ねて示します",
    columns: ["x₁ から", "x₂ から", "バイアス", "y へ"], unit: (n) => `h${n}`, output: "y", cell: "各欄の上が重み、下がその勾配です。勾配が大きいほど濃くなります。",
    state: (steps, error) => `${steps} 歩、誤差 E = ${error.toFixed(4)}`,
    done: (steps) => `${steps} 歩で、四つの出力がすべて正解から 0.1 以内になりました。`, never: "20,000 歩進んでも、正解から 0.1 より離れた出力があります。",
    questions: [
      ["隠れユニット一つで XOR を学べますか。", "学べません。出力は一つの重みつき和だけで決まり、それに沿って増えるか減るかのどちらかなので、パーセプトロンと同じく、ぼやけた一本の直線になります。"],
      ["学習率を変えると、どうなりますか。", "最初の重みと隠れユニット三つでは、0.25 で 3,901 歩、2 で 500 歩、8 で 83 歩です。32 では一歩が長すぎて、ユニットがシグモイドの平らな端に着いてしまい、20,000 歩でも学べません。"],
      ["理屈では隠れユニット二つで足ります。いつも XOR を学べますか。", "いいえ。学習率 2 では、最初の十通りの乱数の重みのうち三つが、20,000 歩でも学べません。三つあれば十通りすべてで学べます。余分なユニットがあると、よい方向が見つかりやすくなります。"],
    ],
  },
};

const INPUTS = [[0, 0], [0, 1], [1, 0], [1, 1]];
const TARGETS = [0, 1, 1, 0];
const LIMIT = 20_000;
const sigmoid = (sum) => 1 / (1 + Math.exp(-sum));

// The network of the page: y = σ(W₂ h + b₂) and h = σ(W₁ x + b₁), with E = ½ Σ (y - t)².
export class Network {
  constructor(units, seed) {
    let state = seed;
    const random = () => ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 31) - 1;
    for (let i = 0; i < 8; i++) random();
    this.hidden = Array.from({ length: units }, () => ({ weights: [random(), random()], bias: random(), out: random() }));
    this.bias = random();
    this.steps = 0;
    this.backward();
  }

  forward(x) {
    const h = this.hidden.map(({ weights, bias }) => sigmoid(weights[0] * x[0] + weights[1] * x[1] + bias));
    return { h, y: sigmoid(h.reduce((sum, state, i) => sum + state * this.hidden[i].out, this.bias)) };
  }

  // The gradient of E for every weight, summed over the four rows.
  backward() {
    this.gradients = { hidden: this.hidden.map(() => ({ weights: [0, 0], bias: 0, out: 0 })), bias: 0 };
    [this.error, this.furthest] = [0, 0];
    INPUTS.forEach((x, row) => {
      const { h, y } = this.forward(x);
      const difference = y - TARGETS[row];
      this.error += difference ** 2 / 2;
      this.furthest = Math.max(this.furthest, Math.abs(difference));
      const delta = difference * y * (1 - y);
      this.gradients.bias += delta;
      this.gradients.hidden.forEach((gradient, i) => {
        const below = delta * this.hidden[i].out * h[i] * (1 - h[i]);
        gradient.out += delta * h[i];
        gradient.bias += below;
        gradient.weights[0] += below * x[0];
        gradient.weights[1] += below * x[1];
      });
    });
  }

  step(rate) {
    this.hidden.forEach((unit, i) => {
      const { weights, bias, out } = this.gradients.hidden[i];
      unit.weights = unit.weights.map((weight, j) => weight - rate * weights[j]);
      unit.bias -= rate * bias;
      unit.out -= rate * out;
    });
    this.bias -= rate * this.gradients.bias;
    this.steps++;
    this.backward();
  }

  get learned() { return this.furthest <= 0.1; }
}

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.seed = 1;
    this.rate = slider(this.text.rate, { min: -2, max: 5, value: 1, show: (power) => String(2 ** power) });
    const units = [1, 2, 3, 4, 8].map((n) => [n, String(n)]);
    this.units = choice(this.text.units, units, () => this.reset());
    this.units.select.value = "3";
    this.plane = make("canvas", { class: "live-pad", role: "img", "aria-label": this.text.plane });
    this.state = make("p", { class: "live-state" });
    this.table = make("div", { class: "live-wide live-scroll", tabindex: 0, role: "group", "aria-label": this.text.cell });
    const once = () => { this.end(); this.step(1); };
    const again = () => { this.seed++; this.reset(); };
    body.append(this.plane, make("div", { class: "live-side" }, this.rate.node, this.units.node,
      make("button", { type: "button", onclick: once }, this.text.step), make("button", { type: "button", onclick: again }, this.text.start), this.state),
    this.table, make("p", { class: "live-hint" }, this.text.cell));
    this.reset();
  }

  reset() {
    this.end();
    this.network = new Network(Number(this.units.value), this.seed);
    this.show();
  }

  end() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
  }

  step(count) {
    for (let i = 0; i < count && !this.network.learned; i++) this.network.step(2 ** this.rate.value);
    this.show();
  }

  run() {
    if (this.timer) return;
    if (this.network.learned) this.reset();
    this.live.set("running");
    const last = this.network.steps + LIMIT;
    let shown = 0; // the first steps one by one, the others faster
    this.timer = setInterval(() => {
      this.step(Math.min(200, 1 + Math.floor(shown++ ** 1.5 / 4)));
      if (!this.network.learned && this.network.steps < last) return;
      this.end();
      this.live.set("done", this.network.learned ? this.text.done(this.network.steps) : this.text.never);
    }, 40);
  }

  show() {
    this.state.textContent = this.text.state(this.network.steps, this.network.error);
    this.drawPlane();
    const { hidden, gradients, bias } = this.network;
    const rows = hidden.map((unit, i) => {
      const gradient = gradients.hidden[i];
      return [this.text.unit(i + 1), [[unit.weights[0], gradient.weights[0]], [unit.weights[1], gradient.weights[1]], [unit.bias, gradient.bias], [unit.out, gradient.out]]];
    });
    rows.push([this.text.output, [null, null, [bias, gradients.bias], null]]);
    const cell = (pair) => (pair === null ? make("td", { class: "live-none" }) : make("td", { style: `--heat: ${Math.min(0.8, 2 * Math.sqrt(Math.abs(pair[1])))}` }, pair[0].toFixed(2), make("br"), make("small", {}, pair[1].toFixed(4))));
    this.table.replaceChildren(make("table", { class: "live-matrix live-gradients" },
      make("tr", {}, make("th"), this.text.columns.map((name) => make("th", { scope: "col" }, name))),
      rows.map(([name, pairs]) => make("tr", {}, make("th", { scope: "row" }, name), pairs.map(cell)))));
  }

  drawPlane() {
    const [side, cells] = [280, 28];
    this.plane.width = this.plane.height = side;
    const pen = this.plane.getContext("2d");
    const size = side / cells;
    for (let row = 0; row < cells; row++) for (let column = 0; column < cells; column++) {
      const { y } = this.network.forward([(2 * (column + 0.5)) / cells - 0.5, 1.5 - (2 * (row + 0.5)) / cells]);
      pen.fillStyle = `rgb(${[[255, 0], [248, 105], [225, 92]].map(([pale, dark]) => Math.round(pale + (dark - pale) * y)).join(" ")})`;
      pen.fillRect(column * size, row * size, size, size);
    }
    pen.font = "bold 20px sans-serif";
    [pen.textAlign, pen.textBaseline] = ["center", "middle"];
    INPUTS.forEach(([x, y], i) => {
      const [left, top] = [((x + 0.5) / 2) * side, side - ((y + 0.5) / 2) * side];
      pen.fillStyle = TARGETS[i] ? "#00695c" : "#6d4c41";
      pen.strokeStyle = "#fff";
      pen.lineWidth = 3;
      pen.beginPath();
      pen.arc(left, top, 16, 0, 2 * Math.PI);
      pen.fill();
      pen.stroke();
      pen.fillStyle = "#fff";
      pen.fillText(String(TARGETS[i]), left, top);
    });
  }
}
