"""Placement of the norms: GPT-1's blocks (post-norm) and GPT-2's (pre-norm), from shallow to deep.

python benchmarks/norm_placement.py [--depths 2 6 12 24] [--steps 300] [--seeds 0 1 2] [--write FILE] [--picture PNG]

GPT-1 and GPT-2 of width 64 with 2 heads, each with its published initialisation (GPT-2 divides the weights that write
to the residual stream by √N). Both see the same windows of 64 tokens in the same order with AdamW, the same rate and a
warm-up of a tenth of the steps; seeds change weights and order. The loss is that of held-out text: the mean over the
seeds, in brackets the lowest and the highest.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _charts import chart
from _results import of_seeds, publish, typed, usual
from _rounds import machine
from _training import comparison_options, comparison_settings, learned, validation

from keifu.data.text.packed import PackedText
from keifu.models import gpt1, gpt2
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text

MODELS: dict[str, Any] = {"post-norm (GPT-1)": gpt1, "pre-norm (GPT-2)": gpt2}
CONTEXT, DIM, HEADS = 64, 64, 2


def run(name: str, depth: int, seed: int, task: TextTask, options: argparse.Namespace) -> float:
    """Train a model and return its held-out loss."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": task.tokenizer.vocab_size, "context_length": CONTEXT, "dim": DIM, "hidden_dim": 4 * DIM}
    model = MODELS[name].build(MODELS[name].Config(**sizes, n_layers=depth, n_heads=HEADS, dropout=0.0))
    data = PackedText(task.shards, CONTEXT, options.rows, seed, validation_tokens=20_000)
    learned(model, data, comparison_settings(options, seed))
    return validation(model, data)


def draw(losses: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Draw held-out loss over depth, with a line for each placement of the norms. Bars are the range of the seeds."""
    with chart(path, (6, 4), legend=10) as axes:
        for name, by_depth in losses.items():
            means = [mean(seeds) for seeds in by_depth.values()]
            bars = [[m - min(s) for m, s in zip(means, by_depth.values(), strict=True)]]
            bars.append([max(s) - m for m, s in zip(means, by_depth.values(), strict=True)])
            axes.errorbar([*by_depth], means, yerr=bars, marker="o", capsize=3, label=name)
        axes.set(xlabel="blocks", ylabel="held-out loss, nats per token", xscale="log")
        axes.set_xticks([*by_depth], [str(depth) for depth in by_depth])
        axes.minorticks_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6, 12, 24])
    comparison_options(parser, 300, 16, CONTEXT, "sotu", 512)
    options = parser.parse_args()
    task = prepare_text(Text(options.data, vocab_size=options.vocab_size))
    print(f"{machine()}; {options.steps} steps of {options.rows * CONTEXT:,} tokens, seeds {options.seeds}\n")
    losses: dict[str, dict[int, list[float]]] = {name: {} for name in MODELS}
    for depth in options.depths:
        for name, by_depth in losses.items():
            by_depth[depth] = [run(name, depth, seed, task, options) for seed in options.seeds]
            print(f"{depth} blocks, {name}: {by_depth[depth]}", flush=True)
    rows, values = of_seeds({str(depth): [each[depth] for each in losses.values()] for depth in options.depths})
    columns = ["blocks", *MODELS]
    command = typed("norm_placement.py", vars(options), usual(parser))
    publish(options.write, "Placement of the norms", command, columns, rows, values)
    if options.picture:
        draw(losses, options.picture)


if __name__ == "__main__":
    main()
