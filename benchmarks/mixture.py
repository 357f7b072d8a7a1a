"""Gain of a mixture of objectives: UL2's denoisers compared with plain left-to-right training at equal tokens, by
source.

python benchmarks/mixture.py [--mixture multilingual] [--minutes 12 | --steps N] [--context 256] [--picture PNG]
    [--points 10 --curve PNG] [--out FOLDER]

Two models of PaLM's block begin with the same weights and read as many rows of as many tokens from the same sources
with the same shares. The plain model is trained for --minutes (the number of steps is measured before the start); the
other for as many steps. Then both are measured on the same held-out windows of every source: left to right, in bits per
byte, and on hidden tokens, in nats per token. The plain model only sees the tokens before a hidden one, because it
cannot use more; the other sees both sides of each gap. `--mixture english` is a single text of the catalogue. With
--points, as many states of each run, evenly spaced, are measured on the same windows, and --curve draws them over the
tokens read; with --out an interrupted run is resumed. To show how far the second model uses the text around a gap, it
is also measured on the same hidden tokens after the sentinels of another gap, and after another text. With --minutes 12
it takes about half an hour, in addition to downloading and tokenizing the texts. --minutes 3 --dim 128 is a quick
test.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from _charts import chart
from _rounds import machine

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.data.text.mixture import HELD_OUT, MixedText, Mixture, MixtureSource, WeightedSource, read_mixture
from keifu.data.text.span_corruption import (
    SEQUENTIAL,
    CausalBatches,
    CorruptionTask,
    InfillingExamples,
    Markers,
    Rows,
    SpanCorruption,
    SpanCorruptionBatches,
)
from keifu.evaluation.text.mixture import MixtureLosses, losses
from keifu.models import palm
from keifu.recipes.language import palm2
from keifu.recipes.language.palm2 import LEARNING, PreparedMixture, Recipe, job_of, prepare
from keifu.recipes.running import train_job
from keifu.training.objectives.language_modeling import span_corruption
from keifu.training.run import checkpoint
from keifu.training.setup import steps_within

HIDDEN = {"a few words": SpanCorruption("[NLU]", 0.15, 3), "half of it": SpanCorruption("[NLG]", 0.5, 8)}
MODELS = {"causal": "plain", "ul2": "UL2"}


class CausalRows(SpanCorruptionBatches):
    """The original text of a decoder's rows, for a model that reads from left to right. "mask" is True on the hidden
    tokens of `InfillingExamples`; the model only sees the tokens before each."""

    def join(self, mode: int, inputs: np.ndarray, targets: np.ndarray, ends: bool = True) -> Rows:
        """Return the original text: the visible tokens and the hidden spans in their order. The mask marks hidden
        tokens."""
        marks = [np.isin(side, self.markers.sentinels) for side in (inputs, targets)]
        runs = [2 * np.cumsum(marks[0], axis=1), 2 * np.cumsum(marks[1], axis=1) - 1]
        kept, hidden = (side[~mark].reshape(len(side), -1) for side, mark in zip((inputs, targets), marks, strict=True))
        keys = [run[~mark].reshape(len(run), -1) for run, mark in zip(runs, marks, strict=True)]
        order = np.argsort(np.concatenate(keys, axis=1), axis=1, kind="stable")
        text = np.take_along_axis(np.concatenate([kept, hidden], axis=1), order, axis=1)
        mask = (order >= kept.shape[1]) & (text != self.markers.end)
        return {"tokens": _pad_wider(text, self.row_length), "mask": _pad_wider(mask, self.row_length).astype(bool)}


def _pad_wider(tokens: np.ndarray, places: int) -> np.ndarray:
    table = np.zeros((len(tokens), places), np.int64)
    table[:, : tokens.shape[1]] = tokens[:, :places]
    return table


@dataclass(frozen=True)
class Measured:
    """Losses of both models on one source, by model and task; left to right in bits per byte, hidden in nats."""

    source: WeightedSource
    figures: dict[str, dict[str, float]]


def recipe_of(options: argparse.Namespace, objective: Literal["ul2", "causal"], steps: int) -> Recipe:
    dim = options.dim
    model = palm.Config(
        context_length=options.context, dim=dim, hidden_dim=4 * dim, n_layers=options.layers, n_heads=dim // 64,
        head_dim=64,
    )  # fmt: skip
    training = replace(
        LEARNING, steps=steps, batch_size=options.batch, warmup=min(LEARNING.warmup, steps // 10), seed=options.seed,
        evaluate_every=max(1, steps // 4), sample_every=0, save_every=0,
    )  # fmt: skip
    if options.points:
        training = replace(training, save_every=-(-steps // options.points), keep=options.points + 1)
    return Recipe(
        mixture=options.mixture, objective=objective, vocab_size=options.vocab, model=model, training=training
    )  # fmt: skip


def steps_for(options: argparse.Namespace, found: PreparedMixture) -> int:
    """Return the requested number of steps, or the number that the plain model completes in the given minutes."""
    if options.steps:
        return options.steps
    recipe = recipe_of(options, "causal", 1000)
    torch.manual_seed(options.seed)
    model = palm.build(replace(recipe.model, vocab_size=found.tokenizer.vocab_size)).train()
    task, _ = palm2.task_of(recipe, found.tokenizer)
    data = MixedText(found.sources, task, options.context, options.batch, options.seed)
    return steps_within(options.minutes, model, span_corruption, data, recipe.training, data.batch(0))


def tasks(objective: str, markers: Markers, context: int) -> dict[str, CorruptionTask]:
    """Return the tasks, with the same tokens to predict for both models, each in the format of its model."""
    if objective == "causal":
        hidden = {name: CausalRows([each], markers, context) for name, each in HIDDEN.items()}
        return {"left to right": CausalBatches(context - 1), **hidden}
    hidden = {name: InfillingExamples(SpanCorruptionBatches([each], markers, context)) for name, each in HIDDEN.items()}
    return {"left to right": CausalBatches(context, markers.modes[SEQUENTIAL]), **hidden}


class OtherInputs:
    """Examples of hidden tokens with the inputs of the previous row, or with their sentinels in reverse order. A model
    that uses the text around a gap gets worse on them."""

    def __init__(self, examples: InfillingExamples, which: str):
        self.examples, self.which = examples, which
        self.width, self.name = examples.width, f"{which}: {examples.name}"

    def rows(self, windows: np.ndarray, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        rows = self.examples.rows(windows, numbers, random)
        tokens = rows["tokens"].copy()
        end = int(rows["mask"][0].argmax()) - 1  # just before the targets' first sentinel
        if self.which == "another text":
            tokens[:, 1:end] = np.roll(tokens, 1, axis=0)[:, 1:end]
        else:
            inputs = tokens[:, :end]
            sentinels = np.isin(inputs, self.examples.denoising.markers.sentinels)
            inputs[sentinels] = inputs[sentinels].reshape(len(inputs), -1)[:, ::-1].ravel()
        return rows | {"tokens": tokens}


def controls(model: torch.nn.Module, found: PreparedMixture, options: argparse.Namespace) -> str:
    """Return UL2's weighted losses on the hidden tokens after wrong inputs."""
    lines = ["| UL2 after | " + " | ".join(map(title, HIDDEN)) + " |", "|---|" + "---:|" * len(HIDDEN)]
    for which in ("its own text", "its sentinels in reverse order", "another text"):
        own = tasks("ul2", Markers.of(found.tokenizer), options.context)
        asked = {name: OtherInputs(own[name], which) if which != "its own text" else own[name] for name in HIDDEN}
        sums = dict.fromkeys(HIDDEN, 0.0)
        for source in found.sources:
            each = losses(model, source.shards, asked, options.context, options.windows, options.batch)
            for name in HIDDEN:
                sums[name] += source.weight * each[name].loss
        lines.append(f"| {which} | " + " | ".join(f"{sums[name]:.3f}" for name in HIDDEN) + " |")
    return "\n".join(lines)


def measure(models: dict[str, torch.nn.Module], found: PreparedMixture, options: argparse.Namespace) -> list[Measured]:
    """Measure both models on every source and all tasks."""
    markers = Markers.of(found.tokenizer)
    one = partial(losses, context=options.context, rows=options.windows, batch_size=options.batch)
    measured = []
    for source in found.sources:
        reached: dict[str, dict[str, float]] = {}
        counts = []
        for objective, model in models.items():
            each: dict[str, MixtureLosses] = one(model, source.shards, tasks(objective, markers, options.context))
            reached[objective] = {name: value.loss for name, value in each.items()}
            reached[objective]["left to right"] = source.shards.bits_per_byte(each["left to right"].loss)
            counts.append({name: value.tokens for name, value in each.items()})
        assert counts[0] == counts[1], "both models predict the same tokens"
        measured.append(Measured(source, reached))
    return measured


def curve(runs: dict[str, Path], found: PreparedMixture, options: argparse.Namespace) -> dict[int, list[Measured]]:
    """Return the measurements at each step for which both runs have a saved state."""
    points: dict[int, list[Measured]] = {}
    models = {objective: checkpoints.load(str(run))[0] for objective, run in runs.items()}
    for step in sorted(set.intersection(*(set(checkpoint.steps(run)) for run in runs.values()))):
        for objective, model in models.items():
            saved = checkpoint.read(runs[objective], step).tensors
            own = {name: tensor for name, tensor in saved.items() if name.startswith("model.")}
            checkpoint.load_into_model(model, own)
        points[step] = measure(models, found, options)
    return points


def by_weight(found: Sequence[Measured], name: str, objective: str) -> float:
    """Return the mean loss over all sources, weighted by the mixture."""
    return sum(each.source.weight * each.figures[objective][name] for each in found)


def points_table(points: dict[int, list[Measured]], positions: int) -> str:
    """Return a Markdown table with a row per saved state. positions: tokens read in a step."""
    pairs = [(name, objective) for name in ("left to right", *HIDDEN) for objective in MODELS]
    heads = " | ".join(f"{title(name)}: {MODELS[objective]}" for name, objective in pairs)
    lines = [f"| tokens read, M | {heads} |", "|---:|" + "---:|" * len(pairs)]
    for step, found in points.items():
        cells = " | ".join(f"{by_weight(found, *pair):.3f}" for pair in pairs)
        lines.append(f"| {step * positions / 1e6:.1f} | {cells} |")
    return "\n".join(lines)


def draw_curve(points: dict[int, list[Measured]], positions: int, path: Path) -> None:
    """Draw a panel for each task: the loss of both models over the tokens read."""
    with chart(path, (11, 3.6), 1 + len(HIDDEN), legend=None) as panels:
        for axes, name in zip(panels, ("left to right", *HIDDEN), strict=True):
            for objective, word in MODELS.items():
                values = [by_weight(found, name, objective) for found in points.values()]
                axes.plot([step * positions / 1e6 for step in points], values, marker="o", markersize=3, label=word)
            axes.set_title(title(name), fontsize=10)
            axes.set(xlabel="tokens read, M", ylabel="nats a hidden token" if name in HIDDEN else "bits per byte")
        panels[0].legend(fontsize=9)


def title(name: str) -> str:
    return f"{name} hidden" if name in HIDDEN else name


def table(found: Sequence[Measured]) -> str:
    """Return a Markdown table with a row per source, and the weighted means."""
    names = ["left to right", *HIDDEN]
    heads = [f"{title(name)}: {MODELS[objective]}" for name in names for objective in MODELS]
    lines = ["| source | weight | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    columns = [[each.figures[objective][name] for each in found] for name in names for objective in MODELS]
    for place, each in enumerate(found):
        cells = " | ".join(f"{column[place]:.3f}" for column in columns)
        lines.append(f"| {each.source.name} | {each.source.weight:.2f} | {cells} |")
    means = (sum(e.source.weight * value for e, value in zip(found, column, strict=True)) for column in columns)
    return "\n".join([*lines, "| by the weights | 1 | " + " | ".join(f"{mean:.3f}" for mean in means) + " |"])


def draw(found: Sequence[Measured], path: Path) -> None:
    """Draw a panel for each task, with a pair of bars for each source."""
    names = ["left to right", *HIDDEN]
    size = 11, 0.35 * len(found) + 1.5
    figure, panels = plt.subplots(1, len(names), figsize=size, sharey=True, layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        for shift, objective in ((0.2, "causal"), (-0.2, "ul2")):
            values = [each.figures[objective][name] for each in reversed(found)]
            axes.barh([n + shift for n in range(len(found))], values, height=0.38, label=MODELS[objective])
        axes.set_title(title(name), fontsize=10)
        axes.set_xlabel("bits per byte" if name not in HIDDEN else "nats a hidden token", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(found)), [each.source.name for each in reversed(found)], fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixture", default="multilingual")
    parser.add_argument("--minutes", type=float, default=12.0, help="of training the plain model")
    parser.add_argument("--steps", type=int, help="of each model, in place of --minutes")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="rows in a step")
    parser.add_argument("--dim", type=int, default=256, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of each source, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--points", type=int, default=0, help="states of each run that are measured")
    parser.add_argument("--curve", type=Path, help="draw them")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder, and go on with those there")
    options = parser.parse_args()
    given = options.mixture
    alone = Mixture(given, (MixtureSource(given, given, 1.0),), HELD_OUT)
    found = prepare(alone if given in catalogue.names() else read_mixture(given), options.vocab)
    steps, models = steps_for(options, found), {}
    positions = options.batch * options.context
    with tempfile.TemporaryDirectory() as directory:
        runs = {objective: (options.out or Path(directory)) / objective for objective in MODELS}
        for objective, out in runs.items():
            going = bool(checkpoint.steps(out))
            summary = train_job(job_of(recipe_of(options, objective, steps), found), out, going)
            models[objective] = checkpoints.load(str(out))[0]
            print(f"{MODELS[objective]}: {steps:,} steps in {summary.seconds:.0f} s", flush=True)
        points = curve(runs, found, options) if options.points else {}
    print(f"\n{machine()}; {steps * positions / 1e6:.1f} M tokens read by each model, seed {options.seed}")
    print("left to right: bits per byte; hidden tokens: nats per token\n")
    measured = measure(models, found, options)
    print(f"{table(measured)}\n\n{controls(models['ul2'], found, options)}")
    if points:
        print(f"\n{points_table(points, positions)}")
    if points and options.curve:
        draw_curve(points, positions, options.curve)
    if options.picture:
        draw(measured, options.picture)


if __name__ == "__main__":
    main()
