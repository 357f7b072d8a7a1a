"""Number of pairs that a state of fixed size recalls: softmax, linear attention, DeltaNet, Gated DeltaNet, a hybrid.

python benchmarks/recall.py [--rewritten] [--steps 1000] [--seeds 0 1 2] [--only NAME ...] [--out JSON] [--picture PNG]

Multi-query associative recall (Arora et al., 2023): a sequence has pairs of a key and a value, then each key again in
another order, and the model must predict its value. All models have two layers with the same projections, the same
short convolution and the same number of parameters; they differ in the rule that writes and reads the state. Linear
attention adds v kᵀ to a matrix (Katharopoulos et al., 2020), DeltaNet corrects the matrix's value for k (Yang et al.,
2024), and Gated DeltaNet also lets the matrix decay. These three have a state of 2 heads of 16 · 16 numbers in each
layer. Softmax attention keeps keys and values of all tokens; the hybrid has one Gated DeltaNet and one layer of softmax
attention.

Queries and keys begin as the same matrix, of this token and of the previous one. A model would learn this in thousands
of steps; here it is given, since the question is the capacity of the state. Each step has sequences of 8, 16 or 32
pairs in turn; the accuracy is of new sequences, also of more pairs than any in training. Gated DeltaNet usually begins
with fast decay; here it begins with slow decay (`DECAY`), or it would need far more steps. A guess is right once in 64
times. With --rewritten all keys first come with other values, and the second value is right. Softmax attention then
needs to know the order of tokens: without positions it learns it slowly, from the causal mask and the convolution, and
"softmax with positions" has ALiBi. The file has the accuracy of each seed.
"""

import argparse
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _charts import chart, plot_seeds
from _results import write_table
from _rounds import machine, spread
from _training import plain_steps
from torch import Tensor, nn

from keifu.layers.attention.attention import Scoring, attend
from keifu.layers.feedforward import SwiGLU
from keifu.layers.initialisation import normal_
from keifu.layers.normalisation import RMSNorm
from keifu.layers.recurrent.gated_delta import GatedDeltaNet, Heads, SeparateInputs, Signals
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.transformer.decoder import DecoderLM

DIM, HEADS = 32, Heads(2, 2, 16, 16)
DECAY = -3.0  # initial logarithm of the decay factor
KEYS = 64  # number of key tokens, and of value tokens
TRAINED, LOOKED_AT = (8, 16, 32), (4, 8, 16, 32, 48, 64)


class DeltaNet(GatedDeltaNet):
    """Gated DeltaNet without decay."""

    def _signals(self, mixed: Tensor, strength: Tensor, decay: Tensor) -> Signals:
        signals = super()._signals(mixed, strength, decay)
        return signals._replace(log_decay=0 * signals.log_decay)


class LinearAttention(DeltaNet):
    """Linear attention: all dot products q kᵀ up to the token, times the values, without softmax."""

    def _recur(self, x: Tensor, state: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, strength, _ = self._of(x)
        y = (q @ k.mT).tril() @ (strength[..., None] * v)
        return y.transpose(1, 2).flatten(2), state

    def _of(self, x: Tensor) -> Signals:
        mixed, strength, decay = x.split([self.heads.channels, self.heads.values, self.heads.values], -1)
        before = mixed.new_zeros(len(x), self.convolution.weight.shape[-1] - 1, mixed.shape[-1])
        return self._signals(self.convolution(mixed, before), strength, decay)


class SoftmaxAttention(LinearAttention):
    """Softmax attention of the same queries, keys and values; `sharpness` is the factor of the scores."""

    sharpness = 16.0  # because queries and keys have length 1

    def _recur(self, x: Tensor, state: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, _, _ = self._of(x)
        return attend(q, k, v, "causal", Scoring(scale=self.sharpness * self.heads.key_dim**0.5)), state


class AlibiAttention(SoftmaxAttention):
    """Softmax attention with positions: ALiBi (Press et al., 2021), a penalty per token of distance, with the paper's
    slopes."""

    def _recur(self, x: Tensor, state: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, _, _ = self._of(x)
        positions = torch.arange(x.shape[1])
        distance = positions[:, None] - positions
        slopes = 2.0 ** (-8 / self.heads.keys * torch.arange(1, self.heads.keys + 1))
        scores = self.sharpness * self.heads.key_dim**0.5 * (q @ k.mT) - slopes[:, None, None] * distance
        y = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2), state


MODELS = {
    "softmax": (SoftmaxAttention, SoftmaxAttention),
    "softmax with positions": (AlibiAttention, AlibiAttention),
    "linear": (LinearAttention, LinearAttention),
    "DeltaNet": (DeltaNet, DeltaNet),
    "Gated DeltaNet": (GatedDeltaNet, GatedDeltaNet),
    "hybrid": (GatedDeltaNet, SoftmaxAttention),
}


def build(name: str, seed: int) -> DecoderLM:
    """Build a model of two layers."""
    torch.manual_seed(seed)
    norm = partial(RMSNorm, DIM)
    mixers: list[Any] = [mixer(DIM, HEADS, SeparateInputs) for mixer in MODELS[name]]
    blocks = [PreNorm(mixer, SwiGLU(DIM, 2 * DIM), (norm(), norm())) for mixer in mixers]
    model = DecoderLM(nn.Embedding(2 * KEYS, DIM), blocks, norm(), None, nn.Linear(DIM, 2 * KEYS, bias=False))
    normal_(model, std=DIM**-0.5)
    width = HEADS.keys * HEADS.key_dim
    for mixer in mixers:
        mixer.inputs.qkv.weight.data[width : 2 * width] = mixer.inputs.qkv.weight.data[:width]
        taps = mixer.convolution.weight.data.zero_()[:, 0]
        taps[:width, -1], taps[width : 2 * width, -2], taps[2 * width :, -1] = 1.0, 1.0, 1.0
        mixer.log_rate.data.fill_(DECAY)
    return model


def draw(rows: int, pairs: int, random: torch.Generator, rewritten: bool = False) -> tuple[Tensor, Tensor]:
    """Draw sequences of pairs and queries, [rows, 3 · pairs], and the values of the queries, [rows, pairs].

    rewritten: the keys first come with other values, which the model must forget: [rows, 5 · pairs]."""
    keys = torch.rand(rows, KEYS, generator=random).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, 2 * KEYS, (rows, pairs), generator=random)
    order = torch.rand(rows, pairs, generator=random).argsort(1)
    stored = torch.stack([keys, values], 2).flatten(1)
    if rewritten:
        old = torch.randint(KEYS, 2 * KEYS, (rows, pairs), generator=random)
        stored = torch.cat([torch.stack([keys, old], 2).flatten(1), stored], 1)
    return torch.cat([stored, keys.gather(1, order)], 1), values.gather(1, order)


def train(model: DecoderLM, seed: int, options: argparse.Namespace) -> None:
    """Train on sequences of 8, 16 and 32 pairs in turn."""
    random = torch.Generator().manual_seed(1000 + seed)

    def loss_of(step: int) -> Tensor:
        pairs = TRAINED[step % len(TRAINED)]
        length = (5 if options.rewritten else 3) * pairs
        tokens, wanted = draw(options.tokens // length, pairs, random, options.rewritten)
        logits = model.logits(model.hidden(tokens)[:, -pairs:])
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    plain_steps(model, loss_of, options.steps, options.rate, warmup=20, weight_decay=0.0)


@torch.no_grad()
def accuracy(model: DecoderLM, pairs: int, rewritten: bool) -> float:
    """Return the share of correct values on the same queries (at least 1,024) for each model."""
    tokens, wanted = draw(max(64, 4096 // pairs), pairs, torch.Generator().manual_seed(pairs), rewritten)
    logits = model.logits(model.hidden(tokens)[:, -pairs:])
    return round((logits.argmax(-1) == wanted).float().mean().item(), 4)


def draw_accuracies(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw mean accuracy over the number of pairs. The shade is the range of the seeds."""
    with chart(path, (8, 4.5), legend=10) as axes:
        for name, by_pairs in found.items():
            shares = 100 * torch.tensor([*by_pairs.values()])
            places = [int(pairs) for pairs in by_pairs]
            plot_seeds(axes, places, shares.T, name, "o-")
        axes.set(xlabel="pairs of a key and a value", ylabel="right values, %", ylim=(0, 102), xticks=LOOKED_AT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=768, help="of a step")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--rewritten", action="store_true", help="keys come twice, and the second value counts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(f"{machine()}; {options.steps} steps of {options.tokens:,} tokens, seeds {options.seeds}\n")
    print("| | parameters |" + "".join(f" {pairs} pairs |" for pairs in LOOKED_AT))
    print("|---|" + "---:|" * (1 + len(LOOKED_AT)), flush=True)
    rows: list[list[str]] = []
    found: dict[str, dict[str, list[float]]] = {name: {str(pairs): [] for pairs in LOOKED_AT} for name in options.only}
    for name in options.only:
        for seed in options.seeds:
            began = perf_counter()
            model = build(name, seed)
            train(model, seed, options)
            for pairs in LOOKED_AT:
                found[name][str(pairs)].append(accuracy(model, pairs, options.rewritten))
            last = ", ".join(f"{each[-1]:.4f}" for each in found[name].values())
            print(f"  {name}, seed {seed}: {last}; {perf_counter() - began:.0f} s", flush=True)
        count = sum(parameter.numel() for parameter in model.parameters())
        cells = [f"{spread([100 * one for one in each], '.1f')}" for each in found[name].values()]
        print(f"| {name} | {count:,} | {' | '.join(cells)} |", flush=True)
        rows.append([name, *cells])
    if options.out:
        command = f"python benchmarks/recall.py{' --rewritten' * options.rewritten} --steps {options.steps}"
        section = "Recall of keys that come twice" if options.rewritten else "Recall by a state of fixed size"
        columns = ["% right, by number of pairs", *map(str, LOOKED_AT)]
        write_table(options.out, section, command, columns, rows, found)
    if options.picture:
        draw_accuracies(found, options.picture)


if __name__ == "__main__":
    main()
