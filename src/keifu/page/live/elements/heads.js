// The attention of every head of every layer of a language model, over a text of one's own.

import { FIRST } from "../first/heads.js";
import { make, percent, visible } from "../ui.js";

export const WORDS = {
  en: {
    about: "gpt-en: 4.3 million weights in 4 layers of 4 heads, trained here on summaries of English Wikipedia, recipes, speeches and conversations.",
    run: "Read the text", input: "Text", head: (layer, head) => `Layer ${layer + 1}, head ${head + 1}`, kinds: ["first", "before", "itself"], hint: "Each small picture is a head: a row for each token, darker where it looks. Click one to enlarge it. Below it: the mean share on the first token, on the token before, and on the token itself.",
    table: "Rows: tokens that look. Columns: tokens that are looked at.",
    questions: [
      ["Which heads look at the token before?", "In this sentence heads 3 and 4 of layer 2 and heads 2 and 4 of layer 3: more than half of what they read is there. With them, later layers know pairs of tokens."],
      ["Does a head look at the first token, whatever the text is?", "Head 3 of layer 4 comes nearest, with a quarter to a third. A head that finds nothing must look somewhere, since each row adds up to 1."],
      ["Why is everything to the right of the diagonal empty?", "The model is causal: a token sees itself and those before it. So the first token can only look at itself, and its row has one dark cell."],
    ],
  },
  ja: {
    about: "gpt-en：4 層、各層 4 ヘッド、重み 430 万個。英語版ウィキペディアの要約、レシピ、演説、会話でここで学習しました。",
    run: "文を読む", input: "文（英語）", head: (layer, head) => `層 ${layer + 1}、ヘッド ${head + 1}`, kinds: ["最初", "一つ前", "自分"], hint: "小さな絵の一つが一つのヘッドです。一行が一つのトークンで、見ている先ほど濃くなります。クリックすると大きくなります。下の数は、最初のトークン、一つ前のトークン、自分自身を見る割合の平均です。",
    table: "行は見る側、列は見られる側のトークンです。",
    questions: [
      ["一つ前のトークンを見るのは、どのヘッドですか。", "この文では、層 2 のヘッド 3、4 と層 3 のヘッド 2、4 です。読むものの半分より多くがそこにあります。これで、後の層はトークンの組を知ることができます。"],
      ["どんな文でも最初のトークンを見るヘッドはありますか。", "いちばん近いのは層 4 のヘッド 3 で、四分の一から三分の一です。どの行も足すと 1 になるので、何も見つからないヘッドも、どこかを見なければなりません。"],
      ["対角線の右は、なぜすべて空なのですか。", "因果的なモデルだからです。トークンが見るのは自分とそれより前だけです。最初のトークンは自分しか見られず、その行には濃い欄が一つしかありません。"],
    ],
  },
};

const TEXT = "The cat sat on the mat because it was tired";

// The mean share on the first token, the one before and the token itself, over all tokens but the first.
export function habits(rows) {
  const mean = (key) => rows.slice(1).reduce((sum, row, i) => sum + row[key(i + 1)], 0) / Math.max(1, rows.length - 1);
  return [mean(() => 0), mean((query) => query - 1), mean((query) => query)];
}

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.chosen = [2, 3];
    this.input = make("textarea", { rows: 2, maxlength: 200, lang: "en", "aria-label": this.text.input, oninput: () => this.run() });
    this.input.value = TEXT;
    this.grid = make("div", { class: "live-grid" });
    this.title = make("strong", {});
    this.table = make("div", { class: "live-scroll", tabindex: 0, role: "group", "aria-label": this.text.table });
    body.append(make("div", { class: "live-wide" }, this.input), make("div", { class: "live-wide" }, this.grid, make("p", { class: "live-hint" }, this.text.hint)),
      make("div", { class: "live-wide" }, this.title, this.table, make("p", { class: "live-hint" }, this.text.table)));
    this.show(FIRST);
  }

  run() {
    return this.live.ask("next", { text: this.input.value, count: 1, every: true }, (found) => this.show(found));
  }

  show({ tokens, attention }) {
    this.last = { tokens, attention };
    this.grid.replaceChildren(...attention.flatMap((heads, layer) => heads.map((rows, head) => {
      const canvas = make("canvas", { width: rows.length, height: rows.length });
      const pen = canvas.getContext("2d");
      rows.forEach((row, i) => row.forEach((share, j) => {
        pen.fillStyle = `rgb(0 121 107 / ${Math.sqrt(share)})`;
        pen.fillRect(j, i, 1, 1);
      }));
      const name = this.text.head(layer, head);
      const shares = habits(rows).map((share, kind) => `${this.text.kinds[kind]} ${percent(share)}`).join(" ");
      const pressed = String(layer === this.chosen[0] && head === this.chosen[1]);
      return make("button", { type: "button", class: "live-head", "aria-label": `${name}: ${shares}`, "aria-pressed": pressed, onclick: () => this.choose(layer, head) }, canvas, make("small", {}, shares));
    })));
    this.enlarge();
  }

  choose(layer, head) {
    this.chosen = [layer, head];
    this.show(this.last);
  }

  enlarge() {
    const { tokens, attention } = this.last;
    const [layer, head] = this.chosen;
    this.title.textContent = this.text.head(layer, head);
    const top = make("tr", {}, make("td", {}), tokens.map((text) => make("th", { scope: "col" }, visible(text))));
    const lines = attention[layer][head].map((row, i) => make("tr", {}, make("th", { scope: "row" }, visible(tokens[i])),
      tokens.map((_, j) => make("td", { style: `--heat: ${row[j] ?? 0}`, title: percent(row[j] ?? 0) }))));
    this.table.replaceChildren(make("table", { class: "live-matrix" }, top, lines));
  }
}
