// The Transformer: a Japanese sentence, its English translation, and what each word looked at.

import { FIRST } from "../first/translator.js";
import { choice, make, percent, slider, visible } from "../ui.js";

export const WORDS = {
  en: {
    about: "ja-en: 8.8 million weights, trained here on pairs of sentences. Short everyday sentences come out best; it invents what it has not seen.",
    run: "Translate", input: "Japanese sentence", beams: "Beams", view: "Look at", mean: "Alignment: mean of all heads of the last layer",
    cross: (layer, head) => `Layer ${layer + 1}, head ${head + 1}`, encoder: (layer, head) => `Encoder, layer ${layer + 1}, head ${head + 1}`, off: "Switch this head off", table: "Rows: words that were written, and in the encoder pieces of the source. Columns: pieces of the source.",
    examples: ["猫はテーブルの下で寝ています。", "昨日、新しい本を買いました。", "彼は私に何も言わずに部屋を出て行った。"],
    questions: [
      ["Which piece of the source does “cat” look at?", "At 猫: some heads align words. Others look at the end of the sentence or spread over all of it."],
      ["Set the beams to 1. Does the translation change?", "Not for the three examples. With more beams the search keeps several beginnings open, and can find texts of higher probability."],
      ["Switch off head 6 of layer 3. What happens to the cat?", "It sleeps on the table. Of the 18 heads that look at the source, three change this sentence when one of them is missing: heads 2, 5 and 6 of layer 3."],
    ],
  },
  ja: {
    about: "ja-en：重み 880 万個。対訳の文でここで学習しました。短い日常の文が得意で、見たことのないことは作り話になります。",
    run: "翻訳する", input: "日本語の文", beams: "ビーム数", view: "見るもの", mean: "アラインメント：最後の層の全ヘッドの平均",
    cross: (layer, head) => `層 ${layer + 1}、ヘッド ${head + 1}`, encoder: (layer, head) => `エンコーダ、層 ${layer + 1}、ヘッド ${head + 1}`, off: "このヘッドを切る", table: "行は書かれた語（エンコーダでは原文の断片）、列は原文の断片です。",
    examples: ["猫はテーブルの下で寝ています。", "昨日、新しい本を買いました。", "彼は私に何も言わずに部屋を出て行った。"],
    questions: [
      ["「cat」は原文のどの断片を見ていますか。", "「猫」です。語を対応づけるヘッドもあれば、文末を見るヘッドや全体に広がるヘッドもあります。"],
      ["ビーム数を 1 にすると、訳は変わりますか。", "三つの例では変わりません。ビームが多いと、いくつもの書き出しを残すので、より確率の高い文が見つかることがあります。"],
      ["層 3 のヘッド 6 を切ってください。猫はどうなりますか。", "テーブルの上で寝ます。原文を見る 18 個のヘッドのうち、一つ切るとこの文が変わるのは三つ、層 3 のヘッド 2、5、6 です。"],
    ],
  },
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.off = new Set();
    this.input = make("textarea", { rows: 2, maxlength: 300, lang: "ja", "aria-label": this.text.input });
    const given = live.own ? [] : this.text.examples; // of ja-en
    this.input.value = given[0] ?? "";
    const examples = given.map((sentence) => make("button", { type: "button", lang: "ja", onclick: () => { this.input.value = sentence; this.run(); } }, sentence));
    this.output = make("p", { class: "live-output", lang: "en", "aria-live": "polite" });
    this.beams = slider(this.text.beams, { min: 1, max: 8, value: 4, onchange: () => this.run() });
    this.view = choice(this.text.view, [["mean", this.text.mean]], () => this.look());
    const switched = make("input", { type: "checkbox", onchange: () => this.toggle(switched.checked) });
    this.switch = make("label", { class: "live-check", hidden: true }, switched, this.text.off);
    this.table = make("div", { class: "live-scroll" });
    body.append(make("div", { class: "live-wide" }, this.input, make("div", { class: "live-examples" }, examples), this.output),
      make("div", { class: "live-side" }, this.beams.node, this.view.node, this.switch),
      make("div", { class: "live-wide" }, this.table, make("p", { class: "live-hint" }, this.text.table)));
    if (!live.own) this.show(FIRST);
  }

  run() {
    const off = [...this.off].map((name) => [name.split(".")[0], ...name.split(".").slice(1).map(Number)]);
    return this.live.ask("translate", { text: this.input.value, beams: this.beams.value, off }, (found) => this.show(found));
  }

  show(found) {
    this.last = found;
    this.output.textContent = found.text;
    const shown = [...this.view.select.options].map(({ value }) => value);
    for (const [part, layers] of [["cross", found.alignment], ["encoder", found.encoder ?? []]]) {
      layers.forEach((heads, layer) => heads.forEach((_, head) => {
        const value = `${part}.${layer}.${head}`;
        if (!shown.includes(value)) this.view.select.append(make("option", { value }, this.text[part](layer, head)));
      }));
    }
    this.look();
  }

  rows() {
    const { alignment, encoder, source, target } = this.last;
    const [part, layer, head] = this.view.value.split(".");
    if (part === "encoder") return encoder[layer][head];
    if (part === "cross") return alignment[layer][head];
    const heads = alignment.at(-1);
    return target.map((_, t) => source.map((__, s) => heads.reduce((sum, rows) => sum + rows[t][s] / heads.length, 0)));
  }

  look() {
    if (!this.last) return;
    const source = this.last.source;
    const target = this.view.value.startsWith("encoder") ? source : this.last.target;
    const rows = this.rows();
    this.switch.hidden = this.view.value === "mean";
    this.switch.firstChild.checked = this.off.has(this.view.value);
    const head = make("tr", {}, make("td", {}), source.map((text) => make("th", { scope: "col", lang: "ja" }, visible(text))));
    const lines = target.map((text, t) => make("tr", {}, make("th", { scope: "row" }, visible(text)),
      source.map((_, s) => make("td", { style: `--heat: ${rows[t][s]}`, title: percent(rows[t][s]) }))));
    this.table.replaceChildren(make("table", { class: "live-matrix" }, head, lines));
  }

  toggle(checked) {
    if (checked) this.off.add(this.view.value);
    else this.off.delete(this.view.value);
    this.run();
  }
}
