// The Transformer (Vaswani et al., 2017): an encoder reads the source, a decoder writes the target and looks at it.
// The names of the weights are Marian's. Translations come from beam search.

import { Module, add, attend, checkActivation, relu, watching } from "./layers.js";
import { beamSearch } from "./sampling.js";
import { ModelError } from "./tensors.js";

export class Transformer extends Module {
  constructor(tensors, config) {
    super(tensors, { layer_norm_eps: 1e-5, ...config });
    checkActivation("Transformer", "relu", config.activation_function);
    if (!config.share_encoder_decoder_embeddings) throw new ModelError("The engine's Transformer has one vocabulary for both languages, and this model two.");
    this.dim = config.d_model;
    this.nLayers = config.encoder_layers;
    this.nDecoderLayers = config.decoder_layers;
    this.nHeads = config.encoder_attention_heads;
    this.nDecoderHeads = config.decoder_attention_heads;
    this.contextLength = config.max_position_embeddings;
    this.embedding = "model.shared.weight";
    tensors.entry(this.embedding);
  }

  feedForward(x, name) {
    return this.norm(add(x, this.linear(this.linear(x, `${name}.fc1`).map(relu), `${name}.fc2`)), `${name}.final_layer_norm`);
  }

  // Embeddings plus sinusoids: all sines, then all cosines.
  embed(ids, start) {
    const x = this.rows(this.embedding, ids);
    const [half, scale] = [this.dim / 2, this.config.scale_embedding ? Math.sqrt(this.dim) : 1];
    for (let i = 0; i < x.length; i++) {
      const [position, feature] = [start + Math.floor(i / this.dim), i % this.dim];
      const angle = position / 10000 ** ((2 * (feature % half)) / this.dim);
      x[i] = x[i] * scale + (feature < half ? Math.sin(angle) : Math.cos(angle));
    }
    return x;
  }

  // The encoder's states of the source: [n, dim].
  encode(ids, { watch = {}, off = () => null } = {}) {
    const n = ids.length;
    if (n > this.contextLength) throw new ModelError(`The sentence has ${n} tokens, and the model reads ${this.contextLength}: split it.`);
    let x = this.embed(ids, 0);
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `model.encoder.layers.${layer}`;
      const names = ["q", "k", "v", "out"].map((part) => `${name}.self_attn.${part}_proj`);
      const mixed = this.attention(x, names, { off: off("encoder", layer), watch: watching(watch.encoder, layer) });
      x = this.norm(add(x, mixed), `${name}.self_attn_layer_norm`);
      x = this.feedForward(x, name);
      watch.hidden?.(layer, x);
    }
    return x;
  }

  // The state of a decoder that has written nothing: keys and values of the source, once for all steps.
  start(source, options = {}) {
    const states = this.encode(source, options);
    const layers = Array.from({ length: this.nDecoderLayers }, (_, layer) => `model.decoder.layers.${layer}.encoder_attn`);
    const memory = layers.map((name) => ["k", "v"].map((part) => this.linear(states, `${name}.${part}_proj`)));
    return { length: 0, source: source.length, memory, keys: layers.map(() => new Float32Array(0)), values: layers.map(() => new Float32Array(0)) };
  }

  // The logits of the token after these; returns them with the new state, and leaves the old one as it is.
  next(ids, state, { watch = {}, off = () => null } = {}) {
    const [n, start, nHeads] = [ids.length, state.length, this.nDecoderHeads];
    const grown = { ...state, length: start + n, keys: [], values: [] };
    let x = this.embed(ids, start);
    for (let layer = 0; layer < this.nDecoderLayers; layer++) {
      const name = `model.decoder.layers.${layer}`;
      const [q, k, v] = ["q", "k", "v"].map((part) => this.linear(x, `${name}.self_attn.${part}_proj`));
      const [keys, values] = [append(state.keys[layer], k), append(state.values[layer], v)];
      grown.keys.push(keys);
      grown.values.push(values);
      const self = attend(q, keys, values, { n, seen: start + n, nHeads, causal: start, off: off("decoder", layer) });
      x = this.norm(add(x, this.linear(self, `${name}.self_attn.out_proj`)), `${name}.self_attn_layer_norm`);
      const cross = { n, seen: state.source, nHeads, off: off("cross", layer), watch: watching(watch.cross, layer, start) };
      const mixed = attend(this.linear(x, `${name}.encoder_attn.q_proj`), ...state.memory[layer], cross);
      x = this.norm(add(x, this.linear(mixed, `${name}.encoder_attn.out_proj`)), `${name}.encoder_attn_layer_norm`);
      x = this.feedForward(x, name);
    }
    const logits = this.tensors.linear(x.slice(-this.dim), this.embedding);
    return [this.has("final_logits_bias") ? add(logits, this.get("final_logits_bias")) : logits, grown];
  }

  // The best target of a source, by beam search.
  translate(source, { beams = 4, maxTokens = source.length + 50, watch = null, ...options } = {}) {
    const { decoder_start_token_id: first, eos_token_id: end, pad_token_id: pad } = this.config;
    const never = [first, pad].filter((id) => id !== end);
    const next = (tokens, state) => this.next(tokens.length ? tokens.slice(-1) : [first], state, options);
    return beamSearch(next, this.start(source, options), { beams, end, never, limit: Math.min(this.contextLength, maxTokens), watch });
  }

  // The decoder's attention to the source, for each written token and the end: rows [layer][head][token].
  align(source, tokens, options = {}) {
    const rows = Array.from({ length: this.nDecoderLayers }, () => Array.from({ length: this.nDecoderHeads }, () => []));
    const watch = { cross: (layer, head, position, row) => { rows[layer][head][position] = row; } };
    this.next([this.config.decoder_start_token_id, ...tokens], this.start(source, options), { ...options, watch });
    return rows;
  }
}

function append(a, b) {
  const joined = new Float32Array(a.length + b.length);
  joined.set(a);
  joined.set(b, a.length);
  return joined;
}
