// DDPM (Ho et al., 2020): a U-Net predicts the noise of a picture; DDIM (Song et al., 2021) takes it out in few steps.
// A picture is { x, side, channels } with the channels last: x [side · side, channels].

import { Module, add, checkActivation, silu } from "./layers.js";
import { ModelError } from "./tensors.js";

export class UNet extends Module {
  constructor(tensors, config, prefix = "") {
    super(tensors, config, prefix);
    checkActivation("U-Net", "silu", config.act_fn ?? "silu");
    if (typeof config.sample_size !== "number") throw new ModelError("The engine's U-Net draws squares, and this model other sizes.");
    this.levels = config.block_out_channels.length;
    tensors.entry(`${prefix}conv_in.weight`);
  }

  linear(x, name) {
    return super.linear(x, name, this.has(`${name}.bias`));
  }

  // A convolution as a product: the pixels under the kernel become one row.
  convolve({ x, side, channels }, name, { stride = 1, before = null } = {}) {
    const [out, , size] = this.tensors.shape(`${this.prefix}${name}.weight`);
    if (size === 1) return { x: this.linear(x, name), side, channels: out };
    const pad = before ?? (size - 1) / 2; // before 0: one pixel more at the bottom and the right
    const after = stride === 1 ? side : Math.floor((side + (before === 0 ? 1 : 2 * pad) - size) / stride) + 1;
    const rows = new Float32Array(after * after * channels * size * size);
    for (let top = 0, at = 0; top < after; top++) for (let left = 0; left < after; left++, at += channels * size * size) {
      for (let i = 0; i < size; i++) for (let j = 0; j < size; j++) {
        const [row, column] = [top * stride + i - pad, left * stride + j - pad];
        if (row < 0 || row >= side || column < 0 || column >= side) continue;
        const from = (row * side + column) * channels;
        for (let channel = 0, to = at + i * size + j; channel < channels; channel++, to += size * size) rows[to] = x[from + channel];
      }
    }
    return { x: this.linear(rows, name), side: after, channels: out };
  }

  // GroupNorm; shift: a scale and a shift of each channel, from the timestep.
  norm({ x, side, channels }, name, { groups = this.config.norm_num_groups, eps = this.config.norm_eps ?? 1e-6, shift = null } = {}) {
    const [weight, bias] = [this.get(`${name}.weight`), this.get(`${name}.bias`)];
    const [y, width, pixels] = [new Float32Array(x.length), channels / groups, side * side];
    for (let first = 0; first < channels; first += width) {
      let [mean, variance] = [0, 0];
      for (let pixel = 0; pixel < pixels; pixel++) for (let c = first; c < first + width; c++) mean += x[pixel * channels + c];
      mean /= pixels * width;
      for (let pixel = 0; pixel < pixels; pixel++) for (let c = first; c < first + width; c++) variance += (x[pixel * channels + c] - mean) ** 2;
      const scale = 1 / Math.sqrt(variance / (pixels * width) + eps);
      for (let pixel = 0; pixel < pixels; pixel++) for (let c = first; c < first + width; c++) {
        const normed = (x[pixel * channels + c] - mean) * scale * weight[c] + bias[c];
        y[pixel * channels + c] = shift ? normed * (1 + shift[c]) + shift[channels + c] : normed;
      }
    }
    return { x: y, side, channels };
  }

  residual(input, name, time) {
    const swish = (part) => ({ ...part, x: part.x.map(silu) });
    let hidden = this.convolve(swish(this.norm(input, `${name}.norm1`)), `${name}.conv1`);
    let shift = null;
    if (time) {
      const moved = this.linear(time, `${name}.time_emb_proj`);
      if (this.config.resnet_time_scale_shift === "scale_shift") shift = moved;
      else hidden = { ...hidden, x: hidden.x.map((value, i) => value + moved[i % hidden.channels]) };
    }
    const changed = this.convolve(swish(this.norm(hidden, `${name}.norm2`, { shift })), `${name}.conv2`);
    const shortcut = this.has(`${name}.conv_shortcut.weight`) ? this.convolve(input, `${name}.conv_shortcut`) : input;
    return { ...changed, x: add(shortcut.x, changed.x) };
  }

  // Attention between all pixels. A U-Net that reads a text has more in its place (latent_diffusion.js).
  attendAt(input, name) {
    const { x } = this.norm(input, `${name}.group_norm`);
    const nHeads = this.config.attention_head_dim ? Math.floor(input.channels / this.config.attention_head_dim) : 1;
    const names = ["q", "k", "v", "out.0"].map((part) => `${name}.to_${part}`);
    return { ...input, x: add(input.x, this.attention(x, names, { dim: input.channels, nHeads })) };
  }

  hasAttention(name) { return this.has(`${name}.to_q.weight`); }

  // The embedding of a timestep and of a class.
  time(timestep, label) {
    const half = this.config.block_out_channels[0] / 2;
    const frequency = (i) => Math.fround(Math.exp(Math.fround(-Math.fround(Math.log(10000)) * i / (half - this.config.freq_shift))));
    const angles = Float32Array.from({ length: half }, (_, i) => timestep * frequency(i));
    const [sines, cosines] = [angles.map(Math.sin), angles.map(Math.cos)];
    const waves = Float32Array.from(this.config.flip_sin_to_cos ? [...cosines, ...sines] : [...sines, ...cosines]);
    const embedded = this.linear(this.linear(waves, "time_embedding.linear_1").map(silu), "time_embedding.linear_2");
    const labelled = this.has("class_embedding.weight") ? add(embedded, this.rows("class_embedding.weight", [label])) : embedded;
    return labelled.map(silu);
  }

  // The network's output for a noisy picture x [pixels, channels].
  forward(picture, timestep, label = 0) {
    const { config, levels } = this;
    const time = this.time(timestep, label);
    let x = this.convolve({ x: picture, side: config.sample_size, channels: config.in_channels }, "conv_in");
    const skips = [x];
    const block = (stage, i, input) => {
      const made = this.residual(input, `${stage}.resnets.${i}`, time);
      return this.hasAttention(`${stage}.attentions.${i}`) ? this.attendAt(made, `${stage}.attentions.${i}`) : made;
    };
    for (let level = 0; level < levels; level++) {
      for (let i = 0; i < config.layers_per_block; i++) skips.push(x = block(`down_blocks.${level}`, i, x));
      if (level === levels - 1) continue;
      const before = config.downsample_padding ? null : 0;
      skips.push(x = this.convolve(x, `down_blocks.${level}.downsamplers.0.conv`, { stride: 2, before }));
    }
    x = block("mid_block", 0, x);
    x = this.residual(x, "mid_block.resnets.1", time);
    for (let level = 0; level < levels; level++) {
      for (let i = 0; i <= config.layers_per_block; i++) x = block(`up_blocks.${level}`, i, join(x, skips.pop()));
      if (level < levels - 1) x = this.convolve(doubled(x), `up_blocks.${level}.upsamplers.0.conv`);
    }
    x = this.norm(x, "conv_norm_out");
    return this.convolve({ ...x, x: x.x.map(silu) }, "conv_out").x;
  }
}

function join(a, b) { // the channels of a, then those of b
  const channels = a.channels + b.channels;
  const x = new Float32Array(a.side ** 2 * channels);
  for (let pixel = 0; pixel < a.side ** 2; pixel++) {
    x.set(a.x.subarray(pixel * a.channels, (pixel + 1) * a.channels), pixel * channels);
    x.set(b.x.subarray(pixel * b.channels, (pixel + 1) * b.channels), pixel * channels + a.channels);
  }
  return { x, side: a.side, channels };
}

export function doubled({ x, side, channels }) { // each pixel four times
  const y = new Float32Array(4 * x.length);
  for (let row = 0; row < 2 * side; row++) for (let column = 0; column < 2 * side; column++) {
    const from = ((row >> 1) * side + (column >> 1)) * channels;
    y.set(x.subarray(from, from + channels), (row * 2 * side + column) * channels);
  }
  return { x: y, side: 2 * side, channels };
}

// The noise schedule of a scheduler_config.json: ᾱ of each timestep, and the timesteps of a number of steps.
export class Noise {
  constructor(config) {
    const total = config.num_train_timesteps;
    const { beta_schedule: schedule, beta_start: low, beta_end: high } = config;
    const cosine = (t) => Math.cos((((t / total) + 0.008) / 1.008) * Math.PI / 2) ** 2; // Nichol and Dhariwal, 2021
    const betas = {
      squaredcos_cap_v2: (t) => Math.min(0.999, 1 - cosine(t + 1) / cosine(t)),
      linear: (t) => low + ((high - low) * t) / (total - 1),
      scaled_linear: (t) => (Math.sqrt(low) + ((Math.sqrt(high) - Math.sqrt(low)) * t) / (total - 1)) ** 2,
    };
    if (!(schedule in betas)) throw new ModelError(`The engine knows no noise schedule ${schedule}.`);
    if (!["epsilon", "v_prediction", "sample"].includes(config.prediction_type)) throw new ModelError(`The engine knows no prediction of ${config.prediction_type}.`);
    if (config.thresholding || config.variance_type?.startsWith("learned")) throw new ModelError("The engine does not sample models with thresholds or learned variances.");
    this.config = config;
    this.alphaBars = [];
    for (let t = 0, product = 1; t < total; t++) this.alphaBars.push(product *= 1 - betas[schedule](t));
  }

  timesteps(steps) { // the noisiest first
    const { num_train_timesteps: total, timestep_spacing: spacing, steps_offset: offset } = this.config;
    if (!(steps >= 1 && steps <= total)) throw new ModelError(`The model knows ${total} noise levels, so it takes 1 to ${total} steps, not ${steps}.`);
    const each = Array.from({ length: steps }, (_, i) => i);
    if (spacing === "trailing") return each.map((i) => Math.round(total - i * (total / steps)) - 1);
    if (spacing === "leading") return each.map((i) => i * Math.floor(total / steps) + offset).reverse();
    throw new ModelError(`The engine knows no timestep spacing ${spacing}.`);
  }

  // The picture and the noise that an output stands for.
  read(output, x, alpha, sigma) {
    const { prediction_type: kind, clip_sample: clips, clip_sample_range: bound } = this.config;
    const pictureOf = {
      epsilon: (value, i) => (value - sigma * output[i]) / alpha,
      v_prediction: (value, i) => alpha * value - sigma * output[i],
      sample: (_, i) => output[i],
    };
    const picture = x.map(pictureOf[kind]);
    if (clips) for (let i = 0; i < picture.length; i++) picture[i] = Math.max(-bound, Math.min(bound, picture[i]));
    if (!clips && kind === "v_prediction") return { picture, noise: x.map((value, i) => alpha * output[i] + sigma * value) };
    return { picture, noise: x.map((value, i) => (value - alpha * picture[i]) / sigma) };
  }
}

// DDIM from the noise x: yields x and the predicted picture after each step. predict(x, timestep) is the network.
export function* ddim(predict, noise, x, steps = 20) {
  const jump = Math.floor(noise.config.num_train_timesteps / steps);
  for (const timestep of noise.timesteps(steps)) {
    const [now, next] = [noise.alphaBars[timestep], timestep >= jump ? noise.alphaBars[timestep - jump] : 1];
    const read = noise.read(predict(x, timestep), x, Math.sqrt(now), Math.sqrt(1 - now));
    x = read.picture.map((value, i) => Math.sqrt(next) * value + Math.sqrt(1 - next) * read.noise[i]);
    yield { timestep, x, picture: read.picture };
  }
}

// Classifier-free guidance (Ho and Salimans, 2022): away from the prediction without the condition.
export function guide(conditional, unconditional, guidance) {
  return conditional.map((value, i) => unconditional[i] + guidance * (value - unconditional[i]));
}

export class DDPM {
  constructor(tensors, config, scheduler) {
    this.unet = new UNet(tensors, config);
    this.noise = new Noise(scheduler);
    this.side = config.sample_size;
    this.channels = config.in_channels;
    this.classes = config._classes ?? [];
    this.nullClass = config._null_class ? config.num_class_embeds - 1 : null;
  }

  * draw(x, label, { steps = 20, guidance = 2 } = {}) {
    const guided = guidance !== 1 && this.nullClass !== null;
    const predict = (now, timestep) => {
      const conditional = this.unet.forward(now, timestep, label);
      return guided ? guide(conditional, this.unet.forward(now, timestep, this.nullClass), guidance) : conditional;
    };
    yield* ddim(predict, this.noise, x, steps);
  }
}
