// The multi-layer network: a digit that one draws, the hidden layers, and the answer.

import { FIRST } from "../first/network.js";
import { bars, make } from "../ui.js";

export const WORDS = {
  en: {
    about: "The packaged network: 784 inputs, 512 and 256 hidden units, 535,818 weights, trained on MNIST's handwritten digits. It calls whatever it sees a digit.",
    run: "Read it", clear: "Clear", pad: "Pad for a digit: draw with the pointer", hidden: (n, active) => `Hidden layer ${n}: ${active} units fire`,
    questions: [
      ["Draw a 1 and turn it slowly into a 7. Where does the answer change?", "When the upper bar is about as long as half the digit. Between the two, both shares are far from 100%."],
      ["What does it say about a letter or a face?", "A digit, and often with a high share: softmax must give all of its 100% to the ten classes."],
      ["How many hidden units fire for a digit?", "Less than half: ReLU sets all negative sums to zero. Which ones fire differs from digit to digit."],
    ],
  },
  ja: {
    about: "同梱のネットワーク：入力 784、隠れユニット 512 と 256、重み 535,818 個。MNIST の手書き数字で学習しました。何を見ても数字だと答えます。",
    run: "読ませる", clear: "消す", pad: "数字を描く場所。ポインターで描きます", hidden: (n, active) => `隠れ層 ${n}：${active} ユニットが発火`,
    questions: [
      ["1 を描き、少しずつ 7 に変えてください。答えはどこで変わりますか。", "上の横棒が数字の半分ほどの長さになったときです。その間では、どちらの割合も 100% から遠くなります。"],
      ["文字や顔を描くと、何と答えますか。", "数字だと答え、割合もしばしば高くなります。ソフトマックスは 100% を必ず十個のクラスに配るからです。"],
      ["一つの数字で、いくつの隠れユニットが発火しますか。", "半分より少ない数です。ReLU が負の和をすべて 0 にします。どれが発火するかは数字ごとに違います。"],
    ],
  },
};

const STROKES = [[[9, 6], [14, 5], [18, 8], [17, 12], [13, 14], [18, 16], [19, 20], [15, 23], [9, 22]]]; // a 3, in 28 × 28 pixels

// Strokes as pixels from 0 to 1: as soft as MNIST's, about two pixels wide.
export function rasterise(strokes) {
  const pixels = new Float32Array(784);
  for (const stroke of strokes) stroke.forEach(([x, y], i) => {
    const [fromX, fromY] = stroke[Math.max(0, i - 1)];
    const steps = Math.max(1, Math.ceil(4 * Math.hypot(x - fromX, y - fromY)));
    for (let step = 0; step <= steps; step++) {
      const [atX, atY] = [fromX + ((x - fromX) * step) / steps, fromY + ((y - fromY) * step) / steps];
      for (let row = Math.floor(atY) - 2; row <= atY + 2; row++) for (let column = Math.floor(atX) - 2; column <= atX + 2; column++) {
        if (row < 0 || row > 27 || column < 0 || column > 27) continue;
        const ink = Math.max(0, Math.min(1, 1.9 - Math.hypot(column - atX, row - atY)));
        pixels[28 * row + column] = Math.max(pixels[28 * row + column], ink);
      }
    }
  });
  return pixels;
}

// As in MNIST: the drawing fills 20 pixels, and its centre of mass is the picture's.
export function centred(strokes) {
  const points = strokes.flat();
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const size = Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys), 1);
  const fit = strokes.map((stroke) => stroke.map(([x, y]) => [4 + (18 * (x - Math.min(...xs))) / size, 4 + (18 * (y - Math.min(...ys))) / size]));
  const mass = (pixels) => {
    let [total, x, y] = [0, 0, 0];
    pixels.forEach((ink, i) => { total += ink; x += ink * (i % 28); y += ink * Math.floor(i / 28); });
    return [x / total, y / total];
  };
  const [x, y] = mass(rasterise(fit));
  return rasterise(fit.map((stroke) => stroke.map(([px, py]) => [px + 13.5 - x, py + 13.5 - y])));
}

export class Element {
  constructor(live, body) {
    this.live = live;
    this.text = live.text;
    this.strokes = STROKES;
    this.pad = make("canvas", { class: "live-pad", width: 280, height: 280, tabindex: 0, role: "img", "aria-label": this.text.pad });
    this.result = make("div", { class: "live-side" });
    body.append(make("div", {}, this.pad, make("button", { type: "button", onclick: () => this.clear() }, this.text.clear)), this.result);
    this.draw();
    if (!live.own) this.show(FIRST);
    this.listen();
  }

  listen() {
    const at = (event) => {
      const box = this.pad.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * 28 - 0.5, ((event.clientY - box.top) / box.height) * 28 - 0.5];
    };
    this.pad.addEventListener("pointerdown", (event) => {
      this.pad.setPointerCapture(event.pointerId);
      if (this.strokes === STROKES) this.strokes = [];
      this.strokes.push([at(event)]);
      this.drawing = true;
      this.draw();
    });
    this.pad.addEventListener("pointermove", (event) => {
      if (!this.drawing) return;
      this.strokes.at(-1).push(at(event));
      this.draw();
      this.run();
    });
    this.pad.addEventListener("pointerup", () => { this.drawing = false; this.run(); });
  }

  clear() {
    this.strokes = [];
    this.draw();
    this.result.replaceChildren();
  }

  draw() {
    const pen = this.pad.getContext("2d");
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, 280, 280);
    rasterise(this.strokes).forEach((ink, i) => {
      if (!ink) return;
      pen.fillStyle = `rgb(${255 * ink} ${255 * ink} ${255 * ink})`;
      pen.fillRect(10 * (i % 28), 10 * Math.floor(i / 28), 10, 10);
    });
  }

  run() {
    if (!this.strokes.length) return null;
    return this.live.ask("classify", { pixels: centred(this.strokes) }, (found) => this.show(found));
  }

  show({ probabilities, hidden }) {
    const list = probabilities.map((share, digit) => ({ text: String(digit), share }));
    const layers = hidden.map((states, n) => {
      const most = Math.max(...states, 1e-9);
      const cells = states.map((state) => make("i", { style: `--heat: ${state / most}` }));
      return [make("p", { class: "live-state" }, this.text.hidden(n + 1, states.filter((state) => state > 0).length)), make("div", { class: "live-units", "aria-hidden": "true" }, cells)];
    });
    this.result.replaceChildren(bars(list), ...layers.flat());
  }
}
