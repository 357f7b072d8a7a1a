"""Gain of scale: held-out loss by size and text, Chinchilla's law fitted to it, and the prediction for a left-out size.

python benchmarks/scaling.py [--sizes 32x2 48x2 64x3 80x3 96x4] [--left-out 128x4] [--tokens 2.5e5 1e6 4e6]
    [--points FILE] [--picture PNG]

LLaMA-like models, WIDTHxLAYERS, are trained on English. Constant are a tokenizer of 1,024 tokens, rows of 128, 4,096
tokens per step and the rates of `keifu train gpt`. The loss is that of 100,000 held-out tokens. The fitted law is L = E
+ A N^-a + B D^-b (Hoffmann et al., 2022, section 3.3 and appendix D.2: Huber's loss of log L, from many starts). N
counts all parameters except those of norms; D counts the tokens seen. For the 95% interval of a prediction, residuals
are resampled, laws are fitted to them, and each prediction gets a resampled residual. With --points the losses are
stored in a file, one on each line, and existing ones are not measured again.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _charts import chart
from _rounds import machine
from _training import learned, validation
from scipy.optimize import minimize
from scipy.special import logsumexp

from keifu.data.text.packed import PackedText
from keifu.models import llama
from keifu.recipes.language import gpt
from keifu.recipes.language.pretraining import VALIDATION_TOKENS, Text, TextTask, prepare_text

CONTEXT, ROWS, HEAD_DIM = 128, 32, 16
DELTA, DRAWS = 1e-3, 200  # of Huber's loss; number of resampled laws for an interval
STARTS = [(a, b, e, c, c) for a in (0.0, 5.0, 10.0) for b in (0.0, 5.0, 10.0) for e in (-1.0, 0.5) for c in (0.2, 0.7)]


@dataclass(frozen=True)
class Point:
    """Trained model: its name, parameters, tokens seen, and loss in nats per token."""

    size: str
    parameters: int
    tokens: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Law:
    """Law L = E + A N^-alpha + B D^-beta, with the logarithms of A, B and E."""

    a: float
    b: float
    e: float
    alpha: float
    beta: float

    def log_loss(self, sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        terms = self.a - self.alpha * np.log(sizes), self.b - self.beta * np.log(tokens), np.full(sizes.shape, self.e)
        return logsumexp(np.stack(terms), axis=0)

    def __str__(self) -> str:
        sizes, tokens = f"{np.exp(self.a):.4g} N^-{self.alpha:.3f}", f"{np.exp(self.b):.4g} D^-{self.beta:.3f}"
        return f"L = {np.exp(self.e):.3f} + {sizes} + {tokens}"


def fitted(sizes: np.ndarray, tokens: np.ndarray, logs: np.ndarray, starts: list) -> Law:
    """Fit the law by minimising the sum of Huber losses of the log losses."""

    def cost(values: np.ndarray) -> float:
        error = np.abs(Law(*values).log_loss(sizes, tokens) - logs)
        return float(np.where(error < DELTA, error**2 / 2, DELTA * (error - DELTA / 2)).sum() / DELTA**2)

    found = [minimize(cost, start, method="L-BFGS-B") for start in starts]
    return Law(*min(found, key=lambda each: each.fun).x)


def predictions(law: Law, sizes: np.ndarray, tokens: np.ndarray, logs: np.ndarray, asked: list[Point]) -> np.ndarray:
    """Return losses of the points `asked` predicted by laws fitted to resampled residuals [draw, point]."""
    chance = np.random.default_rng(0)
    middle, places = law.log_loss(sizes, tokens), _columns(asked)[:2]
    spread = (logs - middle) * np.sqrt(len(logs) / max(1, len(logs) - 5))  # corrects for the law's five parameters
    start = [(law.a, law.b, law.e, law.alpha, law.beta)]
    drawn = []
    for _ in range(DRAWS):
        again = fitted(sizes, tokens, middle + chance.choice(spread, len(logs)), start)
        drawn.append(again.log_loss(*places) + chance.choice(spread, len(asked)))
    return np.exp(np.array(drawn))


def measured(task: TextTask, size: str, tokens: float, options: argparse.Namespace) -> Point:
    """Train one model and return its point."""
    width, layers = map(int, size.split("x"))
    config = llama.Config(
        vocab_size=task.tokenizer.vocab_size, context_length=CONTEXT, dim=width, hidden_dim=-(-8 * width // 48) * 16,
        n_layers=layers, n_heads=width // HEAD_DIM, norm_eps=1e-5, tied=True,
    )  # fmt: skip
    steps = max(1, round(tokens / (ROWS * CONTEXT)))
    recipe = gpt.Recipe(context_length=CONTEXT, batch_size=ROWS, steps=steps, seed=options.seed)
    settings = gpt.settings(recipe, gpt.parameters(config), CONTEXT, len(task.shards.tokens))
    torch.manual_seed(options.seed)
    model = llama.build(config)
    data = PackedText(task.shards, CONTEXT, ROWS, options.seed, VALIDATION_TOKENS)
    seconds = learned(model, data, settings)
    return Point(size, gpt.parameters(config), steps * ROWS * CONTEXT, validation(model, data), seconds)


def points(options: argparse.Namespace) -> list[Point]:
    """Measure all points. Print each at once."""
    kept = options.points.read_text().splitlines() if options.points and options.points.exists() else []
    known = {(each.size, each.tokens): each for each in (Point(**json.loads(line)) for line in kept)}
    task = prepare_text(Text(options.data, vocab_size=options.vocab_size))
    print(
        "| size | parameters | tokens seen | loss | bits per byte | seconds |\n|---|---:|---:|---:|---:|---:|",
        flush=True,
    )
    found = []
    for size in [*options.sizes, options.left_out]:
        for tokens in options.tokens:
            seen = max(1, round(tokens / (ROWS * CONTEXT))) * ROWS * CONTEXT
            point = known.get((size, seen)) or measured(task, size, tokens, options)
            if options.points and (size, seen) not in known:
                with options.points.open("a") as file:
                    file.write(json.dumps(vars(point)) + "\n")
            bits = task.shards.bits_per_byte(point.loss)
            told = f"{point.loss:.4f} | {bits:.3f} | {point.seconds:.0f}"
            print(f"| {size} | {point.parameters:,} | {point.tokens:,} | {told} |", flush=True)
            found.append(point)
    return found


def _columns(found: list[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return parameters, tokens and losses."""
    rows = [(each.parameters, each.tokens, each.loss) for each in found]
    sizes, tokens, losses = np.array(rows, dtype=float).T
    return sizes, tokens, losses


def draw(law: Law, used: list[Point], asked: list[Point], ranges: np.ndarray, path: Path) -> None:
    """Draw losses over sizes, with a line for each number of tokens. Left-out points are rings with their interval."""
    with chart(path, (7, 4.8)) as axes:
        line = np.geomspace(min(p.parameters for p in used) / 1.2, max(p.parameters for p in asked) * 1.2, 200)
        for number, seen in enumerate(sorted({p.tokens for p in used})):
            colour = f"C{number}"
            mine = [p for p in used if p.tokens == seen]
            axes.plot([p.parameters for p in mine], [p.loss for p in mine], "o", color=colour)
            axes.plot(
                line, np.exp(law.log_loss(line, np.full(200, float(seen)))), color=colour, label=f"{seen:,} tokens"
            )
            for point, (low, high) in zip(asked, ranges, strict=True):
                if point.tokens == seen:
                    axes.plot([point.parameters] * 2, [low, high], color=colour, alpha=0.4, linewidth=5)
                    axes.plot(
                        point.parameters, point.loss, "o", markerfacecolor="white", markeredgecolor=colour, zorder=3
                    )
        axes.plot(
            [], [], "o", markerfacecolor="white", markeredgecolor="grey", label="left out of the fit, and its interval"
        )
        axes.set(
            xscale="log", yscale="log", xlabel="parameters", ylabel="held-out loss, nats per token", title=str(law)
        )
        axes.yaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.grid(alpha=0.3, which="both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["32x2", "48x2", "64x3", "80x3", "96x4"], help="WIDTHxLAYERS")
    parser.add_argument("--left-out", default="128x4", help="the size that is predicted")
    parser.add_argument("--tokens", type=float, nargs="+", default=[2.5e5, 1e6, 4e6], help="that every size sees")
    parser.add_argument("--data", default="english")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(machine() + "\n", flush=True)
    began, found = time.monotonic(), points(options)
    used = [point for point in found if point.size != options.left_out]
    asked = [point for point in found if point.size == options.left_out]
    sizes, tokens, losses = _columns(used)
    law = fitted(sizes, tokens, np.log(losses), STARTS)
    residuals = losses - np.exp(law.log_loss(sizes, tokens))
    print(f"\n{law}; root mean square of the residuals {np.sqrt((residuals**2).mean()):.4f} nats\n")
    ranges = np.quantile(predictions(law, sizes, tokens, np.log(losses), asked), (0.025, 0.975), axis=0).T
    print("| left out: tokens seen | predicted (95%) | measured |\n|---:|---:|---:|")
    for point, middle, (low, high) in zip(asked, np.exp(law.log_loss(*_columns(asked)[:2])), ranges, strict=True):
        print(f"| {point.tokens:,} | {middle:.3f} ({low:.3f} to {high:.3f}) | {point.loss:.3f} |")
    print(f"\n{time.monotonic() - began:.0f} s")
    if options.picture:
        draw(law, used, asked, ranges, options.picture)


if __name__ == "__main__":
    main()
