// Latent diffusion: a picture from words, the latent and what the autoencoder makes of it.

import { choice, make, paint, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "emoji: an autoencoder, a U-Net and a text tower with 3.3 million weights together, trained here on emoji of Twemoji (CC BY 4.0). Shapes are often wrong.",
    run: "Draw", input: "Name of an emoji", steps: "Steps", guidance: "Guidance", seed: "Seed", latent: "Latent, first three of four channels", picture: "Picture",
    state: (step, steps) => `Step ${step} of ${steps}`, examples: ["red heart", "grinning face", "cat face", "blue circle"], list: "Examples",
    questions: [
      ["Compare the latent with the picture. What can you recognise in the latent?", "Its outline: a latent has 16 × 16 positions, each for 4 × 4 pixels. Its four channels are no colours; the autoencoder turns them into colours."],
      ["Draw “red heart” with guidance 1, and then with 7.5.", "With 1 the text has little influence, and the shape may be anything. 7.5 is the usual guidance of latent diffusion."],
      ["Ask for something that is no emoji, such as “green apple tree on the moon”.", "You get green and brown shapes: it knows the colours of words better than their forms."],
    ],
  },
  ja: {
    about: "emoji：オートエンコーダー、U-Net、テキストエンコーダーで合わせて重み 330 万個。Twemoji の絵文字（CC BY 4.0）でここで学習しました。形はよく間違えます。",
    run: "描く", input: "絵文字の名前", steps: "ステップ数", guidance: "ガイダンス", seed: "シード", latent: "潜在表現（四つのうち最初の三チャンネル）", picture: "絵",
    state: (step, steps) => `${steps} ステップ中 ${step}`, examples: ["red heart", "grinning face", "cat face", "blue circle"], list: "例",
    questions: [
      ["潜在表現と絵を比べてください。潜在表現に何が見えますか。", "輪郭です。潜在表現は 16 × 16 の位置からなり、一つが 4 × 4 画素に当たります。四つのチャンネルは色ではなく、オートエンコーダーが色にします。"],
      ["「red heart」をガイダンス 1 と 7.5 で描いてください。", "1 では文の影響が弱く、どんな形にもなりえます。7.5 は潜在拡散でよく使われる値です。"],
      ["絵文字にないもの、たとえば「green apple tree on the moon」を頼んでください。", "緑や茶色の形が出ます。語の形よりも色をよく知っているからです。"],
    ],
  },
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.input = make("input", { type: "text", maxlength: 100, value: this.text.examples[0], "aria-label": this.text.input });
    this.input.addEventListener("keydown", ({ key, isComposing }) => { if (key === "Enter" && !isComposing && !live.busy) live.click(); });
    const examples = choice(this.text.list, this.text.examples.map((name) => [name, name]), (name) => { this.input.value = name; });
    this.steps = slider(this.text.steps, { min: 4, max: 50, value: 20 });
    this.guidance = slider(this.text.guidance, { min: 1, max: 12, step: 0.5, value: 7.5, show: (number) => number.toFixed(1) });
    this.seed = slider(this.text.seed, { min: 1, max: 99, value: 1 });
    const figure = (caption) => {
      const canvas = make("canvas", { role: "img", "aria-label": caption, class: "live-picture" });
      return { canvas, node: make("figure", {}, canvas, make("figcaption", {}, caption)) };
    };
    [this.latent, this.picture] = [this.text.latent, this.text.picture].map(figure);
    this.state = make("p", { class: "live-state", "aria-live": "polite" });
    body.append(make("div", { class: "live-side" }, this.input, make("div", { class: "live-figures" }, this.latent.node, this.picture.node), this.state),
      make("div", { class: "live-side" }, examples.node, this.steps.node, this.guidance.node, this.seed.node));
    const noise = Float32Array.from({ length: 1024 }, (_, i) => 0.6 * Math.sin(i * i)); // a first frame that is no picture yet
    paint(this.latent.canvas, noise, 16, 4);
    paint(this.picture.canvas, new Float32Array(64 * 64).fill(0.8), 64);
  }

  run() {
    const show = ({ latents, pixels, side, channels, done, steps }) => {
      this.state.textContent = this.text.state(done, steps);
      if (!pixels) return;
      paint(this.latent.canvas, latents.map((value) => value / 2), side, channels);
      paint(this.picture.canvas, pixels, Math.sqrt(pixels.length / 3), 3);
    };
    const options = { text: this.input.value, steps: this.steps.value, guidance: this.guidance.value, seed: this.seed.value };
    return this.live.ask("emoji", options, show, show);
  }
}
