"""What scale bought: held-out loss against size for models from one dial, and the power law that fits it.

python benchmarks/scaling.py [--depths 1 2 3 4 5 6] [--tokens 2500000] [--ratio 20] [--picture PNG]

`keifu train gpt` has one dial, the depth, from which width and heads follow. Here it is turned, and everything else is
held: the text, a tokenizer of 4,096 tokens, rows of 256 tokens, 16 rows a step, rates, and the number of tokens seen;
or, with `--ratio`, that number is so many tokens for each parameter, as Hoffmann et al. (2022) advise. The loss is that
of 100,000 held-out tokens. Fitted are L = a + b N^-c, as there, and L = b N^-c, as in Kaplan et al. (2020), with N all
parameters but those of the norms. Residuals are measured minus fitted, in nats.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from _rounds import machine
from _training import learned, validation

from keifu.data.text.packed import PackedText
from keifu.models import llama
from keifu.recipes.language import gpt
from keifu.recipes.language.common import VALIDATION_TOKENS, Text, prepare_text

CONTEXT, ROWS = 256, 16


@dataclass(frozen=True)
class Law:
    """L = a + b N^-c; a is the loss that no size undercuts."""

    a: float
    b: float
    c: float

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        return self.a + self.b * sizes**-self.c

    def __str__(self) -> str:
        return f"L = {f'{self.a:.3f} + ' if self.a else ''}{self.b:.4g} N^-{self.c:.3f}"


def fitted(sizes: np.ndarray, losses: np.ndarray, floor: bool) -> Law:
    """The law with the least squared residuals: for each exponent the other two are a linear problem.

    floor: with a, which is at least 0; without it a is 0. The exponent is searched in steps of a thousandth.
    """
    best, least = Law(0.0, 0.0, 0.0), np.inf
    for c in np.arange(0.001, 2.0, 0.001):
        powers = sizes**-c
        slope = ((powers - powers.mean()) * losses).sum() / ((powers - powers.mean()) ** 2).sum()
        a = max(0.0, float(losses.mean() - slope * powers.mean())) if floor else 0.0
        b = float(slope) if a else float((powers * losses).sum() / (powers**2).sum())
        squares = float(((losses - a - b * powers) ** 2).sum())
        if squares < least:
            best, least = Law(a, b, float(c)), squares
    return best


def measured(depth: int, options: argparse.Namespace) -> tuple[int, float]:
    """Trains one size, prints its line, and gives its parameters and its loss."""
    task = prepare_text(Text(options.data, vocab_size=options.vocab_size))
    config = gpt.model_config(depth, task.tokenizer.vocab_size, CONTEXT)
    size = gpt.parameters(config)
    wanted = options.tokens if options.ratio is None else options.ratio * size
    steps = max(1, round(wanted / (ROWS * CONTEXT)))
    recipe = gpt.Recipe(depth, context_length=CONTEXT, batch_size=ROWS, steps=steps, seed=options.seed)
    settings = gpt.settings(recipe, size, CONTEXT, len(task.shards.tokens))
    torch.manual_seed(options.seed)
    model = llama.build(replace(config, vocab_size=task.tokenizer.vocab_size))
    data = PackedText(task.shards, CONTEXT, ROWS, options.seed, options.held_out)
    seconds = learned(model, data, settings)
    loss = validation(model, data)
    seen = settings.steps * ROWS * CONTEXT
    bits = task.shards.bits_per_byte(loss)
    print(f"| {depth} | {size:,} | {seen:,} | {loss:.4f} | {bits:.3f} | {seconds:.0f} |", flush=True)
    return size, loss


def draw(sizes: np.ndarray, losses: np.ndarray, laws: dict[str, Law], path: Path) -> None:
    """Losses and laws above, residuals below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), layout="constrained", sharex=True, height_ratios=(3, 1))
    line = np.geomspace(sizes.min() / 1.3, sizes.max() * 1.3, 200)
    above.plot(sizes, losses, "o", color="#222222", label="measured")
    for law, colour in zip(laws.values(), ("tab:blue", "tab:orange"), strict=True):
        above.plot(line, law(line), color=colour, label=str(law))
        below.plot(sizes, losses - law(sizes), "o-", color=colour)
    above.set(xscale="log", yscale="log", ylabel="held-out loss, nats a token")
    above.yaxis.set_major_formatter("{x:.1f}")
    above.yaxis.set_minor_formatter("{x:.1f}")
    below.axhline(0, color="grey", linewidth=0.8)
    below.set(xlabel="parameters", ylabel="residual")
    above.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--tokens", type=float, default=2.5e6, help="that every size sees")
    parser.add_argument("--ratio", type=float, help="tokens for each parameter instead")
    parser.add_argument("--data", default="english")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=VALIDATION_TOKENS, help="tokens of the held-out loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(machine() + "\n", flush=True)
    print("| depth | parameters | tokens seen | loss | bits a byte | seconds |\n|---:|---:|---:|---:|---:|---:|")
    points = [measured(depth, options) for depth in options.depths]
    sizes, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    laws = {name: fitted(sizes, losses, floor) for name, floor in (("with a floor", True), ("without", False))}
    for name, law in laws.items():
        residuals = losses - law(sizes)
        told = ", ".join(f"{depth}: {each:+.4f}" for depth, each in zip(options.depths, residuals, strict=True))
        print(f"\n{name}: {law}; residuals by depth {told}; root mean square {np.sqrt((residuals**2).mean()):.4f}")
    if options.picture:
        draw(sizes, losses, laws, options.picture)


if __name__ == "__main__":
    main()
