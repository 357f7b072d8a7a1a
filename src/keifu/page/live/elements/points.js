// Diffusion of points in a plane: a small network is trained in the page, and its score is drawn. Nothing is loaded.

import { Plane, SmallNetwork, generator, shapePoints } from "../small_network.js";
import { choice, make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: a network of 2,786 weights learns to predict the noise in points of a plane, by the same loss as above, in this page. The arrows are the score, -ε / √(1 - ᾱ), shortened.",
    run: "Learn", sets: { ring: "Ring", clusters: "Four clusters", line: "Wave" }, set: "Points", noise: "Noise level of the arrows", reset: "Forget everything",
    plane: "Plane with training points in grey, drawn points in green, and an arrow of the score at each point of a grid",
    state: (steps, loss) => `Steps: ${steps}${loss === null ? "" : `, mean loss of the last 100: ${loss.toFixed(3)}`}`, done: "2,000 steps. Run it again to train on.",
    questions: [
      ["Where do the arrows point at little noise, and where at much?", "At little noise they point to the nearest training points. At much noise nearly all of them point to the centre, because every training point is a possible origin."],
      ["Does the loss fall to 0?", "No. The network cannot know which of many noises was added, so part of the loss always stays: about 0.35 for the ring."],
      ["Do all green points end at the training points?", "No. For the four clusters about one point in ten is still between them after 2,000 steps. There the score jumps from one side to the other, and a small smooth network follows the jump only roughly. For the ring it is one point in thirty."],
    ],
  },
  ja: {
    about: "読み込みはありません。重み 2,786 個のネットワークが、平面の点に加えたノイズの予測を、上と同じ損失でこのページの中で学習します。矢印はスコア -ε / √(1 - ᾱ) で、短く描いています。",
    run: "学習する", sets: { ring: "輪", clusters: "四つの集まり", line: "波" }, set: "点", noise: "矢印のノイズの強さ", reset: "すべて忘れる",
    plane: "平面。灰色が学習用の点、緑が生成した点で、格子の各点にスコアの矢印があります",
    state: (steps, loss) => `${steps} 歩${loss === null ? "" : `、最近 100 歩の平均損失 ${loss.toFixed(3)}`}`, done: "2,000 歩です。もう一度押すと、続きを学習します。",
    questions: [
      ["ノイズが弱いとき、強いとき、矢印はどこを向きますか。", "弱いときは、いちばん近い学習用の点を向きます。強いときは、どの点から来たともいえるので、ほとんどが中心を向きます。"],
      ["損失は 0 になりますか。", "なりません。加えられたノイズがどれだったかは一つに決まらないので、損失の一部は必ず残ります。輪では 0.35 ほどです。"],
      ["緑の点は、すべて学習用の点に着きますか。", "いいえ。四つの集まりでは、2,000 歩のあとでも十個に一つほどが集まりの間に残ります。そこではスコアが一方から他方へ跳びますが、小さくて滑らかなネットワークは、その跳びをおおまかにしか追えません。輪では三十個に一つです。"],
    ],
  },
};

const TIMES = 100;
const BARS = Array.from({ length: TIMES }, (_, t) => Math.cos((((t + 1) / (TIMES + 2)) * Math.PI) / 2) ** 2); // ᾱ

// A network that predicts the noise in a point, and what it learns from.
export class Diffusion {
  constructor(shape, seed = 1) {
    this.random = generator(seed);
    this.points = shapePoints(shape, 200, this.random);
    this.network = new SmallNetwork([6, 48, 48, 2], this.random);
    this.steps = 0;
    this.losses = [];
  }

  forward(x, t) {
    const time = t / TIMES;
    return this.network.forward([x[0], x[1], time, Math.sin(Math.PI * time), Math.cos(Math.PI * time), Math.sqrt(1 - BARS[t])]);
  }

  noise(x, t) { return this.forward(x, t).at(-1); }

  step(batch = 48, rate = 0.006 / Math.sqrt(1 + this.steps / 300)) { // longer steps first
    let loss = 0;
    for (let n = 0; n < batch; n++) {
      const point = this.points[Math.floor(this.random.uniform() * this.points.length)];
      const t = Math.floor(this.random.uniform() * TIMES);
      const noise = [this.random.normal(), this.random.normal()];
      const states = this.forward(point.map((value, i) => Math.sqrt(BARS[t]) * value + Math.sqrt(1 - BARS[t]) * noise[i]), t);
      const difference = states.at(-1).map((value, i) => value - noise[i]);
      loss += (difference[0] ** 2 + difference[1] ** 2) / (2 * batch);
      this.network.backward(states, difference.map((value) => value / batch));
    }
    this.network.update(rate);
    this.steps++;
    this.losses = [...this.losses.slice(-99), loss];
  }

  // Points from noise, by DDIM in 20 steps.
  draw(count, seed = 7) {
    const { normal } = generator(seed);
    return Array.from({ length: count }, () => {
      let x = [normal(), normal()];
      for (let t = TIMES - 1; t >= 0; t -= 5) {
        const noise = this.noise(x, t);
        const before = t >= 5 ? BARS[t - 5] : 1;
        x = x.map((value, i) => Math.sqrt(before) * ((value - Math.sqrt(1 - BARS[t]) * noise[i]) / Math.sqrt(BARS[t])) + Math.sqrt(1 - before) * noise[i]);
      }
      return x;
    });
  }
}

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    const canvas = make("canvas", { class: "live-pad live-still", role: "img", "aria-label": this.text.plane });
    this.plane = new Plane(canvas);
    this.shape = choice(this.text.set, Object.entries(this.text.sets), () => this.reset());
    this.noise = slider(this.text.noise, { min: 0, max: TIMES - 1, value: 10, onchange: () => this.show() });
    this.state = make("p", { class: "live-state" });
    body.append(canvas, make("div", { class: "live-side" }, this.shape.node, this.noise.node, make("button", { type: "button", onclick: () => this.reset() }, this.text.reset), this.state));
    this.reset();
  }

  reset() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
    this.model = new Diffusion(this.shape.value);
    this.show();
  }

  run() {
    if (this.timer) return;
    this.live.set("running");
    const last = this.model.steps + 2000;
    this.timer = setInterval(() => {
      for (let i = 0; i < 40; i++) this.model.step();
      this.show();
      if (this.model.steps < last) return;
      clearInterval(this.timer);
      this.timer = null;
      this.live.set("done", this.text.done);
    }, 20);
  }

  show() {
    const { steps, losses, points } = this.model;
    this.state.textContent = this.text.state(steps, losses.length ? losses.reduce((sum, loss) => sum + loss, 0) / losses.length : null);
    this.plane.clear();
    this.plane.dots(points, "#bbb");
    const t = this.noise.value;
    for (let x = -1.75; x < 2; x += 0.5) for (let y = -1.75; y < 2; y += 0.5) {
      const score = [...this.model.noise([x, y], t)].map((value) => -value / Math.sqrt(1 - BARS[t]));
      const length = Math.hypot(...score);
      this.plane.arrow([x, y], [x + (score[0] / (length + 1)) * 0.42, y + (score[1] / (length + 1)) * 0.42], "#6d4c41");
    }
    this.plane.dots(this.model.draw(150), "#00897b");
  }
}
