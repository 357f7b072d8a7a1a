// Greedy decoding, beam search and nucleus sampling on one prompt, and the probability of each text.

import { FIRST } from "../first/search.js";
import { make, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "gpt-en: 4.3 million weights, trained here on summaries of English Wikipedia, recipes, speeches and conversations. Each text has at most 30 tokens, and ends earlier if the model writes its end. ln P is the logarithm of the text's probability, with its end if it has one.",
    run: "Write three times", input: "Text", names: { greedy: "Greedy", beam: "Beam search", nucleus: "Nucleus sampling" }, beams: "Beams", topP: "Top-p", seed: "Seed",
    score: (logP, ended) => `ln P = ${logP.toFixed(1)}${ended ? ", ended by itself" : ""}`,
    questions: [
      ["Which of the three finds the likeliest text, and which the most natural?", "Beam search finds the likeliest one. After “The city was founded in the” its text has ln P = -4.4, the greedy one -39.7. What people write is much less likely than that: nucleus sampling comes nearer to it, with values such as -45 or -86."],
      ["Raise the beams from 2 to 8 for “The recipe needs”. What happens to the text?", "It becomes shorter: from four beams on it is only a full stop. Each token costs probability, so the likeliest text of all is often a very short one (Stahlberg and Byrne, 2019). In translation the source says what is still missing, and beams help."],
      ["Why does the greedy text repeat “city of the”?", "Each time it takes the likeliest next token, and having written “city of the” once makes it likelier the next time. A search over whole texts sees that stopping would have been likelier."],
    ],
  },
  ja: {
    about: "gpt-en：重み 430 万個。英語版ウィキペディアの要約、レシピ、演説、会話でここで学習しました。どの文も最長 30 トークンで、モデルが終わりを書けば、そこで終わります。ln P は文の確率の対数で、自分で終わった文では終わりのトークンも含みます。",
    run: "三通りに書く", input: "文（英語）", names: { greedy: "貪欲法", beam: "ビーム探索", nucleus: "Nucleus サンプリング" }, beams: "ビーム数", topP: "Top-p", seed: "シード",
    score: (logP, ended) => `ln P = ${logP.toFixed(1)}${ended ? "、自分で終わった" : ""}`,
    questions: [
      ["最も確率の高い文を見つけるのはどれで、最も自然な文を書くのはどれですか。", "確率が最も高いのはビーム探索です。「The city was founded in the」の後では ln P = -4.4 で、貪欲法では -39.7 です。人の書く文の確率はそれよりずっと低く、-45 や -86 になる Nucleus サンプリングのほうが近いものです。"],
      ["「The recipe needs」でビーム数を 2 から 8 に増やしてください。文はどうなりますか。", "短くなり、四つからはピリオドだけになります。トークンを書くたびに確率が下がるので、全体で最も確率の高い文は、しばしばとても短いのです（Stahlberg and Byrne, 2019）。翻訳では、まだ足りないものを原文が示すので、ビームが役に立ちます。"],
      ["貪欲法の文は、なぜ「city of the」を繰り返すのですか。", "毎回いちばん確率の高い次のトークンを選び、「city of the」を一度書くと、次もその確率が上がるからです。文全体を探せば、そこで終わるほうが確率が高いと分かります。"],
    ],
  },
};

const TEXT = "The city was founded in the";

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.input = make("textarea", { rows: 2, maxlength: 1500, lang: "en", "aria-label": this.text.input });
    this.input.value = TEXT;
    this.beams = slider(this.text.beams, { min: 2, max: 8, value: 4 });
    this.topP = slider(this.text.topP, { min: 0.05, max: 1, step: 0.05, value: 0.9, show: (number) => number.toFixed(2) });
    this.seed = slider(this.text.seed, { min: 1, max: 99, value: 1 });
    const controls = { greedy: [], beam: [this.beams.node], nucleus: [this.topP.node, this.seed.node] };
    this.ways = Object.entries(this.text.names).map(([way, name]) => {
      const [written, score] = [make("p", { class: "live-turn", lang: "en", "aria-live": "polite" }), make("p", { class: "live-state" })];
      return { written, score, node: make("div", { class: "live-side" }, make("strong", {}, name), ...controls[way], written, score) };
    });
    body.append(make("div", { class: "live-wide" }, this.input), ...this.ways.map(({ node }) => node));
    FIRST.forEach((found, way) => this.show(way, found));
  }

  show(way, { text, logP, ended = false }) {
    this.ways[way].written.textContent = `…${text}`;
    this.ways[way].score.textContent = this.text.score(logP, ended);
  }

  async run() {
    const text = this.input.value;
    const nucleus = { settings: { topP: this.topP.value }, seed: this.seed.value };
    const questions = [["search", { beams: 1 }], ["search", { beams: this.beams.value }], ["generate", nucleus]];
    for (const { written, score } of this.ways) written.textContent = score.textContent = "";
    for (const [way, [action, options]] of questions.entries()) {
      await this.live.ask(action, { text, maxTokens: 30, ...options }, (found) => this.show(way, found));
      if (this.live.stopped || this.live.root.dataset.state === "error") return;
    }
  }
}
