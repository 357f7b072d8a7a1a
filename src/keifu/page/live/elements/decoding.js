// Four ways to draw the next token from one distribution, side by side, and a text that each of them writes.

import { FIRST } from "../first/decoding.js";
import { bars, make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "gpt-en: 4.3 million weights, trained here on summaries of English Wikipedia, recipes, speeches and conversations. All four see the same probabilities, and draw with the same random numbers.",
    run: "Compare", input: "Text", rest: "all others", write: "Write 30 tokens with each", names: { temperature: "Temperature", topK: "Top-k", topP: "Top-p", minP: "Min-p" },
    hint: "Light bars: before the setting. Dark bars: what may be drawn.",
    questions: [
      ["Which of the four can remove a candidate?", "Top-k, top-p and min-p. A temperature above 0 changes all shares and removes none, so nonsense can always be drawn."],
      ["Write “He was born in London in the United”. How many candidates do top-k 5 and top-p 0.9 leave?", "Top-k leaves five, whether the model is sure or not. Top-p leaves one, “ States”, since it alone has 0.96 of the mass."],
      ["Let each write 30 tokens with the temperature at 0.", "The first text is the greedy one: the likeliest token each time, with no chance. It repeats itself: “city of the city of the city”. The other three draw at temperature 1, and do not get caught in such a loop."],
    ],
  },
  ja: {
    about: "gpt-en：重み 430 万個。英語版ウィキペディアの要約、レシピ、演説、会話でここで学習しました。四つとも同じ確率を受け取り、同じ乱数で選びます。",
    run: "比べる", input: "文（英語）", rest: "残りすべて", write: "それぞれ 30 トークン書く", names: { temperature: "温度", topK: "Top-k", topP: "Top-p", minP: "Min-p" },
    hint: "薄い棒は設定の前、濃い棒は実際に選ばれうる割合です。",
    questions: [
      ["四つのうち、候補を消せるのはどれですか。", "Top-k、Top-p、Min-p です。0 より大きい温度は割合を変えるだけで何も消さないので、でたらめな語がいつでも選ばれえます。"],
      ["「He was born in London in the United」と書いてください。Top-k 5 と Top-p 0.9 では、候補がいくつ残りますか。", "Top-k では、モデルに確信があってもなくても五つです。Top-p では「 States」一つです。それだけで質量の 0.96 があるからです。"],
      ["温度を 0 にして、それぞれに 30 トークン書かせてください。", "一つ目は貪欲法の文です。毎回、最も確率の高いトークンを選び、偶然が入りません。「city of the city of the city」と同じことを繰り返します。ほかの三つは温度 1 で選ぶので、そうした輪に捕まりません。"],
    ],
  },
};

const TEXT = "The city was founded in the";
const two = (number) => number.toFixed(2);
const SLIDERS = {
  temperature: { min: 0, max: 2, step: 0.05, value: 0.7, show: two },
  topK: { min: 1, max: 50, value: 5 },
  topP: { min: 0.05, max: 1, step: 0.05, value: 0.9, show: two },
  minP: { min: 0, max: 0.5, step: 0.01, value: 0.1, show: two },
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.input = make("textarea", { rows: 2, maxlength: 1500, lang: "en", "aria-label": this.text.input, oninput: () => this.run() });
    this.input.value = TEXT;
    this.ways = Object.entries(SLIDERS).map(([name, options]) => {
      const control = slider(this.text.names[name], { ...options, onchange: () => this.run() });
      const [found, written] = [make("div", {}), make("p", { lang: "en", "aria-live": "polite" })];
      return { name, control, found, written, node: make("div", { class: "live-side" }, control.node, found, written) };
    });
    const write = make("button", { type: "button", onclick: () => this.write() }, this.text.write);
    body.append(make("div", { class: "live-wide" }, this.input), ...this.ways.map(({ node }) => node), make("div", { class: "live-wide" }, make("p", { class: "live-hint" }, this.text.hint), write));
    this.show(FIRST);
  }

  get settings() { return this.ways.map(({ name, control }) => ({ [name]: control.value })); }

  run() {
    return this.live.ask("next", { text: this.input.value, settings: this.settings }, (found) => this.show(found));
  }

  show({ candidates }) {
    this.ways.forEach(({ found }, way) => {
      const shares = candidates.slice(0, 8).map(({ text, probability, after, others }) => ({ text, ghost: probability, share: [after, ...others][way] }));
      const rest = (name) => Math.max(0, 1 - shares.reduce((sum, each) => sum + each[name], 0));
      found.replaceChildren(bars([...shares, { text: this.text.rest, ghost: rest("ghost"), share: rest("share") }]));
    });
  }

  // A slider that was just moved is still being answered: write after it.
  async write() {
    if (this.writing) return;
    this.writing = true;
    try {
      if (!this.live.ready && !(await this.live.load())) return;
      while (this.live.busy) await new Promise((done) => setTimeout(done, 20));
      await this.writeAll();
    } finally {
      this.writing = false;
    }
  }

  async writeAll() {
    this.live.stopped = false;
    const [settings, seed] = [this.settings, Math.floor(2 ** 31 * Math.random())];
    for (const { written } of this.ways) written.textContent = "";
    for (const [way, { written }] of this.ways.entries()) {
      const put = ({ text }) => { written.textContent = `…${text}`; };
      await this.live.ask("generate", { text: this.input.value, settings: settings[way], maxTokens: 30, seed }, put, put);
      if (this.live.stopped || this.live.root.dataset.state === "error") return;
    }
    await this.run();
  }
}
