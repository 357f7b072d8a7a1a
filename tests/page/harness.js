// What the tests call in the page: the engine's numbers as plain lists.

import { ACTIONS } from "/engine/actions.js";
import { readModel } from "/engine/models.js";
import { normalise } from "/engine/pictures.js";

const FILES = { // of a model's folder
  text: ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"],
  pictures: ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"],
  numbers: ["config.json", "model.safetensors"],
  ddpm: ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"],
  latent: [
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
  ],
};
const KINDS = { network: "numbers", neuron: "numbers", digits: "ddpm", emoji: "latent", "emoji-clip": "pictures", see: "pictures" };
const loaded = new Map();

async function bytes(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.arrayBuffer();
}

async function compiled(kernel) {
  return kernel ? WebAssembly.compile(await bytes("/engine/kernel.wasm")) : null;
}

async function model(name, kernel) {
  const key = `${name} ${kernel}`;
  if (!loaded.has(key)) {
    const files = {};
    for (const file of FILES[KINDS[name] ?? "text"]) files[file] = await bytes(`/models/${name}/${file}`);
    loaded.clear(); // one at a time: memory is not what is tested here
    loaded.set(key, await readModel(files, await compiled(kernel)));
  }
  return loaded.get(key);
}

export async function encode(kernel, name, texts, options) {
  const { tokenizer } = await model(name, kernel);
  return texts.map((text) => tokenizer.encode(text, options));
}

export async function decode(kernel, name, ids) {
  return (await model(name, kernel)).tokenizer.decode(ids);
}

// The logits after each part of a text: the whole prompt, then token by token.
export async function decoderLogits(kernel, name, prompt, rest) {
  const { model: decoder } = await model(name, kernel);
  const state = decoder.start();
  return [prompt, ...rest.map((id) => [id])].map((ids) => [...decoder.next(ids, state)]);
}

export async function greedy(kernel, name, ids, count) {
  const { model: decoder } = await model(name, kernel);
  const state = decoder.start();
  const written = [];
  for (let input = ids; written.length < count; input = [written.at(-1)]) {
    const logits = decoder.next(input, state);
    written.push(logits.indexOf(Math.max(...logits)));
  }
  return written;
}

export async function likeliestText(kernel, name, text, beams) {
  return ACTIONS.search(await model(name, kernel), { text, beams, maxTokens: 12 });
}

export async function maskedLogits(kernel, name, ids) {
  const { model: bert } = await model(name, kernel);
  const states = bert.encode(ids);
  return { words: [...bert.words(states)], follows: [...bert.follows(states)] };
}

export async function translatorLogits(kernel, name, source, target) {
  const { model: transformer } = await model(name, kernel);
  return [...transformer.next(target, transformer.start(source))[0]];
}

export async function translate(kernel, name, sentences, beams) {
  const { model: transformer, tokenizer } = await model(name, kernel);
  return sentences.map((sentence) => {
    const { tokens, score } = transformer.translate([...tokenizer.encode(sentence), transformer.config.eos_token_id], { beams });
    return { text: tokenizer.decode(tokens), score };
  });
}

export async function networkLogits(kernel, pixels) {
  return [...(await model("network", kernel)).model.forward(pixels)];
}

export async function neuron(kernel, inputs) {
  const { model: perceptron } = await model("neuron", kernel);
  return inputs.map((x) => perceptron.sum(x));
}

const channelsLast = (x, channels) => Float32Array.from(x, (_, i) => x[(i % channels) * (x.length / channels) + Math.floor(i / channels)]);
const channelsFirst = (x, channels) => Array.from(x, (_, i) => x[(i % (x.length / channels)) * channels + Math.floor(i / (x.length / channels))]);

export async function drawDigit(kernel, noise, label, options) {
  const { model: ddpm } = await model("digits", kernel);
  let last;
  for (const step of ddpm.draw(Float32Array.from(noise), label, options)) last = step.x;
  return [...last];
}

export async function drawEmoji(kernel, noise, text, options) {
  const { model: latent, tokenizer } = await model("emoji", kernel);
  const [given, without] = [text, ""].map((words) => latent.context(tokenizer.encode(words, { special: true }), tokenizer.id("<|endoftext|>")));
  let last;
  for (const step of latent.draw(channelsLast(noise, latent.channels), given, without, options)) last = step.x;
  return { context: [...given], latents: channelsFirst(last, latent.channels), pixels: channelsFirst(latent.decode(last).x, 3) };
}

export async function clipLogits(kernel, rgba, texts) {
  const { model: clip, tokenizer, pixels } = await model("emoji-clip", kernel);
  const image = clip.encodeImage(normalise(rgba, pixels));
  return texts.map((text) => clip.logit(image, clip.encodeText(tokenizer.encode(text, { special: true }))));
}

export async function seenLogits(kernel, rgba, prompt) {
  const { model: llava, tokenizer, pixels } = await model("see", kernel);
  const image = llava.encodeImage(normalise(rgba, pixels));
  const ids = tokenizer.encode(prompt, { allowSpecial: true });
  return [...llava.decoder.next([], llava.decoder.start(), { inputs: llava.embed(ids, image) })];
}

// The sentence with which files are refused. change: { name, cut: bytes left } or { name, text }.
export async function refusal(kernel, name, change) {
  const files = {};
  for (const file of FILES[KINDS[name] ?? "text"]) files[file] = await bytes(`/models/${name}/${file}`);
  if ("cut" in change) files[change.name] = files[change.name].slice(0, change.cut);
  if ("text" in change) files[change.name] = new TextEncoder().encode(change.text).buffer;
  try {
    await readModel(files, await compiled(kernel));
    return null;
  } catch (error) {
    return `${error.constructor.name}: ${error.message}`;
  }
}
