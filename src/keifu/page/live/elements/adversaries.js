// A generator against a discriminator: two small networks are trained on points of a plane. Nothing is loaded.

import { Plane, SmallNetwork, generator } from "../small_network.js";
import { choice, make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: a generator of 722 weights and a discriminator of 697 weights learn against each other in this page, by the losses above. The background is green where the discriminator takes a point for a real one. Grey points are real, violet ones generated.",
    run: "Train", set: "Real points", sets: { ring: "Eight clusters", moons: "Two moons", one: "One cluster" }, share: "Discriminator's rate / generator's", reset: "Forget everything",
    plane: "Plane with real points in grey and generated ones in violet; green where the discriminator says real",
    state: (steps) => `Steps of both: ${steps}`, found: (reached, count, near) => `Clusters with generated points: ${reached} of ${count}. Generated points near one: ${near}%`, shares: (real, made) => `Taken for what they are: ${real}% of the real points, ${made}% of the generated ones`, done: "2,000 steps. Run it again to train on.",
    questions: [
      ["Set the discriminator's rate to 0.1 and train from the start. What happens to the generated points?", "They collapse: nearly all sit in one or two clusters. The generator moves to whatever point looks most real, and the slow discriminator does not take that place away in time. With equal rates it does, and all eight clusters are reached."],
      ["At the end, which share of the points does the discriminator take for what they are?", "About half of them, when the generator is good: real and generated points lie in the same places, and the best answer there is one half."],
      ["Watch the background while you train. Does it come to rest?", "No. Each network changes what the other one should do, so both keep moving, and the points wander within the clusters. No loss tells you when to stop."],
    ],
  },
  ja: {
    about: "読み込みはありません。重み 722 個の生成器と 697 個の識別器が、上の損失でこのページの中で競い合って学習します。背景の緑は、識別器が本物とみなす場所です。灰色が本物の点、紫が生成した点です。",
    run: "学習する", set: "本物の点", sets: { ring: "八つの集まり", moons: "二つの月", one: "一つの集まり" }, share: "識別器の学習率 ÷ 生成器の学習率", reset: "すべて忘れる",
    plane: "平面。灰色が本物の点、紫が生成した点。識別器が本物とみなす場所が緑です",
    state: (steps) => `両方のステップ：${steps}`, found: (reached, count, near) => `生成した点がある集まり：${count} のうち ${reached}。集まりの近くにある生成した点：${near}%`, shares: (real, made) => `正しく見分けられた割合：本物の ${real}%、生成した点の ${made}%`, done: "2,000 歩です。もう一度押すと、続きを学習します。",
    questions: [
      ["識別器の学習率を 0.1 にして、初めから学習してください。生成した点はどうなりますか。", "崩壊します。ほとんどが一つか二つの集まりに集まります。生成器は最も本物らしく見える場所へ動き、遅い識別器はその場所を取り上げるのが間に合いません。学習率が同じなら間に合い、八つの集まりすべてに点が届きます。"],
      ["最後に、識別器が正しく見分けるのはどれくらいですか。", "生成器がうまくいっていれば半分ほどです。本物と生成した点が同じ場所にあり、そこでの最良の答えは二分の一だからです。"],
      ["学習中の背景を見てください。落ち着きますか。", "落ち着きません。一方が変わると、もう一方のすべきことも変わります。どちらも動きつづけ、点は集まりの中をさまよいます。いつ止めればよいかを示す損失はありません。"],
    ],
  },
};

const around = (count, radius) => Array.from({ length: count }, (_, i) => [radius * Math.cos((2 * Math.PI * i) / count), radius * Math.sin((2 * Math.PI * i) / count)]);
const SETS = { // centres of clusters, and their deviation
  ring: [around(8, 1.3), 0.08],
  moons: [Array.from({ length: 32 }, (_, i) => [Math.cos((Math.PI * (i % 16)) / 15) - 0.5, Math.sin((Math.PI * (i % 16)) / 15) - 0.25].map((value) => (i < 16 ? value : -value))), 0.08],
  one: [[[0.8, 0.6]], 0.15],
};
const logistic = (value) => 1 / (1 + Math.exp(-value));
const [RATE, BETAS, BATCH] = [0.005, [0.5, 0.99], 24];

// Both networks, and one step of each.
export class Adversaries {
  constructor(name, seed = 1) {
    this.random = generator(seed);
    [this.centres, this.deviation] = SETS[name];
    this.generator = new SmallNetwork([2, 24, 24, 2], this.random);
    this.discriminator = new SmallNetwork([2, 24, 24, 1], this.random);
    this.steps = 0;
  }

  real({ uniform, normal } = this.random) {
    return this.centres[Math.floor(uniform() * this.centres.length)].map((value) => value + this.deviation * normal());
  }

  made({ normal } = this.random) { return this.generator.forward([normal(), normal()]); }

  verdict(point) { return this.discriminator.forward(point).at(-1)[0]; } // logit of "real"

  step(share = 1) { // of the discriminator's rate in the generator's
    for (let n = 0; n < BATCH; n++) { // -ln D(x) - ln(1 - D(G(z)))
      for (const [point, label] of [[this.real(), 1], [this.made().at(-1), 0]]) {
        const states = this.discriminator.forward(point);
        this.discriminator.backward(states, [(logistic(states.at(-1)[0]) - label) / BATCH]);
      }
    }
    this.discriminator.update(RATE * share, BETAS);
    for (let n = 0; n < BATCH; n++) { // -ln D(G(z)), through the discriminator
      const drawn = this.made();
      const states = this.discriminator.forward(drawn.at(-1));
      this.generator.backward(drawn, this.discriminator.backward(states, [(logistic(states.at(-1)[0]) - 1) / BATCH]));
    }
    this.discriminator.forget();
    this.generator.update(RATE, BETAS);
    this.steps++;
  }

  draw(count, seed = 9) {
    const random = generator(seed);
    return Array.from({ length: count }, () => this.made(random).at(-1));
  }

  // The number of centres with at least 1% of the points near them, and the share of points near any.
  reached(points) {
    const counts = this.centres.map(() => 0);
    for (const [x, y] of points) {
      const apart = this.centres.map((centre) => Math.hypot(x - centre[0], y - centre[1]));
      const nearest = Math.min(...apart);
      if (nearest < 4 * this.deviation) counts[apart.indexOf(nearest)]++;
    }
    return [counts.filter((count) => count >= points.length / 100).length, counts.reduce((sum, count) => sum + count, 0) / points.length];
  }
}

const [STEPS, CELLS] = [2000, 30];

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    const canvas = make("canvas", { class: "live-pad live-still", role: "img", "aria-label": this.text.plane });
    this.plane = new Plane(canvas);
    this.set = choice(this.text.set, Object.entries(this.text.sets), () => this.reset());
    this.share = slider(this.text.share, { min: -4, max: 2, value: 0, show: (power) => String(Number((10 ** (power / 4)).toPrecision(2))) });
    this.lines = ["state", "found", "shares"].map((name) => make("p", { class: `live-${name}` }));
    body.append(canvas, make("div", { class: "live-side" }, this.set.node, this.share.node, make("button", { type: "button", onclick: () => this.reset() }, this.text.reset), ...this.lines));
    this.reset();
  }

  reset() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
    this.model = new Adversaries(this.set.value);
    const random = generator(3);
    this.real = Array.from({ length: 250 }, () => this.model.real(random));
    this.show();
  }

  run() {
    if (this.timer) return;
    this.live.set("running");
    const last = this.model.steps + STEPS;
    this.timer = setInterval(() => {
      for (let i = 0; i < 20; i++) this.model.step(10 ** (this.share.value / 4));
      this.show();
      if (this.model.steps < last) return;
      clearInterval(this.timer);
      this.timer = null;
      this.live.set("done", this.text.done);
    }, 20);
  }

  show() {
    const { model, plane } = this;
    const drawn = model.draw(250);
    const [reached, near] = model.reached(drawn);
    const percent = (points, right) => Math.round((100 * points.filter((point) => right(model.verdict(point))).length) / points.length);
    const texts = [
      this.text.state(model.steps), this.text.found(reached, model.centres.length, Math.round(100 * near)),
      this.text.shares(percent(this.real, (logit) => logit > 0), percent(drawn, (logit) => logit < 0)),
    ];
    texts.forEach((text, i) => { this.lines[i].textContent = text; });
    for (let row = 0; row < CELLS; row++) for (let column = 0; column < CELLS; column++) {
      const share = logistic(model.verdict([(4 * (column + 0.5)) / CELLS - 2, 2 - (4 * (row + 0.5)) / CELLS]));
      plane.pen.fillStyle = `hsl(140 35% ${97 - 25 * share}%)`;
      plane.pen.fillRect((column * plane.side) / CELLS, (row * plane.side) / CELLS, plane.side / CELLS + 1, plane.side / CELLS + 1);
    }
    plane.dots(this.real, "#9e9e9e");
    plane.dots(drawn, "#7b1fa2");
  }
}
