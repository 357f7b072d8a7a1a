// From logits to a token: the settings of sampling, the draw, and the likeliest candidates.

import { softmax } from "./layers.js";

// What may be drawn: probabilities after the settings, in keifu's order (repetition penalty, temperature, top-k, top-p,
// min-p); tokens that a setting removes have 0.
export function distribution(logits, { temperature = 1, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1, seen = [] } = {}) {
  const scores = Float32Array.from(logits);
  if (repetitionPenalty !== 1) for (const id of new Set(seen)) scores[id] = scores[id] < 0 ? scores[id] * repetitionPenalty : scores[id] / repetitionPenalty;
  if (temperature === 0) {
    const best = scores.indexOf(scores.reduce((a, b) => Math.max(a, b), -Infinity));
    return scores.map((_, id) => (id === best ? 1 : 0));
  }
  const cut = (least) => scores.forEach((score, id) => { if (score < least) scores[id] = -Infinity; });
  scores.forEach((score, id) => { scores[id] = score / temperature; });
  const descending = scores.slice().sort().reverse();
  if (topK > 0 && topK < scores.length) cut(descending[topK - 1]);
  if (topP < 1) {
    const sorted = scores.slice().sort().reverse();
    let [mass, last] = [0, 0];
    for (const share of softmax(sorted)) if ((mass += share) < topP) last++;
    cut(sorted[Math.min(last, sorted.length - 1)]);
  }
  if (minP > 0) cut(descending[0] + Math.log(minP));
  return softmax(scores);
}

// Draw by the inverse transform: the first token at which the cumulative probability exceeds u, in [0, 1).
export function draw(probabilities, u) {
  let mass = 0;
  for (const share of probabilities) mass += share;
  let reached = 0;
  for (let id = 0; id < probabilities.length; id++) if ((reached += probabilities[id]) > u * mass) return id;
  return probabilities.length - 1;
}

// The tokens with the largest logits, and ln of their probabilities.
export function likeliest(logits, count) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let total = 0;
  for (const logit of logits) total += Math.exp(logit - largest);
  const logTotal = Math.log(total) + largest;
  const ids = [];
  for (let id = 0; id < logits.length; id++) { // kept in order, the largest first
    if (ids.length === count && logits[id] <= logits[ids[count - 1]]) continue;
    let at = ids.length;
    while (at > 0 && logits[ids[at - 1]] < logits[id]) at--;
    ids.splice(at, 0, id);
    if (ids.length > count) ids.pop();
  }
  return ids.map((id) => ({ id, logP: logits[id] - logTotal }));
}
