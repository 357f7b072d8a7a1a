"""Comparison of translators that were trained for the same time: by sentence length, over training time, and attention.

python benchmarks/translation.py --run "with attention" runs/seq2seq --run "without" runs/none --on tatoeba-ja-en \
    [--by-length PNG] [--over-time PNG [--states 12]] [--heads PNG --sentence TEXT] [--limit N]

The pairs are the held-out test pairs of a catalogue entry. `--over-time` translates its first N validation pairs
(default 500) greedily with evenly spaced saved states of a run (`keifu train ... --keep 60`).
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _charts import chart
from _rounds import machine
from safetensors.torch import load_file

import keifu
from keifu.data.translation.pairs import read_pairs, split
from keifu.evaluation.plots.attention_maps import draw_maps
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.translation import Scorer, evaluate, language_of
from keifu.inference.embeddings.attention_maps import inspect_translation
from keifu.inference.text.translation import translate
from keifu.training.run.checkpoint import load_into_model

Runs = list[tuple[str, Path]]


def by_length(runs: Runs, on: str, reverse: bool, limit: int | None, picture: Path) -> None:
    """Print BLEU and chrF of each run, overall and by the length of the source. Draw those by length."""
    with chart(picture, (9, 3.8), 2, legend=None) as (left, right):
        for name, path in runs:
            found = evaluate(*keifu.load(path), EvalRequest(on, limit, reverse, by_length=True))
            print(f"\n{name}: {found.figures}\n", flush=True)
            table = found.tables["by length"]
            print(f"| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}")
            for row in table.rows:
                print(f"| {' | '.join(map(str, row))} |", flush=True)
            enough = [row for row in table.rows if row[1] >= 20]
            for axes, column in ((left, 2), (right, 3)):
                axes.plot([row[0] for row in enough], [row[column] for row in enough], marker="o", label=name)
                axes.set(xlabel=f"length: {table.columns[0]}", ylabel=table.columns[column], ylim=(0, None))
        left.legend()


def over_time(runs: Runs, on: str, reverse: bool, n: int, most: int, picture: Path) -> None:
    """Draw chrF of greedy translations and the validation loss over minutes of training."""
    pairs = read_pairs(on, reverse)
    sources, references = map(list, zip(*split(pairs).validation[:n], strict=True))
    scorer = Scorer(pairs.languages[1] or language_of(references))
    with chart(picture, (9, 3.8), 2, legend=None) as (left, right):
        for name, path in runs:
            model, tokenizer = keifu.load(path)
            curve = []
            for minutes, tensors in states(path, most):
                with torch.no_grad():
                    load_into_model(model, tensors)
                scores = scorer(translate(model, tokenizer, sources, beam=1), references)
                curve.append((minutes, scores.chrf))
                print(f"{name}: {minutes:.1f} min, BLEU {scores.bleu:.1f}, chrF {scores.chrf:.1f}", flush=True)
            left.plot(*zip(*curve, strict=True), marker="o", label=name)
            right.plot(*zip(*losses(path), strict=True), label=name)
        left.set(xlabel="minutes of training", ylabel=f"chrF of {n} greedy translations", ylim=(0, None))
        right.set(xlabel="minutes of training", ylabel="validation loss, nats per token")
        for axes in (left, right):
            axes.legend()


def states(run: Path, most: int) -> Iterable[tuple[float, dict[str, Any]]]:
    """Return minutes of training and weights of `most` evenly spaced saved states, including the last one."""
    kept = sorted((run / "state").glob("step-*.json"))
    for facts in kept if len(kept) <= most else [kept[round(i * len(kept) / most) - 1] for i in range(1, most + 1)]:
        yield json.loads(facts.read_text())["seconds"] / 60, load_file(facts.with_suffix(".safetensors"))


def losses(run: Path) -> list[tuple[float, float]]:
    """Return minutes of training and validation losses from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds, found = 0.0, []
    for line in lines:
        seconds = line.get("seconds", seconds)
        if "validation_loss" in line:
            found.append((seconds / 60, line["validation_loss"]))
    return found


def heads(path: Path, sentence: str, picture: Path) -> None:
    """Draw every head of cross-attention during the greedy translation of a sentence."""
    model, tokenizer = keifu.load(path)
    seen = inspect_translation(model, [*tokenizer.encode(sentence), model.config.end_id])
    cross = {name.replace("decoder.", "layer ").replace(".cross_attention", ""): each
             for name, each in seen.attention.items()}  # fmt: skip
    rows, columns = (
        [tokenizer.decode([t]).replace("\ufffd", "·") or "(end)" for t in ids] for ids in (seen.rows, seen.columns)
    )
    written = tokenizer.decode(seen.rows)
    picture.write_bytes(draw_maps(cross, rows, columns, f"{sentence} → {written}"))
    print(f"{sentence} → {written}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, action="append", required=True, metavar=("NAME", "FOLDER"))
    parser.add_argument("--on", default="tatoeba-ja-en")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--by-length", type=Path)
    parser.add_argument("--over-time", type=Path)
    parser.add_argument("--states", type=int, default=12)
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--sentence", default="彼女は昨日、駅で古い友達に会いました。")
    options = parser.parse_args()
    runs = [(name, Path(folder)) for name, folder in options.run]
    print(machine())
    if options.by_length:
        by_length(runs, options.on, options.reverse, options.limit, options.by_length)
    if options.over_time:
        over_time(runs, options.on, options.reverse, options.limit or 500, options.states, options.over_time)
    if options.heads:
        heads(runs[-1][1], options.sentence, options.heads)


if __name__ == "__main__":
    main()
