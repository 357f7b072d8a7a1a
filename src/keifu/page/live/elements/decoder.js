// GPT and LLaMA: the probabilities of the next token, sampling settings, attention, heads that can be switched off.

import { FIRST } from "../first/decoder.js";
import { bars, choice, heat, make, percent, slider, visible } from "../ui.js";

export const WORDS = {
  en: {
    about: "gpt-en: 4.3 million weights, trained here on summaries of English Wikipedia, recipes, speeches and conversations. It knows what is usual in such texts, and invents its facts.",
    run: "Next token", write: "Write 30 tokens", input: "Text", temperature: "Temperature", topK: "Top-k (0: all)", topP: "Top-p",
    hint: "Click a token to write it. Light bars: before the settings. Dark bars: what may be drawn.",
    view: "Look at", lens: "The best token after each layer", layer: (layer, head) => `Attention of layer ${layer + 1}, head ${head + 1}`, off: "Switch this head off",
    questions: [
      ["Set the temperature to 0.2 and write 30 tokens twice. Then do the same at 1.5.", "At 0.2 nearly all mass is on the first candidate, and the text soon repeats itself. At 1.5 unlikely tokens come often, and the text falls apart."],
      ["Set top-p to 0.5. How many candidates are left?", "As many as half of the mass needs: 37 after “The city was founded in the”, and one after “He was born in London in the United”."],
      ["Look at the attention of layer 3, head 4. What does this head do? Switch it off.", "It looks at the token before the last one, whatever the text is. Without it the shares move a little: other heads look there too."],
    ],
  },
  ja: {
    about: "gpt-en：重み 430 万個。英語版ウィキペディアの要約、レシピ、演説、会話でここで学習しました。そうした文でよくあることを知っているだけで、事実は作り話です。",
    run: "次のトークン", write: "30 トークン書く", input: "文（英語）", temperature: "温度", topK: "Top-k（0：すべて）", topP: "Top-p",
    hint: "トークンをクリックすると書き足します。薄い棒は設定の前、濃い棒は実際に選ばれうる割合です。",
    view: "見るもの", lens: "各層の後で最良のトークン", layer: (layer, head) => `層 ${layer + 1}、ヘッド ${head + 1} のアテンション`, off: "このヘッドを切る",
    questions: [
      ["温度を 0.2 にして 30 トークンを二度書かせ、次に 1.5 で同じことをしてください。", "0.2 では最初の候補にほぼすべての質量があり、文はすぐに同じことを繰り返します。1.5 ではまれなトークンがよく出て、文が壊れます。"],
      ["Top-p を 0.5 にすると、候補はいくつ残りますか。", "質量の半分に必要な数だけです。「The city was founded in the」の後では 37 個、「He was born in London in the United」の後では一つです。"],
      ["層 3、ヘッド 4 のアテンションを見てください。このヘッドは何をしますか。切ってみてください。", "どんな文でも、最後のトークンの一つ前を見ます。切ると割合は少し動きます。ほかにもそこを見るヘッドがあるからです。"],
    ],
  },
};

const TEXT = "The city was founded in the";

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.off = new Set();
    this.input = make("textarea", { rows: 2, maxlength: 1500, "aria-label": this.text.input, oninput: () => this.run() });
    this.input.value = TEXT;
    const again = () => this.run();
    const two = (number) => number.toFixed(2);
    this.temperature = slider(this.text.temperature, { min: 0, max: 2, step: 0.05, value: 1, onchange: again, show: two });
    this.topK = slider(this.text.topK, { min: 0, max: 50, value: 0, onchange: again });
    this.topP = slider(this.text.topP, { min: 0.05, max: 1, step: 0.05, value: 1, onchange: again, show: two });
    this.write = make("button", { type: "button", class: "live-write", onclick: () => this.generate() }, this.text.write);
    this.found = make("div", {});
    this.inside = make("div", {});
    this.view = choice(this.text.view, [["lens", this.text.lens]], () => this.look());
    const switched = make("input", { type: "checkbox", onchange: () => this.toggle(switched.checked) });
    this.switch = make("label", { class: "live-check", hidden: true }, switched, this.text.off);
    body.append(
      make("div", { class: "live-wide" }, this.input), make("div", { class: "live-side" }, this.found, make("p", { class: "live-hint" }, this.text.hint)),
      make("div", { class: "live-side" }, this.temperature.node, this.topK.node, this.topP.node, this.write, this.view.node, this.switch, this.inside),
    );
    if (live.own) this.last = { tokens: [], attention: [], lens: [] };
    else this.show(FIRST);
  }

  get settings() { return { temperature: this.temperature.value, topK: this.topK.value, topP: this.topP.value }; }

  get heads() { return [...this.off].map((name) => name.split(".").map(Number)); }

  run() {
    return this.live.ask("next", { text: this.input.value, settings: this.settings, off: this.heads }, (found) => this.show(found));
  }

  async generate() {
    if (!this.live.ready && !(await this.live.load())) return;
    const start = this.input.value;
    const seed = Math.floor(2 ** 31 * Math.random());
    const put = ({ text }) => { this.input.value = start + text; };
    await this.live.ask("generate", { text: start, settings: this.settings, maxTokens: 30, seed }, put, put);
    await this.run();
  }

  show(found) {
    this.last = found;
    const list = found.candidates.map(({ text, probability, after }) => ({ text, share: after, ghost: probability }));
    this.found.replaceChildren(bars(list, ({ text }) => this.append(text)));
    if (this.view.select.length === 1) {
      found.attention.forEach((heads, layer) => heads.forEach((_, head) => {
        this.view.select.append(make("option", { value: `${layer}.${head}` }, this.text.layer(layer, head)));
      }));
    }
    this.look();
  }

  append(text) {
    this.input.value += text;
    this.run();
  }

  look() {
    const { tokens, attention, lens } = this.last;
    const name = this.view.value;
    this.switch.hidden = name === "lens";
    this.switch.firstChild.checked = this.off.has(name);
    if (name === "lens") {
      const lines = lens.map(({ text, probability }, layer) => make("li", {}, `${visible(text)} (${percent(probability)})`));
      this.inside.replaceChildren(make("ol", { class: "live-lens" }, lines));
      return;
    }
    const [layer, head] = name.split(".").map(Number);
    this.inside.replaceChildren(heat(tokens, attention[layer][head]));
  }

  toggle(checked) {
    if (checked) this.off.add(this.view.value);
    else this.off.delete(this.view.value);
    this.run();
  }
}
