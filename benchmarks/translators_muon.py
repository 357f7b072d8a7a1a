"""The recurrent network with attention against the Transformer, both with Muon or both with AdamW.

python benchmarks/translators_muon.py FOLDER [--optimizers muon] [--minutes 7.5] [--seeds 0 1 2] [--write]

Every network learns the same pairs with the same tokenizer, batches, label smoothing and schedule, on one thread, for
the same minutes of processor time. The numbers of steps follow from the median processor time of a step, which is
measured in turns before the first training; validation and decoding are not counted. With Muon, AdamW's rate for
embeddings, gains and heads is 2e-3, which is the better one in `translators.py`, and the rate for matrices is the one
with the lower validation loss after a short run. The measures were chosen before the first run: the validation loss,
and BLEU and chrF by greedy decoding on test pairs without a near copy in the training part. The values of each run are
written to FOLDER, and a run that is complete is not repeated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _results import of_seeds, print_rows, saved, typed, write_table
from _rounds import machine

from keifu.data.translation.batches import by_tokens
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.translation import Scorer, evaluate
from keifu.models import seq2seq as rnn, transformer as attending
from keifu.recipes.translation import seq2seq, transformer
from keifu.recipes.translation.translator_runs import (
    Training,
    TranslationTask,
    own_settings,
    prepare_pairs,
    translator_job,
)  # fmt: skip
from keifu.training.job import Job, PlannedSettings
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

ON = "tatoeba-ja-en"
SECTION = "Translators with Muon for both networks"
RECURRENT, TRANSFORMER = NAMES = "RNN with attention", "Transformer"
RATE = 2e-3  # of AdamW
MATRIX_RATES = 0.01, 0.02  # of Muon
WHOLE = 4096  # rows computed at a time: all of a batch
ROUNDS, UNCOUNTED = 15, 3  # of the measurement of a step
DATA = Path(__file__).parents[1] / "docs/results/data"
COLUMNS = ("", "parameters", "steps", "core minutes", "validation loss, nats per token", "BLEU", "chrF")


def network(name: str, optimizer: str, matrix_rate: float, seed: int, task: TranslationTask) -> Job:
    """Return the training of a network. matrix_rate: Muon's highest rate; AdamW alone does not read it."""
    common: dict[str, Any] = {"data": ON, "steps": 1, "learning_rate": RATE, "seed": seed, "micro_batch": WHOLE}
    if name == RECURRENT:
        kind, recipe, build = "seq2seq", seq2seq.Recipe(**common), rnn.build
        config: Any = replace(recipe.model, context="attention")
    else:
        kind, recipe, build = "transformer", transformer.Recipe(**common), attending.build
        config = recipe.model

    def settings(steps: int) -> Settings:
        return own_settings(recipe, steps, 200, optimizer=optimizer, matrix_rate=matrix_rate)

    def batching(sizes: Any) -> Any:
        return by_tokens(sizes, recipe.tokens_per_batch)

    return translator_job(kind, recipe, build, config, Training(settings, batching, recipe.label_smoothing, 1), task)


def begin(job: Job, steps: int) -> Trainer:
    """Return the trainer of a number of steps."""
    assert isinstance(job.settings, PlannedSettings)
    return Trainer(job.model.train(), job.objective, job.settings.of_steps(steps))


def step(trainer: Trainer, job: Job, number: int) -> None:
    """Train for one step."""
    gradient = trainer.gradient(number, job.data.batch(number))
    assert gradient is not None
    trainer.update(gradient)


def seconds_per_step(jobs: dict[str, Job]) -> dict[str, float]:
    """Return the median processor time of a step of each network, measured in turns."""
    trainers = {name: begin(job, 1000) for name, job in jobs.items()}
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(ROUNDS):
        for name, trainer in trainers.items():
            start = time.process_time()
            step(trainer, jobs[name], number)
            found[name].append(time.process_time() - start)
    return {name: statistics.median(each[UNCOUNTED:]) for name, each in found.items()}


def train(job: Job, steps: int) -> dict[str, float]:
    """Train for these steps. Return the processor time and the validation loss."""
    start = time.process_time()
    trainer = begin(job, steps)
    for number in range(steps):
        step(trainer, job, number)
    minutes = (time.process_time() - start) / 60
    return {"steps": steps, "core minutes": minutes, "loss": trainer.validation(job.data.validation())["loss"]}


def translations(job: Job, limit: int | None) -> list[dict[str, Any]]:
    """Return the greedy translations of the test pairs, with source, reference and whether there is a near copy."""
    assert job.tokenizer
    found = evaluate(job.model.eval(), job.tokenizer, EvalRequest(ON, limit, beam=1)).items
    assert found
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def scores(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return BLEU and chrF of the pairs without a near copy in the training part."""
    clean = [item for item in items if not item["near copy"]]
    found = Scorer("en")([item["translation"] for item in clean], [item["reference"] for item in clean])
    return {"pairs": len(clean), "BLEU": found.bleu, "chrF": found.chrf}


def main() -> None:
    """Choose the rates, train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimizers", nargs="+", choices=["muon", "adamw"], default=["muon"])
    parser.add_argument("--minutes", type=float, default=7.5, help="of processor time for each training")
    parser.add_argument("--choose", type=float, default=1.0, help="minutes of processor time for each rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="test pairs that are translated, 0: none; unset: all")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    values = measure(options, prepare_pairs(transformer.Recipe(data=ON, steps=1)))
    print(json.dumps(values, indent=1))
    rows, kept = table(values)
    print(f"{machine()}\n")
    columns = COLUMNS[: len(rows[0])]
    print_rows([columns, *rows])
    if options.write:
        defaults = {name: parser.get_default(name) for name in ("optimizers", "minutes", "choose", "seeds", "limit")}
        command = typed("translators_muon.py FOLDER", vars(options), defaults) + " --write"
        write_table(DATA / "translation.json", SECTION, command, columns, rows, kept)


def one_run(
    name: str, optimizer: str, rate: float, seed: int, steps: int, task: TranslationTask, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one network, and return its facts and scores; the translations are written to the folder."""
    job = network(name, optimizer, rate, seed, task)
    facts = {"network": name, "optimizer": optimizer, "seed": seed} | train(job, steps)
    facts["parameters"] = sum(weight.numel() for weight in job.model.parameters())
    if options.limit == 0:
        return facts
    items = translations(job, options.limit)
    file = options.folder / f"translations-{optimizer}-{seed}-{name}.json"
    file.write_text(json.dumps(items, ensure_ascii=False), "utf-8")
    return facts | scores(items)


def measure(options: argparse.Namespace, task: TranslationTask) -> dict[str, Any]:
    """Return all values: the processor time of a step, the rates after short runs, and the runs."""

    def kept(name: str, compute: Callable[[], Any]) -> Any:
        found = saved(options.folder, name, compute)
        print(time.strftime("%H:%M:%S"), name, json.dumps(found)[:300], flush=True)
        return found

    pace, chosen, short_runs = {}, {}, {}
    for optimizer in options.optimizers:
        both = {name: network(name, optimizer, MATRIX_RATES[-1], 0, task) for name in NAMES}
        pace[optimizer] = kept(f"pace-{optimizer}", partial(seconds_per_step, both))
        chosen[optimizer] = dict.fromkeys(NAMES, MATRIX_RATES[-1])
    for name in NAMES if "muon" in options.optimizers else ():
        steps, losses = round(60 * options.choose / pace["muon"][name]), {}
        for rate in MATRIX_RATES:
            job = network(name, "muon", rate, 0, task)
            losses[rate] = kept(f"rate-{rate}-{name}", partial(train, job, steps))["loss"]
        chosen["muon"][name] = min(losses, key=lambda rate, losses=losses: losses[rate])
        short_runs[name] = {f"{rate:g}": round(loss, 4) for rate, loss in losses.items()}
    runs = []
    for seed, optimizer, name in product(options.seeds, options.optimizers, NAMES):
        steps = round(60 * options.minutes / pace[optimizer][name])
        work = partial(one_run, name, optimizer, chosen[optimizer][name], seed, steps, task, options)
        runs.append(kept(f"run-{optimizer}-{seed}-{name}", work))
    return {"seconds per step": pace, "rates after short runs": short_runs, "trainings": runs}


def table(values: dict[str, Any]) -> tuple[list[list[str]], dict[str, Any]]:
    """Return the rows, with the mean of the seeds and the lowest and highest, and the values to keep."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in values["trainings"]:
        name = f"{run['network']}, {run['optimizer']}" if len(values["seconds per step"]) > 1 else run["network"]
        groups.setdefault(name, []).append(run)
    rows = []
    for name, runs in groups.items():
        costs = [f"{runs[0]['parameters'] / 1e6:.1f} M", f"{runs[0]['steps']:,}"]
        cells = [
            of_seeds({name: [[run[key] for run in runs]]}, form)[0][0][1]
            for key, form in (("core minutes", ".1f"), ("loss", ".3f"), ("BLEU", ".2f"), ("chrF", ".2f"))
            if key in runs[0]
        ]
        rows.append([name, *costs, *cells])
    return rows, values


if __name__ == "__main__":
    main()
