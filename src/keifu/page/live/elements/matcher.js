// CLIP: words next to twelve pictures, and how well each picture fits.

import { bars, make, percent } from "../ui.js";

export const WORDS = {
  en: {
    about: "emoji-clip: 2 million weights, trained here on 3,550 emoji of Twemoji (CC BY 4.0) with their names in English, Japanese and Chinese. The twelve pictures are drawn by this page in the colours of those emoji; it was never shown them.",
    run: "Compare", input: "Words, a line for each", cell: "Each row: how the line is shared among the pictures. Click a picture for the shares of the lines.", picked: (name) => `The picture is a ${name}; it is shared among the lines:`, name: (shape, colour) => `${colour} ${shape}`, empty: "There are no words: write a line.",
    shapes: ["circle", "square", "heart"], colours: ["red", "blue", "green", "yellow"],
    lines: ["red circle", "blue square", "green heart", "yellow heart"],
    questions: [
      ["Which does it know better, colours or shapes?", "Colours. For “red heart” the red circle comes first, then the square, and the heart last; but all three red pictures come before all others."],
      ["Write 赤い丸 (red circle) and 红心 (red heart). Does it understand them?", "It finds the red pictures for both: names in three languages were trained into one space, next to the pictures."],
      ["Write “frog”. There is no frog here. What does it answer?", "The three green pictures lead. It only compares, and cannot say that nothing fits: every row adds up to 100%."],
    ],
  },
  ja: {
    about: "emoji-clip：重み 200 万個。Twemoji の絵文字 3,550 個（CC BY 4.0）と、その英語、日本語、中国語の名前でここで学習しました。十二枚の絵は、その絵文字の色でこのページが描いたもので、学習では見ていません。",
    run: "比べる", input: "言葉（一行に一つ）", cell: "一行が、その言葉を十二枚の絵に分けた割合です。絵をクリックすると、その絵を各行に分けた割合が出ます。", picked: (name) => `この絵は${name}です。各行への割合：`, name: (shape, colour) => `${colour}${shape}`, empty: "言葉がありません。一行書いてください。",
    shapes: ["丸", "四角", "ハート"], colours: ["赤い", "青い", "緑の", "黄色い"],
    lines: ["red circle", "blue square", "green heart", "黄色いハート"],
    questions: [
      ["色と形では、どちらをよく知っていますか。", "色です。「red heart」では赤い丸が一番、四角が二番で、ハートは三番です。それでも、赤い三枚はほかのどの絵よりも前に来ます。"],
      ["「赤い丸」と中国語の「红心」（赤いハート）と書いてください。分かりますか。", "どちらでも赤い絵が選ばれます。三つの言語の名前を、絵と同じ一つの空間に学習したからです。"],
      ["「frog」（蛙）と書いてください。ここに蛙の絵はありません。何と答えますか。", "緑の三枚が選ばれます。比べることしかできないので、「どれも合わない」とは言えません。どの行も、足すと 100% になります。"],
    ],
  },
};

const COLOURS = ["#dd2e44", "#55acee", "#78b159", "#fdcb58"];
const SIDE = 72;
const PATHS = ["M36 0a36 36 0 1 0 .1 0z", "M0 4a4 4 0 0 1 4 -4h64a4 4 0 0 1 4 4v64a4 4 0 0 1 -4 4h-64a4 4 0 0 1 -4 -4z", "M36 68C14 50 2 38 2 22 2 4 27 0 36 18 45 0 70 4 70 22 70 38 58 50 36 68z"];

const shares = (logits) => { // softmax
  const most = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp(logit - most));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
};

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.input = make("textarea", { rows: 4, maxlength: 600, "aria-label": this.text.input });
    this.input.value = this.text.lines.join("\n");
    this.pictures = COLOURS.flatMap((colour, c) => PATHS.map((path, s) => {
      const canvas = make("canvas", { width: SIDE, height: SIDE, class: "live-small", role: "img", "aria-label": this.text.name(this.text.shapes[s], this.text.colours[c]) });
      const pen = canvas.getContext("2d", { willReadFrequently: true });
      pen.fillStyle = "#fff";
      pen.fillRect(0, 0, SIDE, SIDE);
      pen.fillStyle = colour;
      pen.fill(new Path2D(path));
      return canvas;
    }));
    this.table = make("div", { class: "live-scroll", tabindex: 0, role: "group", "aria-label": this.text.cell });
    this.picked = make("div", { "aria-live": "polite" });
    body.append(make("div", { class: "live-wide" }, this.input), make("div", { class: "live-wide" }, this.table, make("p", { class: "live-hint" }, this.text.cell), this.picked));
    this.show({ lines: this.lines, logits: null });
  }

  get lines() { return this.input.value.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, 12); }

  run() {
    const lines = this.lines;
    if (!lines.length) return this.live.set("error", this.text.empty);
    const pictures = this.pictures.map((canvas) => [...canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE).data]);
    return this.live.ask("match", { pictures, texts: lines }, ({ logits }) => this.show({ lines, logits }));
  }

  show({ lines, logits }) {
    const pick = (canvas, i) => make("button", { type: "button", class: "live-thumb", "aria-label": canvas.getAttribute("aria-label"), onclick: () => this.pick(canvas, lines, logits?.[i]) }, canvas);
    const head = make("tr", {}, make("td", {}), this.pictures.map((canvas, i) => make("th", { scope: "col" }, pick(canvas, i))));
    const rows = lines.map((line, j) => {
      const among = logits ? shares(logits.map((row) => row[j])) : this.pictures.map(() => 0);
      return make("tr", {}, make("th", { scope: "row" }, line), among.map((share) => make("td", { style: `--heat: ${share}`, title: percent(share) }, logits ? percent(share) : "")));
    });
    this.table.replaceChildren(make("table", { class: "live-matrix live-pictures" }, head, rows));
    this.picked.replaceChildren();
  }

  pick(canvas, lines, logits) {
    if (!logits) return;
    const list = shares(logits).map((share, j) => ({ text: lines[j], share }));
    this.picked.replaceChildren(make("p", {}, this.text.picked(canvas.getAttribute("aria-label"))), bars(list));
  }
}
