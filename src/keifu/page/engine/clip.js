// CLIP (Radford et al., 2021): one Transformer reads pictures, one reads texts, and both end in one space.

import { ModelError, add, attend, gelu, layerNorm } from "./tensors.js";

const quickGelu = (x) => x / (1 + Math.exp(-1.702 * x));
const ACTIVATIONS = { gelu, quick_gelu: quickGelu };

class Tower {
  constructor(tensors, config, prefix) {
    if (!(config.hidden_act in ACTIVATIONS)) throw new ModelError(`The engine knows no activation ${config.hidden_act}.`);
    Object.assign(this, { tensors, config, prefix, activation: ACTIVATIONS[config.hidden_act] });
    this.dim = config.hidden_size;
    this.nLayers = config.num_hidden_layers;
    this.nHeads = config.num_attention_heads;
  }

  linear(x, name) {
    return this.tensors.linear(x, `${this.prefix}${name}.weight`, `${this.prefix}${name}.bias`);
  }

  norm(x, name) {
    const [weight, bias] = ["weight", "bias"].map((part) => this.tensors.get(`${this.prefix}${name}.${part}`));
    return layerNorm(x, weight, bias, this.config.layer_norm_eps);
  }

  blocks(x, { causal = null, watch = {} } = {}) {
    const n = x.length / this.dim;
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `encoder.layers.${layer}`;
      const normed = this.norm(x, `${name}.layer_norm1`);
      const [q, k, v] = ["q", "k", "v"].map((part) => this.linear(normed, `${name}.self_attn.${part}_proj`));
      const look = watch.attention && ((head, t, row) => watch.attention(layer, head, t, row));
      const mixed = attend(q, k, v, { n, seen: n, nHeads: this.nHeads, causal, watch: look });
      x = add(x, this.linear(mixed, `${name}.self_attn.out_proj`));
      const inner = this.linear(this.norm(x, `${name}.layer_norm2`), `${name}.mlp.fc1`).map(this.activation);
      x = add(x, this.linear(inner, `${name}.mlp.fc2`));
    }
    return x;
  }
}

export class TextTower extends Tower {
  // The states of all tokens after the last norm.
  encode(ids) {
    if (ids.length > this.config.max_position_embeddings) throw new ModelError(`The text has ${ids.length} tokens, and the model reads ${this.config.max_position_embeddings}: shorten it.`);
    const words = this.tensors.rows(`${this.prefix}embeddings.token_embedding.weight`, ids);
    const positions = this.tensors.rows(`${this.prefix}embeddings.position_embedding.weight`, ids.map((_, i) => i));
    return this.norm(this.blocks(add(words, positions), { causal: 0 }), "final_layer_norm");
  }
}

export class ImageTower extends Tower {
  // The states of the class token and of each patch. pixels: [3, side, side], normalised.
  encode(pixels, options) {
    const { image_size: side, patch_size: patch, num_channels: channels } = this.config;
    if (pixels.length !== channels * side ** 2) throw new ModelError(`The picture has ${pixels.length} numbers, and the model reads ${channels * side ** 2}.`);
    const grid = side / patch;
    const rows = new Float32Array(grid * grid * channels * patch * patch);
    let at = 0;
    for (let top = 0; top < grid; top++) for (let left = 0; left < grid; left++) for (let c = 0; c < channels; c++) {
      for (let i = 0; i < patch; i++) for (let j = 0; j < patch; j++) rows[at++] = pixels[(c * side + top * patch + i) * side + left * patch + j];
    }
    const patches = this.tensors.linear(rows, `${this.prefix}embeddings.patch_embedding.weight`);
    const x = new Float32Array(this.dim + patches.length);
    x.set(this.tensors.get(`${this.prefix}embeddings.class_embedding`));
    x.set(patches, this.dim);
    const positions = this.tensors.get(`${this.prefix}embeddings.position_embedding.weight`);
    return this.blocks(this.norm(add(x, positions), "pre_layrnorm"), options);
  }
}

const unit = (x) => {
  const length = Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
  return x.map((value) => value / length);
};

export class CLIP {
  constructor(tensors, config) {
    this.tensors = tensors;
    this.text = new TextTower(tensors, config.text_config, "text_model.");
    this.image = new ImageTower(tensors, config.vision_config, "vision_model.");
  }

  // An embedding of length 1; ids end with the token that ends a caption.
  encodeText(ids) {
    const end = ids.indexOf(this.text.config.eos_token_id) * this.text.dim;
    return unit(this.tensors.linear(this.text.encode(ids).slice(end, end + this.text.dim), "text_projection.weight"));
  }

  encodeImage(pixels, options) {
    const first = this.image.encode(pixels, options).slice(0, this.image.dim);
    return unit(this.tensors.linear(this.image.norm(first, "post_layernorm"), "visual_projection.weight"));
  }

  // The logit of a picture and a text: the cosine of their embeddings, scaled.
  logit(image, text) {
    const scale = Math.exp(this.tensors.get("logit_scale")[0]);
    return scale * image.reduce((sum, value, i) => sum + value * text[i], 0);
  }
}
