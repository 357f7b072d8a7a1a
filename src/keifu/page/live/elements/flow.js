// A flow between noise and points of a plane: a small network is trained in the page, and draws in 1, 2, 4 and 8 steps.

import { Plane, SmallNetwork, generator, shapePoints } from "../small_network.js";
import { choice, make } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: a network of 2,690 weights learns the flow, noise minus point, by the loss above, in this page. keifu packages no diffusion Transformer; a point has two numbers, and a picture many, but noise, line and Euler steps are the same.",
    run: "Learn", sets: { ring: "Ring", clusters: "Four clusters", line: "Wave" }, set: "Points", reset: "Forget everything", straighten: "Straighten the paths",
    steps: (count) => (count === 1 ? "1 step" : `${count} steps`), away: (distance) => `${distance.toFixed(2)} from the points`, first: "Learn first, then straighten.",
    plane: "Training points in grey, drawn points in green, and the paths of a few of them",
    state: (steps, loss) => `Steps: ${steps}${loss === null ? "" : `, mean loss of the last 100: ${loss.toFixed(3)}`}`, done: "2,000 steps. Run it again to train on.",
    questions: [
      ["Where do the points go in one step?", "Near the mean of all training points, wherever they start: at the time 1 there is only noise, and from noise every point is a possible aim. The network answers with the mean of all directions."],
      ["How many steps does the ring need?", "About eight. For the ring the mean distance to the nearest training point is 0.64 after one step, then 0.51, 0.19 and 0.12; 64 steps reach 0.09. The paths are curved, because the best direction changes on the way, and a long step leaves the curve."],
      ["Press “Straighten the paths”. What happens to one step?", "One step is enough: the distance falls from 0.64 to 0.10. The network learned again, from pairs of a noise and the point at which its own path ended. The lines of such pairs hardly cross, so it can follow them in one step (rectified flow: Liu et al., 2022)."],
    ],
  },
  ja: {
    about: "読み込みはありません。重み 2,690 個のネットワークが、フロー「ノイズ − 点」を、上の損失でこのページの中で学習します。keifu に付属の拡散 Transformer はありません。点の数値は二つ、画像の数値は多数ですが、ノイズ、直線、オイラー法のステップは同じです。",
    run: "学習する", sets: { ring: "輪", clusters: "四つの集まり", line: "波" }, set: "点", reset: "すべて忘れる", straighten: "経路をまっすぐにする",
    steps: (count) => `${count} ステップ`, away: (distance) => `点までの距離 ${distance.toFixed(2)}`, first: "先に学習させてから、まっすぐにしてください。",
    plane: "灰色が学習用の点、緑が生成した点で、いくつかの経路を線で示します",
    state: (steps, loss) => `${steps} 歩${loss === null ? "" : `、最近 100 歩の平均損失 ${loss.toFixed(3)}`}`, done: "2,000 歩です。もう一度押すと、続きを学習します。",
    questions: [
      ["1 ステップでは、点はどこへ行きますか。", "どこから始めても、学習用の点全体の平均の近くです。時刻 1 にはノイズしかなく、ノイズからはどの点にも行けるので、ネットワークはすべての向きの平均を答えます。"],
      ["輪には何ステップ要りますか。", "八つほどです。輪では、いちばん近い学習用の点までの平均距離が、1 ステップで 0.64、続いて 0.51、0.19、0.12 で、64 ステップでは 0.09 です。よい向きは途中で変わるので経路は曲がり、長いステップは曲線から外れます。"],
      ["「経路をまっすぐにする」を押してください。1 ステップの結果はどうなりますか。", "1 ステップで足りるようになり、距離は 0.64 から 0.10 に減ります。ネットワークは、ノイズと、自分の経路がそこから着いた点との組で学び直しました。その組を結ぶ線はほとんど交わらないので、一歩でたどれます（整流フロー：Liu et al., 2022）。"],
    ],
  },
};

const COUNTS = [1, 2, 4, 8];
const GREEN = "#00897b";

// A network that predicts noise minus point at a time between 0 (points) and 1 (noise), and what it learns from.
export class Flow {
  constructor(shape, seed = 1) {
    this.random = generator(seed);
    this.points = shapePoints(shape, 200, this.random);
    this.network = new SmallNetwork([4, 48, 48, 2], this.random);
    this.pairs = null; // of noise and a point, once the paths are to be straight
    this.forget();
  }

  forget() { [this.steps, this.losses] = [0, []]; }

  forward([x, y], t) { return this.network.forward([x, y, t, Math.cos(Math.PI * t)]); }

  step(batch = 48, rate = 0.006 / Math.sqrt(1 + this.steps / 300)) { // longer steps first
    let loss = 0;
    const any = (list) => list[Math.floor(this.random.uniform() * list.length)];
    for (let n = 0; n < batch; n++) {
      const [noise, point] = this.pairs ? any(this.pairs) : [[this.random.normal(), this.random.normal()], any(this.points)];
      const t = this.random.uniform();
      const states = this.forward(point.map((value, i) => (1 - t) * value + t * noise[i]), t);
      const difference = states.at(-1).map((value, i) => value - (noise[i] - point[i]));
      loss += (difference[0] ** 2 + difference[1] ** 2) / (2 * batch);
      this.network.backward(states, difference.map((value) => value / batch));
    }
    this.network.update(rate);
    this.steps++;
    this.losses = [...this.losses.slice(-99), loss];
  }

  // The path of a point from noise, in Euler steps: the noise, and where it is after each step.
  path(noise, steps) {
    const path = [noise];
    for (let step = steps; step > 0; step--) {
      const x = path.at(-1);
      const flow = this.forward(x, step / steps).at(-1);
      path.push(x.map((value, i) => value - flow[i] / steps));
    }
    return path;
  }

  draw(count, steps, seed = 7) {
    const { normal } = generator(seed);
    return Array.from({ length: count }, () => this.path([normal(), normal()], steps));
  }

  // Learn from the ends of the flow's own paths from now on (Liu et al., 2022): these pairs cross less than chance ones.
  straighten() {
    this.pairs = this.draw(1000, 30, 11).map((path) => [path[0], path.at(-1)]);
    this.forget();
  }

  // The mean distance of drawn points to the nearest training point.
  away(drawn) {
    const nearest = ([x, y]) => Math.min(...this.points.map(([a, b]) => Math.hypot(a - x, b - y)));
    return drawn.reduce((sum, point) => sum + nearest(point) / drawn.length, 0);
  }
}

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.shape = choice(this.text.set, Object.entries(this.text.sets), () => this.reset());
    this.state = make("p", { class: "live-state" });
    this.figures = COUNTS.map((count) => {
      const canvas = make("canvas", { class: "live-picture", role: "img", "aria-label": `${this.text.steps(count)}. ${this.text.plane}` });
      const away = make("small", {});
      return { count, away, plane: new Plane(canvas, 200), node: make("figure", {}, canvas, make("figcaption", {}, this.text.steps(count), make("br"), away)) };
    });
    const button = (text, onclick) => make("button", { type: "button", onclick }, text);
    body.append(make("div", { class: "live-wide live-figures" }, this.figures.map(({ node }) => node)),
      make("div", { class: "live-side" }, this.shape.node, button(this.text.straighten, () => this.straighten()), button(this.text.reset, () => this.reset()), this.state, make("p", { class: "live-hint" }, this.text.plane)));
    this.reset();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  reset() {
    this.stop();
    if (this.live.root.dataset.state) this.live.set("idle");
    this.model = new Flow(this.shape.value);
    this.show();
  }

  straighten() {
    if (this.timer) return;
    if (!this.model.pairs && this.model.steps < 500) {
      this.live.set("done", this.text.first);
      return;
    }
    this.model.straighten();
    this.run();
  }

  run() {
    if (this.timer) return;
    this.live.set("running");
    const last = this.model.steps + 2000;
    this.timer = setInterval(() => {
      for (let i = 0; i < 40; i++) this.model.step();
      this.show();
      if (this.model.steps < last) return;
      this.stop();
      this.live.set("done", this.text.done);
    }, 20);
  }

  show() {
    const { steps, losses, points } = this.model;
    this.state.textContent = this.text.state(steps, losses.length ? losses.reduce((sum, loss) => sum + loss, 0) / losses.length : null);
    for (const { count, plane, away } of this.figures) {
      const paths = this.model.draw(150, count);
      const ends = paths.map((path) => path.at(-1));
      plane.clear();
      plane.dots(points, "#bbb");
      for (const path of paths.slice(0, 12)) plane.line(path, "#ef6c00");
      plane.dots(ends, GREEN);
      away.textContent = this.text.away(this.model.away(ends));
    }
  }
}
