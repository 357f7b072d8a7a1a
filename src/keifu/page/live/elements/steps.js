// One noise, and the pictures that DDIM makes of it in 1 to 16 steps.

import { FIRST } from "../first/steps.js";
import { make, paint, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "digits: a U-Net of 0.7 million weights, trained here on MNIST's handwritten digits. All five pictures start from the same noise.",
    run: "Draw all five", digit: "Digit", guidance: "Guidance", seed: "Seed", steps: (count) => (count === 1 ? "1 step" : `${count} steps`), away: (distance) => `${distance.toFixed(2)} from 16 steps`,
    hint: "The distance is the root of the mean square over all pixels, which go from -1 to 1.",
    questions: [
      ["How many steps does a readable digit need?", "Four for most seeds. With one step only noise comes: at the noisiest level the guess is divided by a number near 0, which enlarges every error of the network."],
      ["By what factor does the distance fall when the steps double?", "For the 3 of seed 1 it goes 1.11, 0.66, 0.32, 0.08: at first about by half, as with the perfect network above, and at last faster, since it is measured from 16 steps and not from the exact end."],
      ["Raise the guidance to 5. Do few steps suffer?", "Hardly: for the 3 of seed 1 the distances are nearly the same, 1.12, 0.72, 0.30. Guidance changes which picture comes, more than how fast."],
    ],
  },
  ja: {
    about: "digits：重み 70 万個の U-Net。MNIST の手書き数字でここで学習しました。五枚とも同じノイズから始まります。",
    run: "五枚を描く", digit: "数字", guidance: "ガイダンス", seed: "シード", steps: (count) => `${count} ステップ`, away: (distance) => `16 ステップとの差 ${distance.toFixed(2)}`,
    hint: "差は、-1 から 1 までの画素すべてについての二乗平均の平方根です。",
    questions: [
      ["読める数字になるには、何ステップ要りますか。", "多くのシードでは 4 ステップです。1 ステップではノイズしか出ません。最もノイズの強いところでは、予想を 0 に近い数で割るので、ネットワークのどんな誤差も大きくなるからです。"],
      ["ステップ数を倍にすると、差は何分の一になりますか。", "シード 1 の 3 では 1.11、0.66、0.32、0.08 です。初めは上の完全なネットワークのようにおよそ半分になり、最後はもっと速く減ります。正確な終点ではなく、16 ステップからの差だからです。"],
      ["ガイダンスを 5 にしてください。少ないステップの絵は悪くなりますか。", "ほとんど変わりません。シード 1 の 3 では、差は 1.12、0.72、0.30 とほぼ同じです。ガイダンスが変えるのは、速さよりも、どんな絵になるかです。"],
    ],
  },
};

const COUNTS = [1, 2, 4, 8, 16];
const SIDE = 28;

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.digit = slider(this.text.digit, { min: 0, max: 9, value: 3 });
    this.guidance = slider(this.text.guidance, { min: 1, max: 6, step: 0.5, value: 2, show: (number) => number.toFixed(1) });
    this.seed = slider(this.text.seed, { min: 1, max: 99, value: 1 });
    this.figures = COUNTS.map((count) => {
      const canvas = make("canvas", { role: "img", "aria-label": this.text.steps(count), class: "live-picture" });
      const away = make("small", {});
      return { canvas, away, node: make("figure", {}, canvas, make("figcaption", {}, this.text.steps(count), make("br"), away)) };
    });
    body.append(make("div", { class: "live-wide live-figures live-strip" }, this.figures.map(({ node }) => node)),
      make("div", { class: "live-side" }, this.digit.node, this.guidance.node, this.seed.node, make("p", { class: "live-hint" }, this.text.hint)));
    this.pictures = FIRST.map((picture) => Float32Array.from(atob(picture), (character) => character.charCodeAt(0) / 127.5 - 1));
    this.pictures.forEach((_, i) => this.show(i));
  }

  async run() {
    const options = { label: this.digit.value, guidance: this.guidance.value, seed: this.seed.value };
    this.pictures = [];
    for (const { away } of this.figures) away.textContent = "";
    for (const [i, steps] of COUNTS.entries()) {
      const look = ({ x }) => paint(this.figures[i].canvas, x, SIDE);
      await this.live.ask("digit", { ...options, steps }, ({ x }) => { this.pictures[i] = x; }, look);
      if (this.live.stopped || !this.pictures[i]) return;
      this.show(i);
    }
    this.pictures.forEach((_, i) => this.show(i));
  }

  show(i) {
    const [{ canvas, away }, picture, last] = [this.figures[i], this.pictures[i], this.pictures[COUNTS.length - 1]];
    paint(canvas, picture, SIDE);
    if (!last || i === COUNTS.length - 1) return;
    away.textContent = this.text.away(Math.sqrt(picture.reduce((sum, value, at) => sum + (value - last[at]) ** 2, 0) / picture.length));
  }
}
