// Byte pair encoding: a tokenizer that is trained in the page, merge by merge. Nothing is loaded.

import { make, slider, visible } from "../ui.js";

export const WORDS = {
  en: {
    about: "Nothing is loaded: this page counts neighbours in your text and joins the commonest pair, again and again, as the code below does. It begins with characters; keifu's tokenizers begin with bytes, and read millions of lines.",
    run: "Learn all merges", input: "Text to learn from", merges: "Merges", first: "she sells sea shells by the sea shore. the shells she sells are sea shells, i am sure. so if she sells sea shells on the sea shore, then i am sure she sells sea shore shells.",
    state: (tokens, characters, vocabulary) => `${tokens} tokens, ${(characters / tokens).toFixed(2)} characters per token, vocabulary of ${vocabulary}`,
    last: (pair, count) => `Last merge: ${pair}, ${count} times`, none: "No merge yet: every token is a character.", done: "No pair is left that occurs twice.", hint: "The text in its tokens:", list: "Merges in the order in which they were learned", empty: "There is no text: write some.",
    questions: [
      ["Which pair is joined first, and why?", "The space and “s”: 24 words begin with them. Move the slider to 1 to see it. Each choice is greedy, and never undone."],
      ["When is a whole word one token?", "When it is common: “ sells”, “ shells” and “ shore” are whole at the end, and “ by”, which occurs once, is still in letters."],
      ["Write another text, such as Japanese, and learn again.", "The merges are quite different ones. A tokenizer that was trained on one language cuts another one into small pieces, which costs tokens."],
    ],
  },
  ja: {
    about: "読み込みはありません。このページが、文の中で隣り合う文字を数え、最も多い組をつなぐことを、下のコードのように繰り返します。ここでは文字から始めます。keifu のトークナイザはバイトから始め、何百万行も読みます。",
    run: "すべて学習する", input: "学習する文", merges: "つなぐ回数", first: "すもももももももものうち。もももすもももももだけれど、すももはももより、すっぱいもも。ももはすももより、あまいもも。",
    state: (tokens, characters, vocabulary) => `${tokens} トークン、1 トークンに ${(characters / tokens).toFixed(2)} 文字、語彙 ${vocabulary}`,
    last: (pair, count) => `最後につないだ組：${pair}（${count} 回）`, none: "まだ何もつないでいません。どのトークンも一文字です。", done: "二回以上現れる組は、もうありません。", hint: "トークンに切った文：", list: "つないだ組（学習した順）", empty: "文がありません。何か書いてください。",
    questions: [
      ["最初につながれるのはどの組で、なぜですか。", "「も」と「も」です。19 回現れます。つまみを 1 にすると分かります。そのつど最も多い組を選ぶだけで、あとから取り消すことはありません。"],
      ["単語の全体が一つのトークンになるのは、いつですか。", "よく出る語なら早くそうなります。「すもも」は二回目で一つになり、一度しか出ない「すっぱい」はなりません。"],
      ["ほかの文、たとえば英語を書いて、もう一度学習してください。", "まったく別の組がつながれます。一つの言語で学習したトークナイザは、ほかの言語を小さく切るので、トークンが多くなります。"],
    ],
  },
};

// The commonest pair of neighbours is joined again and again (Sennrich et al., 2016). Of pairs that are equally common
// the one with the older pieces is taken. Returns the merges: [left, right, count].
export function learnPairs(text, most = 300) {
  const words = new Map(); // a word begins with its space
  for (const word of text.match(/ ?[^ ]+|\s/g) ?? []) words.set(word, (words.get(word) ?? 0) + 1);
  let pieces = [...words].map(([word, count]) => ({ word: Array.from(word), count }));
  const [merges, ages] = [[], new Map()];
  const age = (piece) => ages.get(piece) ?? (piece === " " ? 0x120 : piece.codePointAt(0)); // GPT-2 writes a space as U+0120
  while (merges.length < most) {
    const pairs = new Map();
    for (const { word, count } of pieces) for (let i = 0; i + 1 < word.length; i++) {
      const key = JSON.stringify([word[i], word[i + 1]]);
      pairs.set(key, (pairs.get(key) ?? 0) + count);
    }
    let best = null;
    for (const [key, count] of pairs) {
      const [left, right] = JSON.parse(key);
      const older = best && (age(left) - age(best[0]) || age(right) - age(best[1])) < 0;
      if (!best || count > best[2] || (count === best[2] && older)) best = [left, right, count];
    }
    if (!best || best[2] < 2) break;
    if (!ages.has(best[0] + best[1])) ages.set(best[0] + best[1], 0x200000 + merges.length);
    merges.push(best);
    pieces = pieces.map(({ word, count }) => ({ word: joined(word, best), count }));
  }
  return merges;
}

function joined(word, [left, right]) {
  const result = [];
  for (let i = 0; i < word.length; i++) {
    if (word[i] === left && word[i + 1] === right) result.push(left + word[++i]);
    else result.push(word[i]);
  }
  return result;
}

export function cut(text, merges) { // the tokens of a text
  return (text.match(/ ?[^ ]+|\s/g) ?? []).flatMap((word) => merges.reduce(joined, Array.from(word)));
}

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.input = make("textarea", { rows: 4, maxlength: 2000, "aria-label": this.text.input, oninput: () => this.learn() });
    this.input.value = this.text.first;
    this.count = slider(this.text.merges, { min: 0, max: 1, value: 0, onchange: () => { this.end(); this.show(); } });
    this.slide = this.count.node.querySelector("input");
    this.state = make("p", { class: "live-state" });
    this.last = make("p", { class: "live-state" });
    this.tokens = make("div", { class: "live-tokens" });
    this.list = make("div", { class: "live-tokens", role: "group", "aria-label": this.text.list });
    body.append(make("div", { class: "live-wide" }, this.input), make("div", { class: "live-wide" }, this.count.node, this.state, this.last, make("p", { class: "live-hint" }, this.text.hint), this.tokens),
      make("div", { class: "live-wide" }, make("p", { class: "live-hint" }, this.text.list), this.list));
    this.learn(8);
  }

  learn(at = 0) {
    this.end();
    this.merges = learnPairs(this.input.value);
    this.slide.max = Math.max(1, this.merges.length);
    this.set(at);
  }

  set(count) {
    this.slide.value = Math.min(count, this.merges.length);
    this.count.node.querySelector("output").textContent = this.slide.value;
    this.show();
  }

  end() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.live.root.dataset.state) this.live.set("idle");
  }

  run() {
    if (this.timer) return;
    if (!this.input.value.trim()) {
      this.live.set("error", this.text.empty);
      return;
    }
    this.live.set("running");
    let count = this.count.value >= this.merges.length ? 0 : this.count.value;
    this.timer = setInterval(() => {
      this.set(++count);
      if (count < this.merges.length) return;
      this.end();
      this.live.set("done", this.text.done);
    }, 60);
  }

  show() {
    const learned = this.merges.slice(0, this.count.value);
    const text = this.input.value;
    const tokens = cut(text, learned);
    this.state.textContent = tokens.length ? this.text.state(tokens.length, Array.from(text).length, new Set(text).size + new Set(learned.map(([left, right]) => left + right)).size) : "";
    const pair = learned.at(-1);
    this.last.textContent = pair ? this.text.last(`${visible(pair[0])} + ${visible(pair[1])}`, pair[2]) : this.text.none;
    const chip = (token, i) => make("span", { style: `--heat: ${i % 2 ? 0.15 : 0.4}` }, visible(token));
    this.tokens.replaceChildren(...tokens.map(chip));
    this.list.replaceChildren(...learned.map(([left, right]) => make("span", {}, `${visible(left)}+${visible(right)}`)));
  }
}
