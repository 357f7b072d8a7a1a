// BERT (Devlin et al., 2018): an encoder that sees both sides of a word, and fills in words that are hidden.

import { Module, add, checkActivation, checkLength, gelu, watching } from "./layers.js";

export class BERT extends Module {
  constructor(tensors, config) {
    super(tensors, config);
    checkActivation("BERT", "gelu", config.hidden_act);
    this.dim = config.hidden_size;
    this.nLayers = config.num_hidden_layers;
    this.nHeads = config.num_attention_heads;
    this.contextLength = config.max_position_embeddings;
    this.embedding = "bert.embeddings.word_embeddings.weight";
    tensors.entry(this.embedding);
  }

  // The state of each token after the last layer: [n, dim].
  encode(ids, { segments = ids.map(() => 0), watch = {}, off = () => null } = {}) {
    checkLength(ids.length, this.contextLength);
    const words = this.rows(this.embedding, ids);
    const positions = this.rows("bert.embeddings.position_embeddings.weight", ids.map((_, i) => i));
    const types = this.rows("bert.embeddings.token_type_embeddings.weight", segments);
    let x = this.norm(add(add(words, positions), types), "bert.embeddings.LayerNorm");
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `bert.encoder.layer.${layer}`;
      const names = ["self.query", "self.key", "self.value", "output.dense"].map((part) => `${name}.attention.${part}`);
      const mixed = this.attention(x, names, { off: off(layer), watch: watching(watch.attention, layer) });
      x = this.norm(add(x, mixed), `${name}.attention.output.LayerNorm`);
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
