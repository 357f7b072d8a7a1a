// DDPM: a digit from noise, step by step, with guidance.

import { FIRST } from "../first/digits.js";
import { make, paint, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "digits: a U-Net of 0.7 million weights, trained here on MNIST's handwritten digits. The noise of a seed is this page's, not keifu's.",
    run: "Draw", digit: "Digit", steps: "Steps", guidance: "Guidance", seed: "Seed", now: "Picture with noise", seen: "What the network sees in it", at: "Look at step",
    pair: "Same noise, guidance 1 and 5", state: (step, steps) => `Step ${step} of ${steps}`,
    questions: [
      ["Draw the same digit with 5, 20 and 50 steps. What changes?", "With 5 steps the digit is there, with some dots around it. From about 20 steps on it hardly changes: DDIM follows the same path, in finer steps."],
      ["Set the guidance to 1, then to 5.", "Try an 8 with the seed 2: at 1 it is hard to recognise, at 5 it is clear. Guidance leads away from pictures that could be any digit."],
      ["Look at the first steps. When can you tell which digit it becomes?", "Often after two of 20 steps, in what the network sees. The noisy picture still shows nothing then."],
    ],
  },
  ja: {
    about: "digits：重み 70 万個の U-Net。MNIST の手書き数字でここで学習しました。シードのノイズはこのページのもので、keifu のものとは違います。",
    run: "描く", digit: "数字", steps: "ステップ数", guidance: "ガイダンス", seed: "シード", now: "ノイズの残る絵", seen: "ネットワークがそこに見る絵", at: "見るステップ",
    pair: "同じノイズ、ガイダンス 1 と 5", state: (step, steps) => `${steps} ステップ中 ${step}`,
    questions: [
      ["同じ数字を 5、20、50 ステップで描いてください。何が変わりますか。", "5 ステップでも数字は現れますが、まわりに点が残ります。20 ほどからはほとんど変わりません。DDIM は同じ道をより細かく進むだけです。"],
      ["ガイダンスを 1 に、次に 5 にしてください。", "8 をシード 2 で試してください。1 では読みにくく、5 でははっきりします。ガイダンスは、どの数字でもありうる絵から遠ざけます。"],
      ["最初のステップを見てください。どの数字になるか、いつ分かりますか。", "ネットワークが見る絵では、20 ステップ中 2 ステップで分かることが多くあります。そのとき、ノイズの残る絵にはまだ何も見えません。"],
    ],
  },
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    const classes = Number(live.root.dataset.classes ?? 10);
    this.side = Number(live.root.dataset.side ?? 28);
    this.label = slider(this.text.digit, { min: 0, max: classes - 1, value: Math.min(3, classes - 1) });
    this.steps = slider(this.text.steps, { min: 1, max: 50, value: 20 });
    this.guidance = slider(this.text.guidance, { min: 1, max: 6, step: 0.5, value: 2, show: (number) => number.toFixed(1) });
    this.seed = slider(this.text.seed, { min: 1, max: 99, value: 1 });
    const figure = (caption) => {
      const canvas = make("canvas", { role: "img", "aria-label": caption, class: "live-picture" });
      return { canvas, node: make("figure", {}, canvas, make("figcaption", {}, caption)) };
    };
    [this.now, this.seen] = [this.text.now, this.text.seen].map(figure);
    this.at = make("input", { type: "range", min: 1, max: 1, value: 1, "aria-label": this.text.at, oninput: () => this.look(Number(this.at.value)) });
    this.state = make("p", { class: "live-state" });
    this.pair = make("div", { class: "live-figures" });
    const both = make("button", { type: "button", onclick: () => this.compare() }, this.text.pair);
    body.append(make("div", { class: "live-side" }, make("div", { class: "live-figures" }, this.now.node, this.seen.node), this.at, this.state),
      make("div", { class: "live-side" }, this.label.node, this.steps.node, this.guidance.node, this.seed.node, both, this.pair));
    const bytes = Uint8Array.from(atob(FIRST), (character) => character.charCodeAt(0));
    const picture = Float32Array.from(bytes, (byte) => byte / 127.5 - 1);
    this.history = live.own ? [] : [{ x: picture, picture, done: 20, steps: 20 }];
    this.label.node.hidden = classes < 1;
    this.look(1);
  }

  options(guidance = this.guidance.value) {
    return { label: Math.max(0, this.label.value), steps: this.steps.value, guidance, seed: this.seed.value };
  }

  run() {
    this.history = [];
    const keep = (state) => {
      this.history.push(state);
      this.at.max = this.at.value = this.history.length;
      this.look(this.history.length);
    };
    return this.live.ask("digit", this.options(), (last) => { if (this.history.at(-1)?.done !== last.done) keep(last); }, keep);
  }

  look(number) {
    if (!this.history.length) return;
    const { x, picture, done, steps } = this.history[number - 1];
    paint(this.now.canvas, x, this.side);
    paint(this.seen.canvas, picture, this.side);
    this.state.textContent = this.text.state(done, steps);
  }

  async compare() {
    if (!this.live.ready && !(await this.live.load())) return;
    if (this.live.busy) return;
    this.pair.replaceChildren();
    for (const guidance of [1, 5]) {
      await this.live.ask("digit", this.options(guidance), ({ x }) => {
        const canvas = make("canvas", { role: "img", "aria-label": `${this.text.guidance} ${guidance}`, class: "live-picture" });
        paint(canvas, x, this.side);
        this.pair.append(make("figure", {}, canvas, make("figcaption", {}, `${this.text.guidance} ${guidance}`)));
      });
    }
  }
}
