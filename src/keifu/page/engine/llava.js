// LLaVA (Liu et al., 2023): the patches of a picture become tokens of the prompt of a language model.

import { ImageTower } from "./clip.js";
import { Module, gelu } from "./layers.js";
import { Llama } from "./llama.js";
import { ModelError } from "./tensors.js";

export class Llava extends Module {
  constructor(tensors, config) {
    super(tensors, config);
    if (config.vision_feature_layer !== -1 || config.vision_feature_select_strategy !== "full") {
      throw new ModelError("The engine's LLaVA reads the last states of all patches, and this model others.");
    }
    this.decoder = new Llama(tensors, config.text_config, "language_model.");
    this.tower = new ImageTower(tensors, config.vision_config, "vision_tower.");
    this.imageToken = config.image_token_index;
    this.imageTokens = (config.vision_config.image_size / config.vision_config.patch_size) ** 2 + 1;
  }

  // The embeddings of a picture's tokens: [imageTokens, dim].
  encodeImage(pixels) {
    const first = this.linear(this.tower.encode(pixels), "multi_modal_projector.linear_1").map(gelu);
    return this.linear(first, "multi_modal_projector.linear_2");
  }

  // The embeddings of a prompt in which one token stands for the picture.
  embed(ids, image) {
    const at = ids.indexOf(this.imageToken);
    const [before, after] = [ids.slice(0, at), ids.slice(at + 1)].map((part) => this.decoder.embed(part));
    const x = new Float32Array(before.length + image.length + after.length);
    x.set(before);
    x.set(image, before.length);
    x.set(after, before.length + image.length);
    if (x.length / this.decoder.dim > this.decoder.contextLength) throw new ModelError(`The question is too long: the model reads ${this.decoder.contextLength} tokens.`);
    return x;
  }
}
