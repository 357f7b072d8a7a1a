// Writes src/keifu/page/live/first/: what the live elements show before a click. Run it after a packaged model changed:
// node docs/_site/first_frames.mjs

import { readFileSync, writeFileSync } from "node:fs";
import { ACTIONS } from "../../src/keifu/page/engine/actions.js";
import { readModel } from "../../src/keifu/page/engine/models.js";
import { centred } from "../../src/keifu/page/live/elements/network.js";

const root = new URL("../../", import.meta.url);
const TEXT = ["config.json", "model.safetensors", "tokenizer.json"];
const DDPM = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"];
const STROKES = [[[9, 6], [14, 5], [18, 8], [17, 12], [13, 14], [18, 16], [19, 20], [15, 23], [9, 22]]];

function load(name, files) {
  const read = (file) => Uint8Array.from(readFileSync(new URL(`pretrained/src/keifu_pretrained/${name}/${file}`, root))).buffer;
  return readModel(Object.fromEntries(files.map((file) => [file, read(file)])));
}

const rounded = (value) => JSON.parse(JSON.stringify(value, (_, each) => (typeof each === "number" ? Math.round(1e6 * each) / 1e6 : each)));
const grey = ({ x }) => Buffer.from(Uint8Array.from(x, (value) => Math.max(0, Math.min(255, Math.round(127.5 * (1 + value)))))).toString("base64");
const go = async () => true;
const QUESTION = "What is your favourite food?";

async function written(name, prompt) {
  const settings = { temperature: 0.6, topP: 0.95, repetitionPenalty: 1.1 };
  const { text, steps } = await ACTIONS.generate(await load(name, TEXT), { ...prompt, settings, maxTokens: 60, seed: 1 }, go);
  return { text, steps: steps.map(({ probability }) => ({ probability: Math.round(1e4 * probability) / 1e4 })) };
}

const gpt = await load("gpt-en", TEXT);
const shortened = ({ text, logP, ended = false }) => ({ text, logP: Math.round(1e4 * logP) / 1e4, ended });
const likeliest = (options) => shortened(ACTIONS.search(gpt, options));
const nucleus = async (text) => shortened(await ACTIONS.generate(gpt, { text, settings: { topP: 0.9 }, maxTokens: 30, seed: 1 }, go));

const FIRST = {
  network: rounded(ACTIONS.classify(await load("network", TEXT.slice(0, 2)), { pixels: centred(STROKES) })),
  decoder: rounded(ACTIONS.next(await load("gpt-en", TEXT), { text: "The city was founded in the" })),
  decoding: rounded(ACTIONS.next(await load("gpt-en", TEXT), { text: "The city was founded in the", settings: [{ temperature: 0.7 }, { topK: 5 }, { topP: 0.9 }, { minP: 0.1 }] })),
  heads: rounded(ACTIONS.next(await load("gpt-en", TEXT), { text: "The cat sat on the mat because it was tired", every: true })),
  steps: [],
  comparison: [await written("gpt-en", { text: `${QUESTION}\n` }), await written("chat-en", { messages: [{ role: "user", content: QUESTION }] })],
  masked: rounded(ACTIONS.fill(await load("bert-en", TEXT), { text: "The book was [MASK] by an American author." })),
  search: [...[1, 4].map((beams) => likeliest({ text: "The city was founded in the", beams })), await nucleus("The city was founded in the")],
  translator: rounded(ACTIONS.translate(await load("ja-en", TEXT), { text: "猫はテーブルの下で寝ています。" })),
  digits: grey(await ACTIONS.digit(await load("digits", DDPM), { label: 3, steps: 20, guidance: 2, seed: 1 }, go)),
};
const rows = (heads) => heads.map((head) => head.map((row) => row.map((share) => Math.round(1e3 * share) / 1e3)));
FIRST.heads = { tokens: FIRST.heads.tokens, attention: FIRST.heads.attention.map(rows) };
for (const steps of [1, 2, 4, 8, 16]) FIRST.steps.push(grey(await ACTIONS.digit(await load("digits", DDPM), { label: 3, steps, guidance: 2, seed: 1 }, go)));
FIRST.decoding = { candidates: FIRST.decoding.candidates };
delete FIRST.translator.encoder; // long, and there after a click
FIRST.network.hidden = FIRST.network.hidden.map((states) => states.map((state) => Math.ceil(100 * state) / 100));
for (const [name, frame] of Object.entries(FIRST)) {
  const head = "// What this element shows before a click; written by `node docs/_site/first_frames.mjs`.\n\n";
  writeFileSync(new URL(`src/keifu/page/live/first/${name}.js`, root), `${head}export const FIRST = ${JSON.stringify(frame)};\n`);
}
