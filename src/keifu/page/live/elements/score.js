// Scores, SDE and ODE: a small network learns the score of points in two classes, and draws with it. Nothing is loaded.

import { Plane, SmallNetwork, generator } from "../small_network.js";
import { choice, make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: a network of 2,930 weights learns the score of noisy points by denoising, for every level of noise and with or without the class. Brown arrows are its score at the level of the slider, grey ones the exact score, both times σ and shortened. Coloured points are drawn with it.",
    run: "Learn", set: "Points", sets: { moons: "Two moons", spiral: "Spiral", clusters: "Eight clusters" }, way: "Sampler", ways: { sde: "SDE (fresh noise)", ode: "ODE (DDIM)" },
    steps: "Steps of the sampler", guidance: "Guidance", noise: "σ of the arrows", reset: "Forget everything",
    plane: "Plane with exact points in grey, drawn points in a colour for each class, and arrows of the learned and the exact score",
    state: (steps, loss) => `Steps: ${steps}${loss === null ? "" : `, mean loss of the last 100: ${loss.toFixed(3)}`}`, away: (share) => `Drawn points off their class: ${share}%`, done: "3,000 steps. Run it again to train on.",
    questions: [
      ["Set the steps to 3, then to 40, for the SDE and for the ODE. What is different?", "With 3 steps the SDE scatters its points, most of them out of the picture, because a long step adds much fresh noise; the ODE is near the moons already. With 40 steps both draw nearly the same distribution, though the ODE moves each noise to one point, and the SDE to another one each time."],
      ["Choose the ODE, and raise the guidance to 2 and then to 6. Where do the points go?", "Away from the other class: the difference of the two scores is the gradient of the logarithm of the probability that a point is of its class. At 2 hardly any point is nearer to the other moon, and they vary less. At 6 many overshoot and leave their own moon."],
      ["Lower σ of the arrows. Where do the brown ones differ from the grey ones?", "Far from all points, where the network has seen no noisy point of that level, and in the gaps between the classes, where the score turns within a short distance."],
    ],
  },
  ja: {
    about: "読み込みはありません。重み 2,930 個のネットワークが、ノイズの載った点のスコアを、あらゆる強さのノイズについて、クラスありとなしの両方で学習します。茶色の矢印は、つまみで選んだ強さでのスコア、灰色は正確なスコアです。どちらも σ 倍し、短く描いています。色のついた点は、このスコアで生成したものです。",
    run: "学習する", set: "点", sets: { moons: "二つの月", spiral: "渦巻き", clusters: "八つの集まり" }, way: "サンプラー", ways: { sde: "SDE（ノイズを足す）", ode: "ODE（DDIM）" },
    steps: "サンプラーのステップ数", guidance: "ガイダンス", noise: "矢印の σ", reset: "すべて忘れる",
    plane: "平面。灰色が正確な点、クラスごとの色が生成した点で、学習したスコアと正確なスコアの矢印があります",
    state: (steps, loss) => `${steps} 歩${loss === null ? "" : `、最近 100 歩の平均損失 ${loss.toFixed(3)}`}`, away: (share) => `自分のクラスから外れた点：${share}%`, done: "3,000 歩です。もう一度押すと、続きを学習します。",
    questions: [
      ["ステップ数を 3 にし、次に 40 にして、SDE と ODE を比べてください。何が違いますか。", "3 ステップの SDE では点が散らばり、ほとんどが絵の外に出ます。長い一歩では、足すノイズも多いからです。ODE はもう月の近くにあります。40 ステップでは、二つはほぼ同じ分布を描きます。ただし ODE は一つのノイズを一つの点に移し、SDE は毎回別の点に移します。"],
      ["ODE を選び、ガイダンスを 2 に、次に 6 に上げてください。点はどこへ行きますか。", "もう一方のクラスから離れます。二つのスコアの差は、点がそのクラスである確率の対数の勾配だからです。2 では、もう一方の月に近い点はほとんどなくなり、多様さも減ります。6 では、多くの点が行き過ぎて、自分の月から外れます。"],
      ["矢印の σ を下げてください。茶色と灰色の矢印が違うのはどこですか。", "その強さのノイズでは学習中に点が来なかった、遠い場所と、スコアの向きが急に変わるクラスの間です。"],
    ],
  },
};

const circle = (i, of, radius = 1) => [radius * Math.cos((2 * Math.PI * i) / of), radius * Math.sin((2 * Math.PI * i) / of)];
const arms = (count, place) => Array.from({ length: 2 * count }, (_, i) => [...place((i % count) + 0.5).map((value) => (i < count ? value : -value)), i < count ? 0 : 1]);
const MEANS = { // x, y and class of each normal distribution, and the deviation of all: those of data/classification/points.py
  moons: [0.1, arms(32, (i) => [Math.cos((Math.PI * i) / 32) - 0.5, Math.sin((Math.PI * i) / 32) - 0.25])],
  spiral: [0.05, arms(48, (i) => circle(1.25 * (0.1 + 0.9 * Math.sqrt(i / 48)), 1, 1.4 * (0.1 + 0.9 * Math.sqrt(i / 48))))],
  clusters: [0.15, Array.from({ length: 8 }, (_, i) => [...circle(i, 8, 1.2), i % 2])],
};
const NONE = 2; // label of no class

// Equally probable normal distributions, whose score is known.
export class Mixture {
  constructor(name) { [this.deviation, this.means] = MEANS[name]; }

  draw({ uniform, normal }) {
    const [x, y, label] = this.means[Math.floor(uniform() * this.means.length)];
    return [x + this.deviation * normal(), y + this.deviation * normal(), label];
  }

  score([x, y], sigma, label = NONE) {
    const variance = this.deviation ** 2 + sigma ** 2;
    const means = this.means.filter((mean) => label === NONE || mean[2] === label);
    const logits = means.map((mean) => -((x - mean[0]) ** 2 + (y - mean[1]) ** 2) / (2 * variance));
    const most = Math.max(...logits);
    const weights = logits.map((logit) => Math.exp(logit - most));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return [x, y].map((value, k) => (weights.reduce((sum, weight, i) => sum + weight * means[i][k], 0) / total - value) / variance);
  }

  far([x, y, label]) { // whether a point is off its class
    return this.means.every((mean) => mean[2] !== label || Math.hypot(x - mean[0], y - mean[1]) > 3 * this.deviation);
  }
}

const [LEAST, MOST] = [0.03, 10]; // levels of noise

// A network that learns the score of a mixture from its points.
export class ScoreModel {
  constructor(name, seed = 1) {
    this.random = generator(seed);
    this.mixture = new Mixture(name);
    this.network = new SmallNetwork([9, 48, 48, 2], this.random);
    this.steps = 0;
    this.losses = [];
  }

  forward([x, y], sigma, label) {
    const [factor, level] = [3 / Math.sqrt(1 + sigma ** 2), Math.log(sigma) / 2];
    return this.network.forward([factor * x, factor * y, level, ...[1, 2].flatMap((n) => [Math.sin(n * level), Math.cos(n * level)]), +(label === 0), +(label === 1)]);
  }

  score(x, sigma, label = NONE) { return this.forward(x, sigma, label).at(-1).map((noise) => -noise / sigma); }

  // Classifier-free guidance: a sum of two scores.
  guided(x, sigma, label, guidance) {
    const [score, without] = [this.score(x, sigma, label), guidance === 1 ? [0, 0] : this.score(x, sigma)];
    return score.map((value, k) => guidance * value + (1 - guidance) * without[k]);
  }

  step(batch = 48, rate = 0.008 / Math.sqrt(1 + this.steps / 300)) { // longer steps first
    const { uniform, normal } = this.random;
    let loss = 0;
    for (let n = 0; n < batch; n++) {
      const [x, y, label] = this.mixture.draw(this.random);
      const [sigma, noise] = [LEAST * (MOST / LEAST) ** uniform(), [normal(), normal()]];
      const states = this.forward([x + sigma * noise[0], y + sigma * noise[1]], sigma, uniform() < 0.3 ? NONE : label);
      const difference = states.at(-1).map((value, k) => value - noise[k]); // σ times the error of the score
      loss += (difference[0] ** 2 + difference[1] ** 2) / (2 * batch);
      this.network.backward(states, difference.map((value) => value / batch));
    }
    this.network.update(rate);
    this.steps++;
    this.losses = [...this.losses.slice(-99), loss];
  }

  // Points of both classes from noise: by the reverse SDE, or by the ODE in σ.
  draw(count, steps, way, guidance = 1, seed = 7) {
    const { normal } = generator(seed);
    const sigmas = [...Array.from({ length: steps }, (_, i) => MOST * (LEAST / MOST) ** (i / Math.max(1, steps - 1))), 0];
    return Array.from({ length: count }, (_, n) => {
      let x = [MOST * normal(), MOST * normal()];
      for (let i = 0; i < steps; i++) {
        const [sigma, next] = [sigmas[i], sigmas[i + 1]];
        const score = this.guided(x, sigma, n % 2, guidance);
        const variance = sigma ** 2 - next ** 2;
        if (way === "ode") x = x.map((value, k) => value + (sigma - next) * sigma * score[k]);
        else x = x.map((value, k) => value + variance * score[k] + (next ? Math.sqrt(variance) * normal() : 0));
      }
      return [...x, n % 2];
    });
  }
}

const COLOURS = ["#1565c0", "#e65100"];
const STEPS = 3000;

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    const canvas = make("canvas", { class: "live-pad live-still", role: "img", "aria-label": this.text.plane });
    this.plane = new Plane(canvas);
    const draw = () => this.show(true);
    this.set = choice(this.text.set, Object.entries(this.text.sets), () => this.reset());
    this.way = choice(this.text.way, Object.entries(this.text.ways), draw);
    this.steps = slider(this.text.steps, { min: 1, max: 60, value: 30, onchange: draw });
    this.guidance = slider(this.text.guidance, { min: 0, max: 6, step: 0.5, value: 1, onchange: draw });
    this.noise = slider(this.text.noise, { min: -9, max: 6, value: -2, show: (power) => (10 ** (power / 6)).toFixed(2), onchange: () => this.show(false) });
    this.state = make("p", { class: "live-state" });
    this.away = make("p", { class: "live-away" });
    const sides = [this.set, this.way, this.steps, this.guidance, this.noise].map(({ node }) => node);
    body.append(canvas, make("div", { class: "live-side" }, ...sides, make("button", { type: "button", onclick: () => this.reset() }, this.text.reset), this.state, this.away));
    this.reset();
  }

  reset() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
    this.model = new ScoreModel(this.set.value);
    const random = generator(3);
    this.shown = Array.from({ length: 400 }, () => this.model.mixture.draw(random));
    this.show(true);
  }

  run() {
    if (this.timer) return;
    this.live.set("running");
    const last = this.model.steps + STEPS;
    this.timer = setInterval(() => {
      for (let i = 0; i < 40; i++) this.model.step();
      const finished = this.model.steps >= last;
      this.show(finished || this.model.steps % 400 === 0);
      if (!finished) return;
      clearInterval(this.timer);
      this.timer = null;
      this.live.set("done", this.text.done);
    }, 20);
  }

  // Draw the plane; `anew`: with points from the sampler, which take longer than the arrows.
  show(anew) {
    const { steps, losses, mixture } = this.model;
    if (anew) this.drawn = this.model.draw(300, this.steps.value, this.way.value, this.guidance.value);
    this.state.textContent = this.text.state(steps, losses.length ? losses.reduce((sum, loss) => sum + loss, 0) / losses.length : null);
    this.away.textContent = this.text.away(Math.round((100 * this.drawn.filter((point) => mixture.far(point)).length) / this.drawn.length));
    this.plane.clear();
    this.plane.dots(this.shown, "#ddd");
    const sigma = 10 ** (this.noise.value / 6);
    for (let x = -1.75; x < 2; x += 0.5) for (let y = -1.75; y < 2; y += 0.5) {
      for (const [score, colour] of [[mixture.score([x, y], sigma), "#9e9e9e"], [this.model.score([x, y], sigma), "#6d4c41"]]) {
        const length = Math.hypot(...score) * sigma + 1;
        this.plane.arrow([x, y], [x + (score[0] * sigma * 0.42) / length, y + (score[1] * sigma * 0.42) / length], colour);
      }
    }
    for (const label of [0, 1]) this.plane.dots(this.drawn.filter((point) => point[2] === label), COLOURS[label]);
  }
}
