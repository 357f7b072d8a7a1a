// A conversation with chat-en, and the probability of each token that it wrote.

import { make, percent, slider, visible } from "../ui.js";

export const WORDS = {
  en: {
    about: "chat-en: 4.8 million weights, taught here by answers that SmolLM2-135M-Instruct wrote. It chats about everyday things, and invents its facts: do not believe it.",
    run: "Answer", input: "Your message", first: "Hello! Can you tell me a short story?", clear: "New conversation", temperature: "Temperature", topP: "Top-p", penalty: "Repetition penalty",
    hint: "Point at a word of an answer: its probability, and what else was likely.", empty: "There is no message: write one.",
    questions: [
      ["Set the temperature to 0 and ask the same twice, each time in a new conversation.", "The answers are the same: the likeliest token is taken each time, and nothing is drawn."],
      ["Ask for a fact, such as the capital of a country.", "It answers in good English and often wrongly: 4.8 million weights learn how answers sound, and hold few facts."],
      ["Set the repetition penalty to 1. What changes?", "Longer answers begin to repeat themselves. The penalty makes tokens that were already used less likely."],
    ],
  },
  ja: {
    about: "chat-en：重み 480 万個。SmolLM2-135M-Instruct が書いた答えを手本にここで学習しました。日常のことを英語で話しますが、事実は作り話です。信じないでください。",
    run: "答えさせる", input: "メッセージ（英語）", first: "Hello! Can you tell me a short story?", clear: "新しい会話", temperature: "温度", topP: "Top-p", penalty: "繰り返しの罰",
    hint: "答えの語を指すと、その確率と、ほかにありえた語が分かります。", empty: "メッセージがありません。何か書いてください。",
    questions: [
      ["温度を 0 にして、同じことを新しい会話で二度聞いてください。", "答えは同じです。毎回、最も確率の高いトークンを選び、くじを引かないからです。"],
      ["国の首都など、事実を聞いてください。", "上手な英語で答えますが、よく間違えます。480 万個の重みは答え方の調子を学びますが、事実はほとんど持てません。"],
      ["繰り返しの罰を 1 にすると、何が変わりますか。", "長い答えが同じことを繰り返し始めます。罰は、すでに使ったトークンの確率を下げます。"],
    ],
  },
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.messages = [];
    this.log = make("div", { class: "live-chat", role: "log", "aria-live": "polite" });
    this.input = make("input", { type: "text", maxlength: 600, "aria-label": this.text.input, value: this.text.first });
    this.input.addEventListener("keydown", ({ key, isComposing }) => { if (key === "Enter" && !isComposing && !live.busy) live.click(); });
    const two = (number) => number.toFixed(2);
    this.temperature = slider(this.text.temperature, { min: 0, max: 1.5, step: 0.05, value: 0.6, show: two });
    this.topP = slider(this.text.topP, { min: 0.05, max: 1, step: 0.05, value: 0.95, show: two });
    this.penalty = slider(this.text.penalty, { min: 1, max: 1.5, step: 0.05, value: 1.1, show: two });
    const clear = make("button", { type: "button", onclick: () => { if (!live.busy) this.clear(); } }, this.text.clear);
    body.append(this.log, make("div", { class: "live-wide live-row" }, this.input),
      make("div", { class: "live-side" }, this.temperature.node, this.topP.node, this.penalty.node, clear, make("p", { class: "live-hint" }, this.text.hint)));
  }

  clear() {
    this.messages = [];
    this.log.replaceChildren();
    this.input.value = this.text.first;
  }

  turn(role, text) {
    const node = make("div", { class: `live-turn live-${role}`, lang: "en" }, text);
    this.log.append(node);
    return node;
  }

  async run() {
    const content = this.input.value.trim();
    if (!content) return this.live.set("error", this.text.empty);
    this.input.value = "";
    this.messages.push({ role: "user", content });
    this.turn("user", content);
    const node = this.turn("assistant", "…");
    const settings = { temperature: this.temperature.value, topP: this.topP.value, repetitionPenalty: this.penalty.value };
    const seed = Math.floor(2 ** 31 * Math.random());
    const show = ({ steps }) => node.replaceChildren(...steps.map(({ text, probability, rivals }) => {
      const others = rivals.map((rival) => `${visible(rival.text)} ${percent(rival.probability)}`).join(", ");
      return make("span", { title: `${percent(probability)} | ${others}` }, text);
    }));
    await this.live.ask("generate", { messages: this.messages, settings, maxTokens: 120, seed }, (last) => {
      show(last);
      this.messages.push({ role: "assistant", content: last.text });
    }, show);
    if (this.live.root.dataset.state === "error") this.messages.pop();
    return null;
  }
}
