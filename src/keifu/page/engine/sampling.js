// From logits to tokens: the settings of sampling, the draw, the likeliest candidates, and beam search.

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

// Beam search (Wu et al., 2016): the best text by ln P / ((5 + length) / 6)^alpha. next(tokens, state) returns the logits
// after the tokens and the state with the last one. never: tokens that are not written. watch(beams) sees the open texts.
export function beamSearch(next, start, { beams, end, never = [], limit, alpha = 0.6, watch = null }) {
  const penalty = (length) => ((5 + length) / 6) ** alpha;
  let best = { score: -Infinity, logP: 0, tokens: [] };
  let open = [{ tokens: [], score: 0, state: start }];
  for (let length = 1; open.length; length++) {
    const candidates = open.flatMap((beam) => {
      const [logits, state] = next(beam.tokens, beam.state);
      return likeliest(logits, 2 * beams + never.length).filter(({ id }) => !never.includes(id))
        .map(({ id, logP }) => ({ tokens: [...beam.tokens, id], score: beam.score + logP, state }));
    }).sort((a, b) => b.score - a.score).slice(0, 2 * beams);
    const ended = ({ tokens }) => tokens.at(-1) === end || length >= limit;
    for (const { score: logP, tokens } of candidates.slice(0, beams).filter(ended)) {
      const score = logP / penalty(length);
      if (score > best.score) best = { score, logP, tokens };
    }
    open = candidates.filter((candidate) => !ended(candidate)).slice(0, beams);
    watch?.(open);
    if (!open.length || (beams === 1 ? best.score > -Infinity : open[0].score / Math.max(penalty(length), penalty(limit)) <= best.score)) break;
  }
  const tokens = best.tokens.at(-1) === end ? best.tokens.slice(0, -1) : best.tokens;
  return { tokens, score: best.score, logP: best.logP, ended: tokens.length < best.tokens.length };
}
