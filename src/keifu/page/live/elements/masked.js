// BERT: a word is hidden, and the model says what it may have been from both sides.

import { FIRST } from "../first/masked.js";
import { bars, make } from "../ui.js";

export const WORDS = {
  en: {
    about: "bert-en: 2.7 million weights, trained here on summaries of English Wikipedia, recipes and speeches, in lower case. It finds 49.7% of held-out hidden tokens.",
    run: "Fill in", input: "Text; [MASK] hides a word", hide: "Click a word to hide it, or to show it again.",
    questions: [
      ["Write “The Japanese book was written by a [MASK] author.” Then change “a” to “an”.", "After “a” the first candidate is “japanese”, after “an” it is “english”: the model reads the words on both sides, near and far."],
      ["Hide two words at once.", "Each is filled in without knowledge of the other: the two lists need not fit together. This is why BERT is not used for writing texts."],
      ["Hide the full stop.", "It is nearly certain: punctuation is right in 72.6% of the cases, other words in 32.5%."],
    ],
  },
  ja: {
    about: "bert-en：重み 270 万個。英語版ウィキペディアの要約、レシピ、演説を小文字にしてここで学習しました。学習していない文の隠れたトークンの 49.7% を当てます。",
    run: "埋める", input: "文（英語）。[MASK] が隠れた語です", hide: "語をクリックすると隠れ、もう一度クリックすると現れます。",
    questions: [
      ["「The Japanese book was written by a [MASK] author.」と書き、次に「a」を「an」に変えてください。", "「a」の後では「japanese」、「an」の後では「english」が最初の候補です。モデルは両側の語を、近くも遠くも読みます。"],
      ["二つの語を同時に隠してください。", "それぞれがもう一方を知らずに埋められるので、二つの候補は合うとは限りません。BERT で文章を書かないのはこのためです。"],
      ["ピリオドを隠してください。", "ほぼ確実に当たります。句読点は 72.6%、普通の語は 32.5% が当たります。"],
    ],
  },
};

const TEXT = "The book was [MASK] by an American author.";

export class Element {
  constructor(live, body) {
    this.live = live;
    this.input = make("textarea", { rows: 2, maxlength: 600, "aria-label": live.text.input, oninput: () => { this.words(); this.run(); } });
    this.input.value = TEXT;
    this.chips = make("div", { class: "live-tokens" });
    this.hidden = new Map();
    this.found = make("div", { class: "live-columns" });
    body.append(make("div", { class: "live-wide" }, this.input, this.chips, make("p", { class: "live-hint" }, live.text.hide)), this.found);
    this.words();
    if (!live.own) this.show(FIRST);
  }

  words() { // a button for each word of the text
    const parts = this.input.value.match(/\[MASK\]|[\p{L}\p{N}'’]+|[^\s\p{L}\p{N}]|\s+/gu) ?? [];
    this.chips.replaceChildren(...parts.map((part, i) => (part.trim() ? make("button", {
      type: "button", "aria-pressed": String(part === "[MASK]"),
      onclick: () => {
        if (part !== "[MASK]") this.hidden.set(i, part);
        parts[i] = part === "[MASK]" ? this.hidden.get(i) ?? "…" : "[MASK]";
        this.input.value = parts.join("");
        this.words();
        this.run();
      },
    }, part) : " ")));
  }

  run() {
    return this.live.ask("fill", { text: this.input.value }, (found) => this.show(found));
  }

  show({ masks }) {
    this.found.replaceChildren(...masks.slice(0, 4).map(({ candidates }) => bars(candidates.map(({ text, probability }) => ({ text, share: probability })))));
  }
}
