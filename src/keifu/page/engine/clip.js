// CLIP (Radford et al., 2021): one Transformer reads pictures, one reads texts, and both end in one space.

import { Module, add, checkLength, gelu, watching } from "./layers.js";
import { ModelError } from "./tensors.js";

const quickGelu = (x) => x / (1 + Math.exp(-1.702 * x));
const ACTIVATIONS = { gelu, quick_gelu: quickGelu };

class Tower extends Module {
  constructor(tensors, config, prefix) {
    super(tensors, config, prefix);
    if (!(config.hidden_act in ACTIVATIONS)) throw new ModelError(`The engine knows no activation ${config.hidden_act}.`);
    this.activation = ACTIVATIONS[config.hidden_act];
    this.dim = config.hidden_size;
    this.nLayers = config.num_hidden_layers;
    this.nHeads = config.num_attention_heads;
  }

  blocks(x, { causal = null, watch = {} } = {}) {
    for (let layer = 0; layer < this.nLayers; layer++) {
      const name = `encoder.layers.${layer}`;
      const names = ["q", "k", "v", "out"].map((part) => `${name}.self_attn.${part}_proj`);
      const looked = { causal, watch: watching(watch.attention, layer) };
      x = add(x, this.attention(this.norm(x, `${name}.layer_norm1`), names, looked));
      const inner = this.linear(this.norm(x, `${name}.layer_norm2`), `${name}.mlp.fc1`).map(this.activation);
      x = add(x, this.linear(inner, `${name}.mlp.fc2`));
    }
    return x;
  }
}

export class TextTower extends Tower {
  // The states of all tokens after the last norm.
  encode(ids) {
    checkLength(ids.length, this.config.max_position_embeddings);
    const words = this.rows("embeddings.token_embedding.weight", ids);
    const positions = this.rows("embeddings.position_embedding.weight", ids.map((_, i) => i));
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
    const patches = this.linear(rows, "embeddings.patch_embedding", false);
    const x = new Float32Array(this.dim + patches.length);
    x.set(this.get("embeddings.class_embedding"));
    x.set(patches, this.dim);
    const positions = this.get("embeddings.position_embedding.weight");
    return this.blocks(this.norm(add(x, positions), "pre_layrnorm"), options);
  }
}

const unit = (x) => {
  const length = Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
  return x.map((value) => value / length);
};

export class CLIP extends Module {
  constructor(tensors, config) {
    super(tensors, config);
    this.text = new TextTower(tensors, config.text_config, "text_model.");
    this.image = new ImageTower(tensors, config.vision_config, "vision_model.");
  }

  // An embedding of length 1; ids end with the token that ends a caption.
  encodeText(ids) {
    const end = ids.indexOf(this.text.config.eos_token_id) * this.text.dim;
    return unit(this.linear(this.text.encode(ids).slice(end, end + this.text.dim), "text_projection", false));
  }

  encodeImage(pixels, options) {
    const first = this.image.encode(pixels, options).slice(0, this.image.dim);
    return unit(this.linear(this.image.norm(first, "post_layernorm"), "visual_projection", false));
  }

  // The logit of a picture and a text: the cosine of their embeddings, scaled.
  logit(image, text) {
    const scale = Math.exp(this.get("logit_scale")[0]);
    return scale * image.reduce((sum, value, i) => sum + value * text[i], 0);
  }
}
