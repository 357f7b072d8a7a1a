// The live elements of the documentation: <div data-live="NAME" data-files="..." data-bytes="..."></div>. Each shows a
// first frame at once, and loads its model after a click. data-state: idle, loading, running, done or error.

import { Client } from "./client.js";
import { make } from "./ui.js";

const MODULES = {
  perceptron: "perceptron", network: "network", "gpt-en": "decoder", "bert-en": "masked", "ja-en": "translator", digits: "digits",
  "chat-en": "chat", emoji: "painter", see: "seer", xor: "backpropagation", points: "points", decoding: "decoding", comparison: "comparison", "emoji-clip": "matcher",
  pairs: "pairs", descent: "descent", steps: "steps", heads: "heads", search: "search", flow: "flow",
  score: "score", adversaries: "adversaries",
};
const WORDS = {
  en: { try: "Try it here", again: "Run", load: (share) => `Loading, ${share}%`, run: "Computing", stop: "Stop", ask: "Three things to try", own: (kind) => `Your own model (${kind}), on this device alone: nothing that you write leaves the page.` },
  ja: { try: "ここで試す", again: "実行", load: (share) => `読み込み中、${share}%`, run: "計算中", stop: "停止", ask: "試してみること三つ", own: (kind) => `あなたのモデル（${kind}）です。この端末の中だけで動き、書いたことはページの外に出ません。` },
};

export class Live {
  constructor(root) {
    this.root = root;
    this.language = document.documentElement.lang.startsWith("ja") ? "ja" : "en";
    this.words = WORDS[this.language];
    this.name = root.dataset.live;
    this.own = "own" in root.dataset; // a page of `keifu convert --to web`: no first frame, no questions
    this.files = (root.dataset.files ?? "").split(" ").filter(Boolean);
    this.bytes = Number(root.dataset.bytes ?? 0);
    this.clients = []; // one for each model
    this.pending = null;
  }

  async mount() {
    const { Element, WORDS: words } = await import(`./elements/${MODULES[this.name]}.js`);
    this.text = words[this.language];
    this.body = make("div", { class: "live-body" });
    this.button = make("button", { type: "button", class: "live-run", "data-live-run": true, onclick: () => this.click() }, this.runLabel());
    this.message = make("p", { class: "live-message", role: "status" });
    const questions = (this.own ? [] : this.text.questions).map(([question, answer]) => make("details", {}, make("summary", {}, question), make("p", {}, answer)));
    this.root.replaceChildren(
      this.body, make("div", { class: "live-line" }, this.button, this.message), make("p", { class: "live-about" }, this.own ? this.words.own(this.root.dataset.kind) : this.text.about),
      ...(questions.length ? [make("p", { class: "live-ask" }, this.words.ask)] : []), ...questions,
    );
    this.root.classList.add("live");
    this.element = new Element(this, this.body);
    this.set("idle");
  }

  runLabel() {
    if (!this.bytes) return this.text.run ?? this.words.try;
    const size = `${(this.bytes / 1e6).toFixed(1)} MB`;
    return this.language === "ja" ? `${this.words.try}（${size}）` : `${this.words.try} (${size})`;
  }

  set(state, message = "") {
    this.root.dataset.state = state;
    this.root.dataset.message = message;
    this.message.textContent = message;
    this.root.setAttribute("aria-busy", String(state === "loading" || state === "running"));
  }

  get ready() { return !this.bytes || this.clients.length > 0; }
  get busy() { return ["loading", "running"].includes(this.root.dataset.state); }

  async fail({ message }) {
    const translated = this.language === "ja" && (await import("./japanese.js").catch(() => null));
    this.set("error", translated ? translated.inJapanese(message) : message);
  }

  // A click on the button: load the model, run, or stop what runs.
  async click() {
    if (this.root.dataset.state === "loading") return;
    if (this.root.dataset.state === "running") {
      this.pending = null;
      this.stopped = true;
      for (const client of this.clients) client.stop();
      return;
    }
    this.stopped = false;
    if (!this.ready && !(await this.load())) return;
    await this.element.run();
  }

  async load() {
    const clients = [];
    const models = [...new Set(this.files.map((path) => path.split("/")[0]))];
    let before = 0; // bytes of the models that are there
    const cache = this.root.dataset.state === "error" ? "reload" : "default";
    this.set("loading", this.words.load(0));
    try {
      for (const model of models) {
        let latest = 0;
        const files = this.files.filter((path) => path.startsWith(`${model}/`)).map((path) => path.slice(model.length + 1));
        clients.push(new Client(new URL("./", import.meta.url)));
        const loaded = await clients.at(-1).load(model, files, (bytes) => {
          latest = bytes;
          const share = this.words.load(Math.min(100, Math.round((100 * (before + bytes)) / this.bytes)));
          if (share !== this.message.textContent) this.set("loading", share);
        }, cache);
        before += latest;
        this.root.dataset.kernel = String(loaded.kernel);
      }
      this.clients = clients;
      this.set("idle");
      return true;
    } catch (error) {
      for (const client of clients) client.end();
      await this.fail(error);
      return false;
    }
  }

  // Ask a model, by its number. While it computes, the newest question waits, and older ones are dropped.
  async ask(action, options, show, progress = null, model = 0) {
    if (!this.ready) return;
    if (this.busy) {
      this.pending = [action, options, show, progress, model];
      return;
    }
    this.set("running", this.words.run);
    this.button.textContent = this.words.stop;
    try {
      const started = performance.now();
      show(await this.clients[model].ask(action, options, progress));
      this.set("done", this.element.done?.(performance.now() - started) ?? "");
    } catch (error) {
      await this.fail(error);
    }
    this.button.textContent = this.text.run ?? this.words.again;
    const waiting = this.pending;
    this.pending = null;
    if (waiting) await this.ask(...waiting);
  }
}

for (const root of document.querySelectorAll("[data-live]")) {
  const live = new Live(root);
  live.mount().catch((error) => {
    root.dataset.state = "error";
    root.dataset.message = root.textContent = error.message;
  });
}
