"""Attention sinks: attention to the first tokens of a window, with and without a learned sink.

python benchmarks/sinks.py [--seeds 0 1 2] [--steps 1000] [--out JSON] [--picture PNG]

Two LLaMA-like models with 3 layers differ in one number for each head: the learned sink of gpt-oss (2025), a score that
takes weight and gives no value. Both are trained on windows of 128 tokens that begin with the same token. A head that
finds nothing must put its weight somewhere. Xiao et al. (2023) found it on the first tokens, and found that a model
fails as soon as a sliding window drops them.

The held-out windows are read in three ways: with attention to all tokens, with a window of 64 tokens, and with that
window and the first 4 tokens. The loss is that of positions 64 to 127, after the window has moved past the first
tokens. The shares of attention are those of queries at the same positions, with attention to all tokens: the mean over
heads and layers, and the largest of a head. An even share of one token would be about 1%. The file has the values of
each seed; cells have the mean, and in brackets the lowest and the highest.
"""

import argparse
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _charts import bar_seeds, chart
from _results import publish, saved
from _rounds import machine, spread
from _training import held_out_windows, plain_steps, windows_options
from torch import Tensor, nn

from keifu.data.text.packed import PackedText
from keifu.layers.attention.attention import Attention, SinkAttention
from keifu.layers.attention.positions import Positions
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text

LENGTH, WINDOW, FIRST = 128, 64, 4
VOCAB = 512  # tokens of the text; the next id begins a window
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB + 1,
    "context_length": LENGTH,
    "dim": 96,
    "hidden_dim": 256,
    "n_layers": 3,
    "n_heads": 3,
}
MODELS = {"without sinks": Attention, "with sinks": SinkAttention}
READ = {"all": (LENGTH, 0), f"window of {WINDOW}": (WINDOW, 0), f"window and first {FIRST}": (WINDOW, FIRST)}


class WindowAndFirst:
    """Mask in which each token attends to the last `window` tokens, including itself, and the `first` ones of the
    sequence."""

    def __init__(self, window: int, first: int):
        self.window, self.first = window, first

    def visible(self, seen: int, window: int | None) -> Tensor:
        apart = torch.arange(seen)[:, None] - torch.arange(seen)
        near = (apart >= 0) & (apart < self.window)
        return (near | (apart >= 0) & (torch.arange(seen) < self.first))[None, None]


def build(name: str, seed: int) -> DecoderLM:
    torch.manual_seed(seed)
    config = llama.Config(**SIZES)
    return llama.assemble(config, lambda layer: llama.attention(config, layer=MODELS[name]))


def windows(text: Tensor) -> Tensor:
    """Put the token that begins a window before each row."""
    return torch.cat([torch.full((len(text), 1), VOCAB), text], 1)


def train(model: DecoderLM, task: TextTask, seed: int, options: argparse.Namespace) -> None:
    data = PackedText(task.shards, LENGTH - 1, options.tokens // LENGTH, seed)

    def loss_of(step: int) -> Tensor:
        batch = windows(data.batch(step)["tokens"].long())
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    plain_steps(model, loss_of, options.steps, options.rate, warmup=50)


@torch.no_grad()
def loss(model: DecoderLM, rows: Tensor, window: int, first: int) -> float:
    """Return the loss of positions from WINDOW on with that mask."""

    def through(module: nn.Module, args: Any, context: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, context | {"mask": WindowAndFirst(window, first)}

    hooks = [each.register_forward_pre_hook(through, with_kwargs=True) for each in attentions(model)]
    total = torch.zeros(LENGTH)
    for part in rows.split(32):
        total += nn.functional.cross_entropy(model(part[:, :-1]).mT, part[:, 1:], reduction="none").sum(0)
    for hook in hooks:
        hook.remove()
    return float(total[WINDOW:].mean()) / len(rows)


def attentions(model: DecoderLM) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


@torch.no_grad()
def shares(model: DecoderLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of attention of the first token and of the sink, [layers, heads] each."""
    kept: list[tuple[Tensor, Positions]] = []

    def keep(module: nn.Module, args: tuple[Tensor], context: dict[str, Any]) -> None:
        kept.append((args[0], context["positions"]))

    hooks = [each.register_forward_pre_hook(keep, with_kwargs=True) for each in attentions(model)]
    model(rows[:, :LENGTH])
    for hook in hooks:
        hook.remove()
    found = []
    for layer, (x, positions) in zip(attentions(model), kept, strict=True):
        assert layer.rotary is not None
        qk = layer.qkv(x).unflatten(-1, (-1, layer.head_dim))[:, :, : 2 * layer.n_heads]
        q, k = positions.rotation(layer.rotary).apply(qk).transpose(1, 2).chunk(2, 1)
        scores = (q @ k.mT) * layer.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
        sinks = layer.scoring.sinks
        sink = scores.new_full((layer.n_heads,), -torch.inf) if sinks is None else sinks
        weights = torch.cat([sink[:, None, None].expand(len(x), -1, LENGTH, 1), scores], -1).softmax(-1)
        found.append(weights[:, :, WINDOW:].mean((0, 2))[:, :2])
    both = torch.stack(found)
    return both[..., 1], both[..., 0]


def measure(model: DecoderLM, rows: Tensor) -> dict[str, float]:
    first, sink = shares(model, rows[:64])
    found = {name: loss(model, rows, *seen) for name, seen in READ.items()}
    found |= {"first": float(first.mean()), "first, largest head": float(first.max())}
    found |= {"sink": float(sink.mean()), "sink, largest head": float(sink.max())}
    return {name: round(figure, 4) for name, figure in found.items()}


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the cost of a window, and the shares of attention."""
    with chart(path, (10, 3.8), 2, legend=None) as (left, right):
        costs = [read for read in READ if read != "all"]
        panels = (
            (left, costs, lambda each, name: each[name] - each["all"], "nats per token more than with all tokens seen"),
            (right, ["first", "sink"], lambda each, name: 100 * each[name], "share of attention, %"),
        )
        for axes, names, value, label in panels:
            for shift, (model, seeds) in zip((-0.2, 0.2), found.items(), strict=True):
                values = torch.tensor([[value(each, name) for name in names] for each in seeds])
                bar_seeds(axes, shift, values, model)
            axes.set_xticks(range(len(names)), ["first token" if name == "first" else name for name in names])
            axes.set(ylabel=label)
            axes.legend(fontsize=8)


def run(name: str, seed: int, task: TextTask, rows: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Train a model and measure it."""
    began = perf_counter()
    model = build(name, seed)
    train(model, task, seed, options)
    found = measure(model, rows)
    print(f"  {name}, seed {seed}: {found}; {perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    windows_options(parser, 1000, 500, LENGTH)
    options = parser.parse_args()
    task = prepare_text(Text(options.data, vocab_size=VOCAB))
    rows = windows(held_out_windows(task.shards, LENGTH, options.held_out))
    print(f"{machine()}; {options.steps} steps of {options.tokens:,} tokens, seeds {options.seeds}", flush=True)
    found = {
        name: [
            saved(options.keep, f"{name}-{seed}", partial(run, name, seed, task, rows, options))
            for seed in options.seeds
        ]
        for name in MODELS
    }
    losses = [*READ]
    percents = [key for key in found["with sinks"][0] if key not in losses]
    columns = ["", *(f"loss, {read}" for read in losses), *(f"% on the {key}" for key in percents)]
    cells: list[list[str]] = []
    for name, seeds in found.items():
        cells.append([name, *(spread([each[key] for each in seeds]) for key in losses)])
        cells[-1] += [spread([100 * each[key] for each in seeds], ".1f") for key in percents]
    command = f"python benchmarks/sinks.py --steps {options.steps}"
    publish(options.out, "Attention sinks", command, columns, cells, found)
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
