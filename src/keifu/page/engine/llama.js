// LLaMA (Touvron et al., 2023): a decoder with RMSNorm, rotary positions and a gated feed-forward network. GPT-2's
// place in the lineage is the same: read the tokens so far, predict the next one. Keys and values are kept in a state.

import { ModelError, add, attend, rmsNorm, silu } from "./tensors.js";

export class Llama {
  // prefix: what comes before "model." in the names of the weights
  constructor(tensors, config, prefix = "") {
    const scaling = config.rope_scaling?.rope_type ?? config.rope_parameters?.rope_type ?? "default";
    if (scaling !== "default") throw new ModelError(`The engine knows no rotary positions of the type ${scaling}.`);
    if (config.hidden_act !== "silu") throw new ModelError(`The engine's LLaMA has the activation silu, and this model ${config.hidden_act}.`);
    Object.assign(this, { tensors, config, prefix });
    this.dim = config.hidden_size;
    this.nLayers = config.num_hidden_layers;
    this.nHeads = config.num_attention_heads;
    this.nKvHeads = config.num_key_value_heads ?? this.nHeads;
    this.headDim = config.head_dim ?? this.dim / this.nHeads;
    this.contextLength = config.max_position_embeddings;
    this.embedding = `${prefix}model.embed_tokens.weight`;
    this.head = tensors.has(`${prefix}lm_head.weight`) ? `${prefix}lm_head.weight` : this.embedding;
    tensors.entry(this.embedding);
  }

  start() {
    const room = () => Array.from({ length: this.nLayers }, () => new Float32Array(this.contextLength * this.nKvHeads * this.headDim));
    return { length: 0, keys: room(), values: room() };
  }

  // Turn the pairs (i, i + headDim / 2) of each head by an angle that grows with the position (Su et al., 2021).
  rotate(x, start, nHeads) {
    const [half, theta] = [this.headDim / 2, this.config.rope_theta ?? this.config.rope_parameters?.rope_theta ?? 10000];
    for (let row = 0; row * nHeads * this.headDim < x.length; row++) {
      for (let i = 0; i < half; i++) {
        const angle = (start + row) * theta ** ((-2 * i) / this.headDim);
        const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
        for (let head = 0; head < nHeads; head++) {
          const at = (row * nHeads + head) * this.headDim + i;
          const [a, b] = [x[at], x[at + half]];
          x[at] = a * cos - b * sin;
          x[at + half] = b * cos + a * sin;
        }
      }
    }
  }

  // The last hidden states of new tokens; the state gains their keys and values. inputs: embeddings instead of tokens.
  // watch.attention(layer, head, position, probabilities), watch.hidden(layer, states); off(layer): heads switched off.
  hidden(ids, state, { watch = {}, off = () => null, inputs = null } = {}) {
    const { tensors, config: { rms_norm_eps: eps }, nHeads, nKvHeads } = this;
    let x = inputs ?? tensors.rows(this.embedding, ids);
    const [n, start] = [x.length / this.dim, state.length];
    if (start + n > this.contextLength) throw new ModelError(`The text has ${start + n} tokens, and the model reads ${this.contextLength}: shorten it.`);
    const [seen, kvWidth] = [start + n, nKvHeads * this.headDim];
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `${this.prefix}model.layers.${layer}`;
      const bias = tensors.has(`${name}.self_attn.q_proj.bias`);
      const project = (y, part) => tensors.linear(y, `${name}.self_attn.${part}_proj.weight`, bias ? `${name}.self_attn.${part}_proj.bias` : null);
      const normed = rmsNorm(x, tensors.get(`${name}.input_layernorm.weight`), eps);
      const [q, k, v] = ["q", "k", "v"].map((part) => project(normed, part));
      this.rotate(q, start, nHeads);
      this.rotate(k, start, nKvHeads);
      state.keys[layer].set(k, start * kvWidth);
      state.values[layer].set(v, start * kvWidth);
      const [keys, values] = [state.keys[layer], state.values[layer]].map((all) => all.subarray(0, seen * kvWidth));
      const look = watch.attention && ((head, t, row) => watch.attention(layer, head, start + t, row));
      const mixed = attend(q, keys, values, { n, seen, nHeads, nKvHeads, causal: start, off: off(layer), watch: look });
      x = add(x, tensors.linear(mixed, `${name}.self_attn.o_proj.weight`));
      const inner = rmsNorm(x, tensors.get(`${name}.post_attention_layernorm.weight`), eps);
      const gate = tensors.linear(inner, `${name}.mlp.gate_proj.weight`);
      const up = tensors.linear(inner, `${name}.mlp.up_proj.weight`);
      for (let i = 0; i < gate.length; i++) gate[i] = silu(gate[i]) * up[i];
      x = add(x, tensors.linear(gate, `${name}.mlp.down_proj.weight`));
      watch.hidden?.(layer, x);
    }
    state.length += n;
    return x;
  }

  logits(hidden) {
    const normed = rmsNorm(hidden, this.tensors.get(`${this.prefix}model.norm.weight`), this.config.rms_norm_eps);
    return this.tensors.linear(normed, this.head);
  }

  // The logits of the token after the last one.
  next(ids, state, options) {
    return this.logits(this.hidden(ids, state, options).slice(-this.dim));
  }
}
