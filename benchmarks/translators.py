"""Comparison of translators at equal core minutes: recurrent networks without and with attention, and the Transformer.

python benchmarks/translators.py FOLDER [--choose 120] [--steps 835 740 1000] [--write]

They learn the same pairs with the same tokenizer and batches on one thread with AdamW, one after the other. The highest
rate is the one that is best after `--choose` steps. The numbers of steps give about equal core minutes on an AMD EPYC.
A network whose folder is complete is not trained again.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _results import print_rows, write_items, write_table

import keifu
from keifu.data.translation.batches import by_tokens
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.translation import RESAMPLES, Scorer, evaluate
from keifu.models import seq2seq as rnn, transformer as attending
from keifu.recipes.running import train_job
from keifu.recipes.translation import seq2seq, transformer
from keifu.recipes.translation.translator_runs import Training, own_settings, translator_job
from keifu.training.settings import Settings

ON = "tatoeba-ja-en"
SECTION = "Translators with the same optimizer"
RATES = 1e-3, 2e-3
WITHOUT, WITH, TRANSFORMER = NAMES = "RNN without attention", "RNN with attention", "Transformer"
DATA = Path(__file__).parents[1] / "docs/results/data"


class Network(NamedTuple):
    """Arguments of `translator_job`: name, options and settings of a recipe, the network's builder and its config."""

    kind: str
    recipe: Any
    settings: Callable[[Any, int], Settings]
    build: Callable[[Any], torch.nn.Module]
    config: Any


def network(name: str, steps: int, rate: float) -> Network:
    """Return a network by its name. rate: AdamW's highest learning rate."""
    if name in (WITHOUT, WITH):
        recipe = seq2seq.Recipe(data=ON, steps=steps, learning_rate=rate)
        config = replace(recipe.model, context="attention" if name == WITH else "fixed")
        return Network("seq2seq", recipe, partial(own_settings, warmup=200), rnn.build, config)
    recipe = transformer.Recipe(data=ON, steps=steps, learning_rate=rate)
    return Network("transformer", recipe, _with_adamw, attending.build, recipe.model)


def _with_adamw(recipe: transformer.Recipe, steps: int) -> Settings:
    return replace(transformer.keifu_settings(recipe, steps), optimizer="adamw")


def train(name: str, steps: int, rate: float, folder: Path) -> dict[str, float]:
    """Train a network, unless its folder has the facts of a complete run. Return its loss and core minutes."""
    facts = folder / "facts.json"
    if not facts.is_file():
        made = network(name, steps, rate)
        start = time.process_time()
        batching = partial(by_tokens, tokens=made.recipe.tokens_per_batch)
        smoothing = made.recipe.label_smoothing
        training = Training(partial(made.settings, made.recipe), batching, smoothing, average=1)
        run = train_job(translator_job(made.kind, made.recipe, made.build, made.config, training), folder)
        minutes = (time.process_time() - start) / 60
        found = {"loss": run.figures["validation_loss"], "core minutes": minutes, "steps": steps, "rate": rate}
        facts.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(facts.read_text(encoding="utf-8"))


def choose(name: str, steps: int, folder: Path) -> dict[str, float]:
    """Return the validation loss of each rate of `RATES` after a short run."""
    return {f"{rate:g}": train(name, steps, rate, folder / f"rate-{rate:g}")["loss"] for rate in RATES}


def columns(items: Sequence[dict[str, Any]], name: str, chosen: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return a network's translations and the references of the chosen pairs."""
    return [items[i][name] for i in chosen], [items[i]["reference"] for i in chosen]


def difference(items: Sequence[dict[str, Any]], name: str, other: str, chosen: Sequence[int]) -> str:
    """Return how much higher the BLEU of one network is, with its 95% interval by the paired bootstrap."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="13a")
    both = [columns(items, each, chosen) for each in (name, other)]
    counts = [np.array(bleu._extract_corpus_statistics(texts, [references])) for texts, references in both]
    generator = np.random.default_rng(0)
    resampled = [generator.integers(0, len(chosen), len(chosen)) for _ in range(RESAMPLES)]

    def more(rows: Any) -> float:
        ours, theirs = (bleu._compute_score_from_stats(part[rows].sum(0).tolist()).score for part in counts)
        return ours - theirs

    low, high = np.percentile([more(rows) for rows in resampled], [2.5, 97.5])
    return f"{more(slice(None)):.2f} ({low:.2f} to {high:.2f})"


def scores(items: Sequence[dict[str, Any]], name: str, chosen: Sequence[int]) -> list[str]:
    """Return BLEU and chrF of the chosen pairs, each with its 95% interval."""
    scorer, part = Scorer("en"), columns(items, name, chosen)
    found, intervals = scorer(*part), scorer.intervals(*part)
    return [f"{found.bleu:.2f} ({intervals[0]})", f"{found.chrf:.2f} ({intervals[1]})"]


def main_rows(about: dict[str, Any], items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the comparison, on pairs without a near copy in the training part."""
    clean = [i for i, item in enumerate(items) if not item["near copy"]]
    rows = []
    for name, facts in about["networks"].items():
        more = "" if name == WITH else difference(items, name, WITH, clean)
        costs = [f"{facts['parameters'] / 1e6:.1f} M", f"{facts['steps']:,}", f"{facts['core minutes']:.1f}"]
        rows.append([name, *costs, f"{facts['loss']:.3f}", *scores(items, name, clean), more])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--choose", type=int, default=120)
    parser.add_argument("--steps", type=int, nargs=3, default=[835, 740, 1000])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = {name: choose(name, options.choose, options.folder / name) for name in (WITH, TRANSFORMER)}
    best = {name: float(min(losses, key=lambda rate: losses[rate])) for name, losses in rates.items()}
    best[WITHOUT] = best[WITH]
    about: dict[str, Any] = {"rates after short runs": rates, "networks": {}}
    items: list[dict[str, Any]] = []
    steps = dict(zip(NAMES, options.steps, strict=True))
    for name in NAMES:
        folder = options.folder / name / "run"
        facts: dict[str, Any] = train(name, steps[name], best[name], folder)
        model, tokenizer = keifu.load(folder)
        facts["parameters"] = sum(weight.numel() for weight in model.parameters())
        about["networks"][name] = facts
        kept = folder / "translations.json"
        if not kept.is_file():
            found = evaluate(model, tokenizer, EvalRequest(ON, options.limit, beam=1)).items
            assert found
            kept.write_text(json.dumps([dict(zip(found.columns, row, strict=True)) for row in found.rows]), "utf-8")
        rows = json.loads(kept.read_text("utf-8"))
        if not items:
            items = [{key: row[key] for key in ("source", "reference", "near copy")} for row in rows]
        for item, row in zip(items, rows, strict=True):
            item[name] = row["translation"]
    table = main_rows(about, items)
    print(json.dumps(about, indent=1))
    print_rows(table)
    if options.write:
        write_items(DATA / "translators.json", about, items)
        command = "python benchmarks/translators.py FOLDER --write"
        values = {"file": "translators.json"}
        head = ["", "parameters", "steps", "core minutes", "validation loss, nats per token", "BLEU (95%)",
                "chrF (95%)", "BLEU above the RNN with attention (95%)"]  # fmt: skip
        write_table(DATA / "translation.json", SECTION, command, head, table, values)


if __name__ == "__main__":
    main()
