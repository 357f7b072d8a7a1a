// What a page can ask a model for. An action gets the model (models.js), the options, and `report`, which sends an
// intermediate result and returns a promise of whether to go on. Everything it returns can be cloned into a message.

import { checkLength, softmax } from "./layers.js";
import { normalise, normals } from "./pictures.js";
import { beamSearch, distribution, draw, likeliest } from "./sampling.js";
import { ModelError } from "./tensors.js";

const piece = (tokenizer, id) => (tokenizer.type === "WordPiece" ? tokenizer.names[id] : new TextDecoder().decode(tokenizer.bytes(id)));
const best = (tokenizer, logits, count) => likeliest(logits, count).map(({ id, logP }) => ({ id, text: piece(tokenizer, id), probability: Math.exp(logP) }));

function uniforms(seed) { // numbers in [0, 1) from a seed
  let state = seed >>> 0;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
}

// The tokens of a text; an empty one begins with the token that begins all texts.
function tokensOf({ tokenizer, config }, text) {
  const ids = tokenizer.encode(text);
  return ids.length ? ids : [config.bos_token_id ?? 0];
}

function chatTokens({ tokenizer }, messages) { // ChatML; what people write is plain text
  const [begin, end] = ["<|im_start|>", "<|im_end|>"].map((name) => tokenizer.id(name));
  if (begin === undefined) throw new ModelError("This model holds no conversations: its tokenizer has no <|im_start|>.");
  const turn = ({ role, content }) => [begin, ...tokenizer.encode(`${role}\n`), ...tokenizer.encode(content), end, ...tokenizer.encode("\n")];
  return [...messages.flatMap(turn), begin, ...tokenizer.encode("assistant\n")];
}

// The next token after a text: candidates before and after the settings (a list of them gives `others`), the attention
// of the last token, and the candidates that the state after each layer gives. off: [layer, head] pairs that are switched off; every: the attention
// of every token.
function next(loaded, { text, settings = {}, off = [], count = 12, every = false }) {
  const { model, tokenizer } = loaded;
  const ids = tokensOf(loaded, text);
  const attention = Array.from({ length: model.nLayers }, () => []);
  const lens = [];
  const watch = {
    attention: (layer, head, position, row) => {
      if (every) (attention[layer][head] ??= []).push([...row].slice(0, position + 1));
      else if (position === ids.length - 1) attention[layer][head] = [...row];
    },
    hidden: (layer, x) => lens.push(best(tokenizer, model.logits(x.slice(-model.dim)), 1)[0]),
  };
  const switched = (layer) => new Set(off.filter(([at]) => at === layer).map(([, head]) => head));
  const logits = model.next(ids, model.start(), { watch, off: switched });
  const after = (choice) => distribution(logits, { ...choice, seen: ids });
  const [first, ...others] = [settings].flat().map(after);
  const candidates = best(tokenizer, logits, count).map((each) => ({ ...each, after: first[each.id], others: others.map((shares) => shares[each.id]) }));
  return { tokens: ids.map((id) => piece(tokenizer, id)), candidates, attention, lens };
}

// Text token by token. messages: a conversation, instead of a text. Reports the text so far, and each token's rivals.
// logP: of the text with its end token, if it ended by itself.
async function generate(loaded, { text = "", messages = null, settings = {}, maxTokens = 60, seed = 1 }, report) {
  const { model, tokenizer, config } = loaded;
  const prompt = messages ? chatTokens(loaded, messages) : tokensOf(loaded, text);
  const [state, written, steps, random] = [model.start(), [], [], uniforms(seed)];
  const room = Math.min(maxTokens, model.contextLength - prompt.length);
  if (room < 1) throw new ModelError(`The text has ${prompt.length} tokens, and the model reads ${model.contextLength}: shorten it.`);
  let [logits, logP] = [model.next(prompt, state), 0];
  while (written.length < room) {
    const probabilities = distribution(logits, { ...settings, seen: [...prompt, ...written] });
    const id = draw(probabilities, random());
    const probability = softmax(logits)[id];
    logP += Math.log(probability);
    if (id === config.eos_token_id) break;
    written.push(id);
    steps.push({ text: piece(tokenizer, id), probability, rivals: best(tokenizer, logits, 4) });
    if (!(await report({ text: tokenizer.decode(written), steps }))) break;
    if (written.length < room) logits = model.next([id], state);
  }
  return { text: tokenizer.decode(written), steps, logP };
}

// The text of the highest probability that beam search finds.
function search(loaded, { text = "", beams = 4, maxTokens = 30 }) {
  const { model, tokenizer, config } = loaded;
  const prompt = tokensOf(loaded, text);
  checkLength(prompt.length + 1, model.contextLength);
  const limit = Math.min(maxTokens, model.contextLength - prompt.length);
  const next = (tokens, state) => { // a state is shared by the texts that go on from it
    const own = model.fork(state);
    return [model.next(tokens.length ? tokens.slice(-1) : prompt, own), own];
  };
  const { tokens, logP, ended } = beamSearch(next, model.start(), { beams, end: config.eos_token_id, limit });
  return { text: tokenizer.decode(tokens), tokens, logP, ended };
}

// The candidates for each [MASK] of a text.
function fill({ model, tokenizer }, { text, count = 8 }) {
  const ids = tokenizer.encode(text, { special: true, allowSpecial: true });
  const mask = tokenizer.id("[MASK]");
  const words = model.words(model.encode(ids));
  const width = words.length / ids.length;
  const masks = ids.flatMap((id, at) => (id === mask ? [{ at, candidates: best(tokenizer, words.slice(at * width, (at + 1) * width), count) }] : []));
  if (!masks.length) throw new ModelError("No word is hidden: choose one, or write [MASK] in its place.");
  return { tokens: ids.map((id) => tokenizer.names[id]), masks };
}

// A translation, and what each of its tokens looked at in the source.
function translate({ model, tokenizer, config }, { text, beams = 4, off = [] }) {
  const source = [...tokenizer.encode(text), config.eos_token_id];
  if (source.length === 1) throw new ModelError("There is nothing to translate: write a sentence.");
  const switched = (part, layer) => new Set(off.filter(([name, at]) => name === part && at === layer).map(([, , head]) => head));
  const { tokens, score } = model.translate(source, { beams, off: switched });
  const alignment = model.align(source, tokens, { off: switched }).map((heads) => heads.map((rows) => rows.slice(0, tokens.length).map((row) => [...row])));
  const encoder = Array.from({ length: model.nLayers }, () => Array.from({ length: model.nHeads }, () => []));
  model.encode(source, { off: switched, watch: { encoder: (layer, head, position, row) => { encoder[layer][head][position] = [...row]; } } });
  const names = (ids) => ids.map((id) => piece(tokenizer, id));
  return { text: tokenizer.decode(tokens).trim(), score, source: names(source.slice(0, -1)), target: names(tokens), alignment, encoder };
}

function classify({ model }, { pixels }) {
  const hidden = [];
  const probabilities = model.probabilities(pixels, { hidden: (_, states) => hidden.push([...states]) });
  return { probabilities: [...probabilities], hidden };
}

// A picture from noise. Reports x, the noisy picture, and the picture that the network sees in it.
async function digit({ model }, { label, steps = 20, guidance = 2, seed = 1, noise = null }, report) {
  const x = noise ? Float32Array.from(noise) : normals(model.side ** 2 * model.channels, seed);
  let [state, done] = [{ x, picture: x }, 0];
  for (state of model.draw(x, label, { steps, guidance })) if (!(await report({ ...state, done: ++done, steps }))) break;
  return { x: state.x, picture: state.picture, done, steps, side: model.side };
}

async function emoji({ model, tokenizer }, { text, steps = 20, guidance = 7.5, seed = 1 }, report) {
  const padding = tokenizer.id("<|endoftext|>");
  const [context, without] = [text, ""].map((words) => model.context(tokenizer.encode(words, { special: true }), padding));
  let [state, done] = [{ x: normals(model.side ** 2 * model.channels, seed) }, 0];
  const shown = (latents) => ({ latents, pixels: model.decode(latents).x, side: model.side, channels: model.channels });
  for (state of model.draw(state.x, context, without, { steps, guidance })) {
    done++;
    if (!(await report({ done, steps, ...(done % 4 ? {} : shown(state.picture)) }))) break;
  }
  return { done, steps, ...shown(state.x) };
}

// How well each text fits each picture: shares of the texts for a picture, and logits.
function match({ model, tokenizer, pixels }, { pictures, texts }) {
  const encoded = texts.map((text) => model.encodeText(tokenizer.encode(text, { special: true })));
  const logits = pictures.map((rgba) => {
    const image = model.encodeImage(normalise(rgba, pixels));
    return encoded.map((text) => model.logit(image, text));
  });
  return { logits };
}

async function see({ model, tokenizer, pixels, config }, { rgba, question, maxTokens = 20 }, report) {
  const ids = tokenizer.encode("User:\n<image>\n", { allowSpecial: true }).concat(tokenizer.encode(`${question}\nAssistant:\n`));
  const state = model.decoder.start();
  let logits = model.decoder.next([], state, { inputs: model.embed(ids, model.encodeImage(normalise(rgba, pixels))) });
  const [written, candidates] = [[], best(tokenizer, logits, 5)];
  while (written.length < maxTokens && state.length < model.decoder.contextLength) {
    const [{ id }] = likeliest(logits, 1);
    if (id === config.eos_token_id) break;
    written.push(id);
    if (!(await report({ text: tokenizer.decode(written) }))) break;
    logits = model.decoder.next([id], state);
  }
  return { text: tokenizer.decode(written).trim(), candidates };
}

export const ACTIONS = { next, generate, search, fill, translate, classify, digit, emoji, match, see };
