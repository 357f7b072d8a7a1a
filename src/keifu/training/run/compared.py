"""One page about several runs: their curves laid over each other, their figures, and the settings that differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keifu.training.run import metrics
from keifu.training.run.progress import format_count, format_seconds
from keifu.training.run.report import COLOURS, Curve, chart, write_html
from keifu.training.run.report_words import say, sentence
from keifu.training.run.run_directory import RECIPE
from keifu.training.settings import flat
from keifu.untrusted import read_json_object, reading

MOST_RUNS = len(COLOURS)
CHARTS = {  # title: label of the axis, and field of metrics.jsonl
    "Validation loss of the runs": ("loss", "validation_loss"),
    "Bits per byte of the validation text": ("bits per byte", "bits_per_byte"),
    "Training loss of the runs": ("loss", "loss"),
}


def write_compared(path: Path, folders: Sequence[Path]) -> None:
    """Write a page about several runs: at most `MOST_RUNS`, which have colours of their own."""
    recipes = [read_json_object(folder / RECIPE) for folder in folders]
    lines = [metrics.last_metrics(metrics.read(folder)) for folder in folders]
    names = [folder.name for folder in folders]
    if len({*names}) < len(names):
        names = [str(folder) for folder in folders]
    charts = []
    for title, (label, field) in CHARTS.items():
        marked = field != "loss"
        points = [[(line["step"], line[field]) for line in of_run if field in line] for of_run in lines]
        charts.append(chart(title, label, [Curve(*pair, marked) for pair in zip(names, points, strict=True)]))
    note = "" if len({recipe.get("data_fingerprint") for recipe in recipes}) == 1 else sentence("other data")
    rows = []
    for folder, name, recipe in zip(folders, names, recipes, strict=True):
        with reading(folder / RECIPE):
            rows.append([name, *_figures(recipe)])
    heads = ["run", "steps", "parameters", "training loss", "validation loss", "bits per byte", "of training"]
    write_html(
        path, title=" · ".join(names), heading=" · ".join(names), paragraphs=[note] * bool(note),
        charts="".join(charts), compared=[[*map(say, heads)], *rows], differences=_differences(names, recipes),
    )  # fmt: skip


def _figures(recipe: Mapping[str, Any]) -> list[str]:
    """Return the figures of one run, as texts."""
    figures = recipe.get("figures", {})
    losses = [
        f"{figures[name]:.4g}" if name in figures else "" for name in ("loss", "validation_loss", "bits_per_byte")
    ]
    seconds = format_seconds(figures["seconds"]) if "seconds" in figures else ""
    return [f"{recipe.get('steps', 0):,}", format_count(recipe["cost"]["parameters"]), *losses, seconds]


def _differences(names: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return a table of the settings and options that are not the same in all runs; [] without any."""
    values = [flat({**recipe.get("options", {}), **recipe.get("settings", {})}) for recipe in recipes]
    options = dict.fromkeys(name for of_run in values for name in of_run)
    rows = [[name, *(of_run.get(name, "") for of_run in values)] for name in options]
    differing = [row for row in rows if any(value != row[1] for value in row[2:])]
    return [[say("setting"), *names], *differing] if differing else []
