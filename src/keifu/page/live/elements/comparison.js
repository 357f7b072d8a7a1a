// One prompt, two models: before and after a language model was taught to answer.

import { FIRST } from "../first/comparison.js";
import { make, percent, slider } from "../ui.js";

export const WORDS = {
  en: {
    about: "gpt-en (4.3 million weights) continues texts. chat-en (4.8 million) began as gpt-en and learned conversations that SmolLM2-135M-Instruct wrote: the first of the three steps above, without a reward model. Both invent their facts.",
    run: "Let both answer", input: "Prompt", names: ["Before: gpt-en, which continues texts", "After: chat-en, which was taught to answer"], temperature: "Temperature", seed: "Seed",
    sure: (share) => `Mean probability of a written token: ${percent(share)}`, list: ["What is your favourite food?", "Can you tell me a story about a dog?", "How do I make tea?"], empty: "There is no prompt: write one.",
    questions: [
      ["Ask “How do I make tea?” What does the model before do with the question?", "It goes on as one of its texts would: often with the next lines of a conversation between A and B, which it read in training. It does not know that somebody waits for an answer."],
      ["Which of the two stops by itself?", "The model after: its conversations end with a token of their own, and it learned to write that token. The model before writes on until its 60 tokens are used."],
      ["Set the temperature to 0 and ask for the capital of a country.", "“The capital of France is France.” The model after answers in a whole sentence, and wrongly: the examples taught it the form of an answer, and 4.8 million weights hold few facts."],
    ],
  },
  ja: {
    about: "gpt-en（重み 430 万個）は文の続きを書きます。chat-en（480 万個）は gpt-en から始め、SmolLM2-135M-Instruct が書いた会話を学びました。上の三段階の最初だけで、報酬モデルは使っていません。どちらも事実は作り話です。",
    run: "両方に答えさせる", input: "プロンプト（英語）", names: ["前：文の続きを書く gpt-en", "後：答え方を学んだ chat-en"], temperature: "温度", seed: "シード",
    sure: (share) => `書いたトークンの平均確率：${percent(share)}`, list: ["What is your favourite food?", "Can you tell me a story about a dog?", "How do I make tea?"], empty: "プロンプトがありません。何か書いてください。",
    questions: [
      ["「How do I make tea?」と聞いてください。前のモデルは、質問をどう扱いますか。", "質問を文章の一部として、その続きを書きます。学習で読んだ A と B の会話の続きになることがよくあります。誰かが答えを待っているとは知りません。"],
      ["自分で書き終えるのはどちらですか。", "後のモデルです。会話の終わりには専用のトークンがあり、それを書くことを学んだからです。前のモデルは 60 トークンを使い切るまで書きます。"],
      ["温度を 0 にして、国の首都を聞いてください。", "「The capital of France is France.」後のモデルは整った文で、間違った答えを書きます。手本が教えたのは答えの形で、480 万個の重みに事実はほとんど入りません。"],
    ],
  },
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.input = make("input", { type: "text", maxlength: 600, lang: "en", value: this.text.list[0], "aria-label": this.text.input });
    this.input.addEventListener("keydown", ({ key, isComposing }) => { if (key === "Enter" && !isComposing && !live.busy) live.click(); });
    const examples = this.text.list.map((prompt) => make("button", { type: "button", lang: "en", onclick: () => { this.input.value = prompt; if (!live.busy) live.click(); } }, prompt));
    this.temperature = slider(this.text.temperature, { min: 0, max: 1.5, step: 0.05, value: 0.6, show: (number) => number.toFixed(2) });
    this.seed = slider(this.text.seed, { min: 1, max: 99, value: 1 });
    this.answers = this.text.names.map((name) => {
      const [written, sure] = [make("p", { class: "live-turn", lang: "en", "aria-live": "polite" }, "…"), make("p", { class: "live-state" })];
      return { written, sure, show: (answer) => this.show(written, sure, answer), node: make("div", { class: "live-side" }, make("strong", {}, name), written, sure) };
    });
    body.append(make("div", { class: "live-wide" }, this.input, make("div", { class: "live-examples" }, examples)), ...this.answers.map(({ node }) => node),
      make("div", { class: "live-wide" }, this.temperature.node, this.seed.node));
    this.answers.forEach(({ show }, model) => show(FIRST[model]));
  }

  show(written, sure, { text, steps }) {
    written.textContent = text.trim() || "…";
    sure.textContent = this.text.sure(steps.reduce((sum, { probability }) => sum + probability / steps.length, 0));
  }

  async run() {
    const content = this.input.value.trim();
    if (!content) return this.live.set("error", this.text.empty);
    const settings = { temperature: this.temperature.value, topP: 0.95, repetitionPenalty: 1.1 };
    const prompts = [{ text: `${content}\n` }, { messages: [{ role: "user", content }] }];
    for (const [model, { written, sure, show }] of this.answers.entries()) {
      [written.textContent, sure.textContent] = ["…", ""];
      await this.live.ask("generate", { ...prompts[model], settings, maxTokens: 60, seed: this.seed.value }, show, show, model);
      if (this.live.stopped || this.live.root.dataset.state === "error") return null;
    }
    return null;
  }
}
