// LLaVA: a picture of a coloured shape, a question about it, and the answer.

import { bars, choice, make } from "../ui.js";

export const WORDS = {
  en: {
    about: "see: 1.3 million weights, trained here on the pictures and questions of easy-VQA (MIT). It knows rectangles, circles and triangles in eight colours, and nothing else.",
    run: "Ask", input: "Question", shape: "Shape", colour: "Colour", picture: "The picture: click it to move the shape", first: "First token of the answer",
    shapes: { circle: "circle", rectangle: "rectangle", triangle: "triangle" }, list: "Examples",
    colours: { red: "red", green: "green", blue: "blue", yellow: "yellow", gray: "gray", black: "black", brown: "brown", teal: "teal" },
    questions: [
      ["Ask about a blue circle: “what color is the shape?” and “is there a red shape?”", "It reads the colour and says no to the red shape. On test pictures 99.4% of the answers are right, and 53.3% without the picture."],
      ["Draw a teal triangle. It was never shown one.", "It still answers well: 87.7% of the questions about teal triangles are right, since it knows teal and triangles separately."],
      ["Ask something else, such as “who painted this?”", "It says “no”: it has learned colours, shapes, yes and no, and must answer with one of them."],
    ],
  },
  ja: {
    about: "see：重み 130 万個。easy-VQA（MIT）の絵と質問でここで学習しました。八色の長方形、円、三角形のほかは何も知りません。",
    run: "質問する", input: "質問（英語）", shape: "形", colour: "色", picture: "絵。クリックすると形が動きます", first: "答えの最初のトークン",
    shapes: { circle: "円", rectangle: "長方形", triangle: "三角形" }, list: "例",
    colours: { red: "赤", green: "緑", blue: "青", yellow: "黄", gray: "灰", black: "黒", brown: "茶", teal: "青緑" },
    questions: [
      ["青い円について「what color is the shape?」「is there a red shape?」と聞いてください。", "色を読み取り、赤い形にはないと答えます。テストの絵では答えの 99.4% が正しく、絵がなければ 53.3% です。"],
      ["青緑の三角形を描いてください。学習では一度も見ていません。", "それでもよく答えます。青緑と三角形を別々に知っているので、青緑の三角形についての質問の 87.7% に正しく答えます。"],
      ["「who painted this?」など、ほかのことを聞いてください。", "「no」と答えます。学んだのは色、形、yes、no だけで、そのどれかで答えるしかないからです。"],
    ],
  },
};

const COLOURS = { red: "#ff0000", green: "#008000", blue: "#0000ff", yellow: "#ffff00", gray: "#808080", black: "#000000", brown: "#a52a2a", teal: "#008080" };
const QUESTIONS = ["what color is the shape?", "what shape is in the image?", "is there a red shape?", "does the image contain a circle?", "is no triangle present?"];

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.at = [32, 32];
    const draw = () => this.draw();
    this.shape = choice(this.text.shape, Object.entries(this.text.shapes), draw);
    this.colour = choice(this.text.colour, Object.entries(this.text.colours), draw);
    this.colour.select.value = "blue";
    this.canvas = make("canvas", { width: 64, height: 64, class: "live-picture", tabindex: 0, role: "img", "aria-label": this.text.picture });
    this.canvas.addEventListener("click", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.at = [(64 * (event.clientX - box.left)) / box.width, (64 * (event.clientY - box.top)) / box.height];
      this.draw();
      this.run();
    });
    this.input = make("input", { type: "text", maxlength: 120, value: QUESTIONS[0], "aria-label": this.text.input });
    this.input.addEventListener("keydown", ({ key, isComposing }) => { if (key === "Enter" && !isComposing && !live.busy) live.click(); });
    const examples = choice(this.text.list, QUESTIONS.map((question) => [question, question]), (question) => { this.input.value = question; this.run(); });
    this.output = make("p", { class: "live-output", lang: "en", "aria-live": "polite" }, "…");
    this.found = make("div", {});
    body.append(this.canvas, make("div", { class: "live-side" }, this.shape.node, this.colour.node, examples.node, this.input, this.output, this.found));
    this.draw();
  }

  draw() {
    const pen = this.canvas.getContext("2d", { willReadFrequently: true });
    const [x, y] = this.at.map((value) => Math.max(12, Math.min(52, value)));
    pen.fillStyle = "#eef0ff"; // a pale background, as the pictures of training have
    pen.fillRect(0, 0, 64, 64);
    pen.fillStyle = COLOURS[this.colour.value];
    pen.beginPath();
    if (this.shape.value === "circle") pen.arc(x, y, 11, 0, 2 * Math.PI);
    else if (this.shape.value === "rectangle") pen.rect(x - 11, y - 9, 22, 18);
    else for (const [dx, dy] of [[0, -11], [11, 10], [-11, 10]]) pen.lineTo(x + dx, y + dy);
    pen.fill();
  }

  run() {
    const rgba = [...this.canvas.getContext("2d").getImageData(0, 0, 64, 64).data];
    return this.live.ask("see", { rgba, question: this.input.value }, ({ text, candidates }) => {
      this.output.textContent = text;
      this.found.replaceChildren(make("p", { class: "live-state" }, this.text.first), bars(candidates.map((each) => ({ text: each.text, share: each.probability }))));
    }, ({ text }) => { this.output.textContent = text; });
  }
}
