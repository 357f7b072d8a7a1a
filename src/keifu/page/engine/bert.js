// BERT (Devlin et al., 2018): an encoder that sees both sides of a word, and fills in words that are hidden.

import { ModelError, add, attend, gelu, layerNorm } from "./tensors.js";

export class BERT {
  constructor(tensors, config) {
    if (config.hidden_act !== "gelu") throw new ModelError(`The engine's BERT has the activation gelu, and this model ${config.hidden_act}.`);
    Object.assign(this, { tensors, config });
    this.dim = config.hidden_size;
    this.nLayers = config.num_hidden_layers;
    this.nHeads = config.num_attention_heads;
    this.contextLength = config.max_position_embeddings;
    this.embedding = "bert.embeddings.word_embeddings.weight";
    tensors.entry(this.embedding);
  }

  linear(x, name) {
    return this.tensors.linear(x, `${name}.weight`, `${name}.bias`);
  }

  norm(x, name) {
    return layerNorm(x, this.tensors.get(`${name}.weight`), this.tensors.get(`${name}.bias`), this.config.layer_norm_eps);
  }

  // The state of each token after the last layer: [n, dim].
  encode(ids, { segments = ids.map(() => 0), watch = {}, off = () => null } = {}) {
    const { tensors, nHeads } = this;
    const n = ids.length;
    if (n > this.contextLength) throw new ModelError(`The text has ${n} tokens, and the model reads ${this.contextLength}: shorten it.`);
    const words = tensors.rows(this.embedding, ids);
    const positions = tensors.rows("bert.embeddings.position_embeddings.weight", ids.map((_, i) => i));
    const types = tensors.rows("bert.embeddings.token_type_embeddings.weight", segments);
    let x = this.norm(add(add(words, positions), types), "bert.embeddings.LayerNorm");
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `bert.encoder.layer.${layer}`;
      const [q, k, v] = ["query", "key", "value"].map((part) => this.linear(x, `${name}.attention.self.${part}`));
      const look = watch.attention && ((head, t, row) => watch.attention(layer, head, t, row));
      const mixed = attend(q, k, v, { n, seen: n, nHeads, off: off(layer), watch: look });
      x = this.norm(add(x, this.linear(mixed, `${name}.attention.output.dense`)), `${name}.attention.output.LayerNorm`);
      const inner = this.linear(x, `${name}.intermediate.dense`).map(gelu);
      x = this.norm(add(x, this.linear(inner, `${name}.output.dense`)), `${name}.output.LayerNorm`);
      watch.hidden?.(layer, x);
    }
    return x;
  }

  // The logits of the word at each of the states, by the head that was trained on hidden words.
  words(states) {
    const moved = this.norm(this.linear(states, "cls.predictions.transform.dense").map(gelu), "cls.predictions.transform.LayerNorm");
    return this.tensors.linear(moved, this.embedding, "cls.predictions.bias");
  }

  // Logits of whether the second of two texts follows the first.
  follows(states) {
    const first = this.linear(states.slice(0, this.dim), "bert.pooler.dense").map(Math.tanh);
    return this.linear(first, "cls.seq_relationship");
  }
}
