"""LLaMA's three changes: LayerNorm, GELU and learned positions of GPT-2, each changed alone, and all three.

python benchmarks/llama_changes.py [--steps 400] [--seeds 0 1 2] [--only NAME ...] [--write FILE]
    [--picture PNG]

Every model is built from the shared layers: 6 blocks of width 192 with 3 heads, GPT-2's order of norms, biases,
initialisation and tied head. RMSNorm replaces LayerNorm; SwiGLU with a hidden width of 8/3 replaces GELU with one of 4,
so that its three matrices cost as much as two; rotary positions replace learned ones. The FLOPs of a token are counted
by torch and printed. All see the same windows of 128 tokens in the same order for the same number of steps, with AdamW
and the same rates; seeds change weights and order. The loss is that of held-out text. Beyond the trained length it is
that of tokens at positions 128 to 255 and 256 to 511 of windows of 512, for which the learned positions were never
trained. Figures are means over the seeds, in brackets the lowest and the highest.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from _charts import chart, plot_seeds
from _results import of_seeds, publish, typed, usual
from _rounds import machine
from _training import comparison_options, comparison_settings, learned
from torch import Tensor, nn

from keifu.data.text.packed import PackedText
from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import LearnedPositions, Rotary
from keifu.layers.feedforward import FeedForward, SwiGLU
from keifu.layers.initialisation import normal_, scale_residual_
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text
from keifu.training.hardware.flops import count_flops

DIM, LAYERS, HEADS = 192, 6, 3
TRAINED, LONGEST = 128, 512  # tokens of a window in training, and of the windows for evaluation
PARTS = {"trained length": (0, TRAINED), "tokens 128 to 255": (TRAINED, 256), "tokens 256 to 511": (256, LONGEST)}


@dataclass(frozen=True)
class Model:
    """Settings of the three differences between GPT-2 and LLaMA."""

    norm: Callable[[], nn.Module] = partial(nn.LayerNorm, DIM)
    feedforward: Callable[[], nn.Module] = partial(FeedForward, DIM, 4 * DIM, activation("gelu_tanh"))
    learned_positions: Callable[[], LearnedPositions] | None = partial(LearnedPositions, LONGEST, DIM)
    rotary: Callable[[], Rotary] | None = None

    def build(self, vocab_size: int) -> DecoderLM:
        """Build the model, with GPT-2's initialisation."""
        rotary = self.rotary() if self.rotary else None
        attentions = [Attention(DIM, HEADS, rotary=rotary) for _ in range(LAYERS)]
        blocks = [PreNorm(each, self.feedforward(), (self.norm(), self.norm())) for each in attentions]
        positions = self.learned_positions() if self.learned_positions else None
        model = DecoderLM(nn.Embedding(vocab_size, DIM), blocks, self.norm(), positions)
        normal_(model, std=0.02)
        scale_residual_(blocks)
        return model


RMS = {"norm": partial(RMSNorm, DIM)}
GATED = {"feedforward": partial(SwiGLU, DIM, 8 * DIM // 3, bias=True)}
TURNED = {"learned_positions": None, "rotary": partial(Rotary, DIM // HEADS)}
MODELS = {
    "GPT-2": Model(),
    "RMSNorm": Model(**RMS),
    "SwiGLU": Model(**GATED),
    "rotary": Model(**TURNED),
    "all three": Model(**RMS, **GATED, **TURNED),
}


def flops(model: DecoderLM) -> float:
    """Return the floating-point operations per token of a forward pass over the trained length."""
    with torch.no_grad():
        return count_flops(lambda: model(torch.zeros(1, TRAINED, dtype=torch.int64))) / TRAINED


@torch.no_grad()
def by_place(model: DecoderLM, rows: Tensor) -> Tensor:
    """Return the mean held-out loss of a token at each position of a window, [LONGEST], in nats."""
    total = torch.zeros(LONGEST)
    for part in rows.split(16):
        logits = model(part[:, :-1])
        total += nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="none").sum(0)
    return total / len(rows)


def run(name: str, seed: int, task: TextTask, options: argparse.Namespace) -> tuple[Tensor, float]:
    """Train a model. Return its loss by position and the seconds of training."""
    torch.manual_seed(seed)
    model = MODELS[name].build(task.tokenizer.vocab_size)
    seconds = learned(model, PackedText(task.shards, TRAINED, options.rows, seed), comparison_settings(options, seed))
    judge = PackedText(task.shards, LONGEST, 1, validation_tokens=options.held_out)
    return by_place(model, torch.cat([batch["tokens"] for batch in judge.validation()])), seconds


def draw(losses: dict[str, list[Tensor]], path: Path) -> None:
    """Draw the loss by position, smoothed over 16 positions. The shade is the range of the seeds."""
    with chart(path) as axes:
        for name, seeds in losses.items():
            curves = torch.stack(seeds).unflatten(1, (-1, 16)).mean(2)
            places = torch.arange(curves.shape[1]) * 16 + 8
            plot_seeds(axes, places, curves, name)
        axes.axvline(TRAINED, color="grey", linestyle=":", label="trained length")
        axes.set(xlabel="place in the window", ylabel="held-out loss, nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=[*MODELS])
    comparison_options(parser, 400, 32, TRAINED, "english", 4096)
    parser.add_argument("--held-out", type=int, default=100_000, help="tokens of the held-out loss")
    options = parser.parse_args()
    task = prepare_text(Text(options.data, vocab_size=options.vocab_size))
    print(f"{machine()}; {options.steps} steps of {options.rows * TRAINED:,} tokens, seeds {options.seeds}\n")
    losses: dict[str, list[Tensor]] = {}
    for name in options.only:
        found = [run(name, seed, task, options) for seed in options.seeds]
        losses[name] = [curve for curve, _ in found]
        print(f"{name}: {mean(seconds for _, seconds in found):.0f} s a run", flush=True)
    figures = {
        name: [[float(curve[a:b].mean()) for curve in curves] for a, b in PARTS.values()]
        for name, curves in losses.items()
    }
    models = {name: MODELS[name].build(task.tokenizer.vocab_size) for name in losses}
    costs = {
        name: [f"{sum(p.numel() for p in model.parameters()):,}", f"{flops(model) / 1e6:.2f}"]
        for name, model in models.items()
    }
    rows, values = of_seeds(figures, before=costs)
    columns = ["", "parameters", "MFLOP per token, forward", *PARTS]
    command = typed("llama_changes.py", vars(options), usual(parser))
    publish(options.write, "LLaMA's three changes", command, columns, rows, values)
    if options.picture:
        draw(losses, options.picture)


if __name__ == "__main__":
    main()
