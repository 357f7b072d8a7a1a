// What the layers of all landmarks compute. Axes: x [rows, dim] is a flat Float32Array.

import { ModelError } from "./tensors.js";

// A model, or a part whose weights have names that begin with `prefix`.
export class Module {
  constructor(tensors, config, prefix = "") { Object.assign(this, { tensors, config, prefix }); }

  has(name) { return this.tensors.has(this.prefix + name); }

  get(name) { return this.tensors.get(this.prefix + name); }

  rows(name, ids) { return this.tensors.rows(this.prefix + name, ids); }

  linear(x, name, biased = true) {
    return this.tensors.linear(x, `${this.prefix}${name}.weight`, biased ? `${this.prefix}${name}.bias` : null);
  }

  norm(x, name, eps = this.config.layer_norm_eps) {
    return layerNorm(x, this.get(`${name}.weight`), this.get(`${name}.bias`), eps);
  }

  // From the states x to the states `source`: names of the matrices of queries, keys, values, and of the last one.
  attention(x, [q, k, v, out], { source = x, dim = this.dim, nHeads = this.nHeads, ...options } = {}) {
    const sizes = { n: x.length / dim, seen: source.length / dim, nHeads };
    return this.linear(attend(this.linear(x, q), this.linear(source, k), this.linear(source, v), { ...sizes, ...options }), out);
  }
}

// Refuse a model of another activation.
export function checkActivation(landmark, known, found) {
  if (found !== known) throw new ModelError(`The engine's ${landmark} has the activation ${known}, and this model ${found}.`);
}

export function checkLength(count, contextLength) {
  if (count > contextLength) throw new ModelError(`The text has ${count} tokens, and the model reads ${contextLength}: shorten it.`);
}

// What attend tells of one layer. watch(layer, head, position, probabilities), or nothing.
export function watching(watch, layer, start = 0) {
  return watch && ((head, t, row) => watch(layer, head, start + t, row));
}

export function add(a, b) {
  const sum = new Float32Array(a.length);
  for (let i = 0; i < a.length; i++) sum[i] = a[i] + b[i];
  return sum;
}

export function softmax(logits) {
  let [largest, total] = [-Infinity, 0];
  for (const logit of logits) if (logit > largest) largest = logit;
  const probabilities = new Float32Array(logits.length);
  for (let i = 0; i < logits.length; i++) total += probabilities[i] = Math.exp(logits[i] - largest);
  for (let i = 0; i < logits.length; i++) probabilities[i] /= total;
  return probabilities;
}

// Each row of `weight.length` numbers: centred, scaled to variance 1, then weighted.
export function layerNorm(x, weight, bias, eps) {
  const [dim, y] = [weight.length, new Float32Array(x.length)];
  for (let row = 0; row < x.length; row += dim) {
    let [mean, variance] = [0, 0];
    for (let i = 0; i < dim; i++) mean += x[row + i] / dim;
    for (let i = 0; i < dim; i++) variance += (x[row + i] - mean) ** 2 / dim;
    const scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < dim; i++) y[row + i] = (x[row + i] - mean) * scale * weight[i] + bias[i];
  }
  return y;
}

export function rmsNorm(x, weight, eps) {
  const [dim, y] = [weight.length, new Float32Array(x.length)];
  for (let row = 0; row < x.length; row += dim) {
    let square = 0;
    for (let i = 0; i < dim; i++) square += x[row + i] ** 2 / dim;
    const scale = 1 / Math.sqrt(square + eps);
    for (let i = 0; i < dim; i++) y[row + i] = x[row + i] * scale * weight[i];
  }
  return y;
}

export const relu = (x) => Math.max(0, x);
export const sigmoid = (x) => 1 / (1 + Math.exp(-x));
export const silu = (x) => x * sigmoid(x);

export function gelu(x) { // x · Φ(x); the error function is Abramowitz and Stegun's 7.1.26, exact to 1.5e-7
  const z = Math.abs(x) / Math.SQRT2;
  const t = 1 / (1 + 0.3275911 * z);
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-z * z);
  return x >= 0 ? x * (1 - tail / 2) : (x * tail) / 2;
}

// Attention in heads: q [n, nHeads · headDim], k and v [seen, nKvHeads · headDim].
// causal: the position of the first query, whose successors see one more key each; null: all see all.
// off: heads that are switched off. watch(head, query, probabilities) sees each row of the attention.
export function attend(q, k, v, { n, seen, nHeads, nKvHeads = nHeads, causal = null, off = null, watch = null }) {
  const [width, kvWidth] = [q.length / n, k.length / seen];
  const headDim = width / nHeads;
  const scale = 1 / Math.sqrt(headDim);
  const out = new Float32Array(q.length);
  for (let head = 0; head < nHeads; head++) {
    const kvAt = Math.floor((head * nKvHeads) / nHeads) * headDim;
    for (let t = 0; t < n; t++) {
      const visible = causal === null ? seen : Math.min(seen, causal + t + 1);
      const at = t * width + head * headDim;
      const scores = new Float32Array(visible);
      for (let s = 0; s < visible; s++) {
        let sum = 0;
        for (let i = 0, key = s * kvWidth + kvAt; i < headDim; i++) sum += q[at + i] * k[key + i];
        scores[s] = sum * scale;
      }
      const probabilities = softmax(scores);
      watch?.(head, t, probabilities);
      if (off?.has(head)) continue;
      for (let s = 0; s < visible; s++) {
        const share = probabilities[s];
        for (let i = 0, value = s * kvWidth + kvAt; i < headDim; i++) out[at + i] += share * v[value + i];
      }
    }
  }
  return out;
}
