// LLaMA (Touvron et al., 2023): a decoder with RMSNorm, rotary positions and a gated feed-forward network. GPT-2's
// place in the lineage is the same: read the tokens so far, predict the next one. Keys and values are kept in a state.

import { Module, add, attend, checkActivation, checkLength, rmsNorm, silu, watching } from "./layers.js";
import { ModelError } from "./tensors.js";

export class Llama extends Module {
  constructor(tensors, config, prefix = "") {
    super(tensors, config, prefix);
    const scaling = config.rope_scaling?.rope_type ?? config.rope_parameters?.rope_type ?? "default";
    if (scaling !== "default") throw new ModelError(`The engine knows no rotary positions of the type ${scaling}.`);
    checkActivation("LLaMA", "silu", config.hidden_act);
    this.dim = config.hidden_size;
    this.nLayers = config.num_hidden_layers;
    this.nHeads = config.num_attention_heads;
    this.nKvHeads = config.num_key_value_heads ?? this.nHeads;
    this.headDim = config.head_dim ?? this.dim / this.nHeads;
    this.contextLength = config.max_position_embeddings;
    this.head = this.has("lm_head.weight") ? "lm_head" : "model.embed_tokens";
    tensors.entry(`${prefix}model.embed_tokens.weight`);
  }

  norm(x, name) { return rmsNorm(x, this.get(`${name}.weight`), this.config.rms_norm_eps); }

  embed(ids) { return this.rows("model.embed_tokens.weight", ids); }

  start() {
    const room = () => Array.from({ length: this.nLayers }, () => new Float32Array(this.contextLength * this.nKvHeads * this.headDim));
    return { length: 0, keys: room(), values: room() };
  }

  // A copy of a state, for a text that goes another way.
  fork({ length, ...parts }) {
    const copies = Object.entries(parts).map(([name, layers]) => [name, layers.map((numbers) => numbers.slice())]);
    return { length, ...Object.fromEntries(copies) };
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
    const { nHeads, nKvHeads } = this;
    let x = inputs ?? this.embed(ids);
    const [n, start] = [x.length / this.dim, state.length];
    checkLength(start + n, this.contextLength);
    const [seen, kvWidth] = [start + n, nKvHeads * this.headDim];
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `model.layers.${layer}`;
      const biased = this.has(`${name}.self_attn.q_proj.bias`);
      const normed = this.norm(x, `${name}.input_layernorm`);
      const [q, k, v] = ["q", "k", "v"].map((part) => this.linear(normed, `${name}.self_attn.${part}_proj`, biased));
      this.rotate(q, start, nHeads);
      this.rotate(k, start, nKvHeads);
      state.keys[layer].set(k, start * kvWidth);
      state.values[layer].set(v, start * kvWidth);
      const [keys, values] = [state.keys[layer], state.values[layer]].map((all) => all.subarray(0, seen * kvWidth));
      const look = watching(watch.attention, layer, start);
      const mixed = attend(q, keys, values, { n, seen, nHeads, nKvHeads, causal: start, off: off(layer), watch: look });
      x = add(x, this.linear(mixed, `${name}.self_attn.o_proj`, false));
      const inner = this.norm(x, `${name}.post_attention_layernorm`);
      const [gate, up] = ["gate", "up"].map((part) => this.linear(inner, `${name}.mlp.${part}_proj`, false));
      for (let i = 0; i < gate.length; i++) gate[i] = silu(gate[i]) * up[i];
      x = add(x, this.linear(gate, `${name}.mlp.down_proj`, false));
      watch.hidden?.(layer, x);
    }
    state.length += n;
    return x;
  }

  logits(hidden) {
    return this.linear(this.norm(hidden, "model.norm"), this.head, false);
  }

  // The logits of the token after the last one.
  next(ids, state, options) {
    return this.logits(this.hidden(ids, state, options).slice(-this.dim));
  }
}
