// Latent diffusion (Rombach et al., 2022): the U-Net works on the latents of an autoencoder, and attends to a text.

import { TextTower } from "./clip.js";
import { Noise, UNet, ddim, doubled, guide } from "./ddpm.js";
import { add, gelu, layerNorm, silu } from "./layers.js";

class ConditionedUNet extends UNet {
  hasAttention(name) { return this.has(`${name}.proj_in.weight`); }

  // A transformer between pixels, which attends to the context after itself.
  attendAt(input, name) {
    const n = input.side ** 2;
    const block = `${name}.transformer_blocks.0`;
    const norm = (x, i) => layerNorm(x, ...["weight", "bias"].map((kind) => this.get(`${block}.norm${i}.${kind}`)), 1e-5);
    let x = this.linear(this.norm(input, `${name}.norm`, { eps: 1e-6 }).x, `${name}.proj_in`);
    for (const [i, context] of [null, this.context].entries()) {
      const names = ["q", "k", "v", "out.0"].map((kind) => `${block}.attn${i + 1}.to_${kind}`);
      const options = { n, seen: context ? this.contextLength : n, nHeads: this.config.attention_head_dim }; // diffusers' name of the heads
      const normed = norm(x, i + 1);
      x = add(x, this.attention(normed, names, { source: context ?? normed, ...options }));
    }
    const both = this.linear(norm(x, 3), `${block}.ff.net.0.proj`);
    const width = both.length / n / 2;
    const gated = Float32Array.from({ length: n * width }, (_, i) => {
      const at = Math.floor(i / width) * 2 * width + (i % width);
      return both[at] * gelu(both[at + width]);
    });
    x = add(x, this.linear(gated, `${block}.ff.net.2`));
    return { ...input, x: add(input.x, this.linear(x, `${name}.proj_out`)) };
  }
}

class Decoder extends UNet { // of the autoencoder: from latents to pixels
  constructor(tensors, config) {
    super(tensors, { ...config, norm_eps: 1e-6 }, "vae.decoder.");
  }

  forward(latents) {
    const { config } = this;
    const scaled = latents.map((value) => value / config.scaling_factor);
    const quantised = this.tensors.linear(scaled, "vae.post_quant_conv.weight", "vae.post_quant_conv.bias");
    let x = this.convolve({ x: quantised, side: Math.sqrt(latents.length / config.latent_channels), channels: config.latent_channels }, "conv_in");
    x = this.residual(x, "mid_block.resnets.0", null);
    x = this.residual(this.attendAt(x, "mid_block.attentions.0"), "mid_block.resnets.1", null);
    for (let level = 0; level < this.levels; level++) {
      for (let i = 0; i <= config.layers_per_block; i++) x = this.residual(x, `up_blocks.${level}.resnets.${i}`, null);
      if (level < this.levels - 1) x = this.convolve(doubled(x), `up_blocks.${level}.upsamplers.0.conv`);
    }
    x = this.norm(x, "conv_norm_out");
    return this.convolve({ ...x, x: x.x.map(silu) }, "conv_out");
  }
}

export class LatentDiffusion {
  // configs: those of the pipeline's folders: text_encoder, unet, vae, scheduler
  constructor(tensors, configs) {
    this.text = new TextTower(tensors, configs.text_encoder, "text_encoder.text_model.");
    this.unet = new ConditionedUNet(tensors, configs.unet, "unet.");
    this.autoencoder = new Decoder(tensors, configs.vae);
    this.noise = new Noise(configs.scheduler);
    this.side = configs.unet.sample_size;
    this.channels = configs.unet.in_channels;
  }

  // The states of a text, padded to the tower's length as in training.
  context(ids, padding) {
    const length = this.text.config.max_position_embeddings;
    const cut = ids.length > length ? [...ids.slice(0, length - 1), ids.at(-1)] : ids;
    return this.text.encode([...cut, ...Array(length - cut.length).fill(padding)]);
  }

  // context, without: states of the text and of the empty text.
  * draw(x, context, without, { steps = 20, guidance = 7.5 } = {}) {
    this.unet.contextLength = this.text.config.max_position_embeddings;
    const predictFor = (states, now, timestep) => {
      this.unet.context = states;
      return this.unet.forward(now, timestep);
    };
    const predict = (now, timestep) => {
      const conditional = predictFor(context, now, timestep);
      return guidance === 1 ? conditional : guide(conditional, predictFor(without, now, timestep), guidance);
    };
    yield* ddim(predict, this.noise, x, steps);
  }

  decode(latents) { return this.autoencoder.forward(latents); }
}
