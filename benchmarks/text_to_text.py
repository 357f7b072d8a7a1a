"""Hidden spans against left to right: which one prepares a small T5 better for translation, in equal core seconds?

python benchmarks/text_to_text.py [--pretraining 40] [--fine-tuning 20] [--seeds 0 1 2] [--write JSON]

Every network is the same T5 with the same tokenizer, and learns from Japanese and English sentences without labels for
the first seconds, then from pairs, from Japanese to English, for the others. "hidden spans" hides 15% of the tokens in
spans of 3 on average; "left to right" continues a text from a random position. Two more networks do not learn without
labels: one has the seconds of the second part alone, and one has all seconds for the pairs. The numbers of steps follow
from the median core seconds of a step, measured in turns before the first training. The measure was chosen before the
first run: the loss on 1,000 held-out pairs after the training. All have the rates of the recipe. 12 core minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine

from keifu.data.translation.batches import EncodedPairs, PairData, by_tokens, encode
from keifu.data.translation.pairs import Pair
from keifu.models.variants import t5
from keifu.recipes.translation import t5 as recipe_of_t5
from keifu.recipes.translation.translator_runs import TranslationTask, config_for, prepare_pairs, special_ids
from keifu.training.objectives.language_modeling import translation
from keifu.training.protocols import Data
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

SECTION = "Hidden spans and left to right"
SIZES = t5.Config(context_length=96, dim=128, hidden_dim=512, n_layers=2, n_heads=4, head_dim=32, dropout=0.0)
RECIPE = recipe_of_t5.Recipe(
    vocab_size=4000, tokens_per_batch=2000, model=SIZES, pretraining=recipe_of_t5.Pretraining(window=64)
)
ROUNDS = 15  # of the measurement of a step
WAYS = {  # without labels, and whether the pairs have all seconds
    "hidden spans, then pairs": ("spans", False),
    "left to right, then pairs": ("prefix", False),
    "pairs alone, for the same steps": ("none", False),
    "pairs alone, for all seconds": ("none", True),
}
COLUMNS = ("learns", "steps without labels", "steps with pairs", "loss of held-out pairs, nats per token")


def encoded(task: TranslationTask, pairs: Sequence[Pair]) -> EncodedPairs:
    """Return the pairs that fit the model, with the name of the task before each source."""
    prefix = recipe_of_t5.task_prefix(RECIPE, task.pairs.languages)
    sources = encode(task.tokenizer.encode_batch, [prefix + source for source, _ in pairs])
    targets = encode(task.tokenizer.encode_batch, [target for _, target in pairs])
    return EncodedPairs(sources, targets).fitting(SIZES.context_length)


def texts(task: TranslationTask, objective: Any) -> Any:
    """Return the data without labels."""
    return recipe_of_t5.denoised_text(
        replace(RECIPE, pretraining=replace(RECIPE.pretraining, objective=objective)), task
    )


def begin(model: Any, steps: int, seed: int) -> Trainer:
    """Return the trainer of a number of steps, with the recipe's settings."""
    settings: Settings = recipe_of_t5.settings(replace(RECIPE, seed=seed), steps)
    return Trainer(model.train(), translation, replace(settings, precision="float32"))


def train(model: Any, data: Data, steps: int, seed: int) -> float:
    """Train for these steps. Return the core seconds."""
    start = time.process_time()
    if steps:
        trainer = begin(model, steps, seed)
        for step in range(steps):
            gradient = trainer.gradient(step, data.batch(step))
            assert gradient is not None
            trainer.update(gradient)
    return time.process_time() - start


def seconds_per_step(build: Callable[[int], Any], sources: dict[str, Data]) -> dict[str, float]:
    """Return the median core seconds of a step with each data, measured in turns."""
    trainers = {name: begin(build(0), 1000, 0) for name in sources}
    found: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(ROUNDS):
        for name, trainer in trainers.items():
            start = time.process_time()
            gradient = trainer.gradient(number, sources[name].batch(number))
            assert gradient is not None
            trainer.update(gradient)
            found[name].append(time.process_time() - start)
    return {name: statistics.median(each[3:]) for name, each in found.items()}


@torch.no_grad()
def loss_of(model: Any, data: Data) -> float:
    """Return the loss per token on the held-out pairs."""
    outcomes = [translation(model.eval(), batch) for batch in data.validation()]
    return sum(float(each.total) for each in outcomes) / sum(float(each.weight) for each in outcomes)


def measure(options: argparse.Namespace) -> tuple[dict[str, list[list[float]]], dict[str, tuple[int, int]]]:
    """Return by way the losses of the seeds, and the numbers of steps."""
    task = prepare_pairs(RECIPE, recipe_of_t5.SENTINEL_TOKENS)
    training, held_out = encoded(task, task.parts.train), encoded(task, task.parts.validation)
    special, config = special_ids(task.tokenizer), config_for(task, SIZES)

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return t5.build(config)

    def pairs(seed: int) -> PairData:
        return PairData(training, held_out, special, by_tokens(training.sizes(), RECIPE.tokens_per_batch), seed)

    unlabelled = {name: texts(task, name) for name in ("spans", "prefix")}
    pace = seconds_per_step(build, {**unlabelled, "pairs": pairs(0)})
    print({name: round(seconds, 4) for name, seconds in pace.items()}, flush=True)
    found: dict[str, list[list[float]]] = {name: [[]] for name in WAYS}
    steps: dict[str, tuple[int, int]] = {}
    for seed in options.seeds:
        for name, (objective, everything) in WAYS.items():
            first = 0 if objective == "none" else round(options.pretraining / pace[objective])
            seconds = options.fine_tuning + (options.pretraining if everything else 0)
            steps[name] = first, round(seconds / pace["pairs"])
            model, data = build(seed), pairs(seed)
            if first:
                unlabelled[objective].seed = seed
            spent = train(model, unlabelled.get(objective, data), first, seed), train(model, data, steps[name][1], seed)
            loss = loss_of(model, data)
            found[name][0].append(loss)
            print(
                f"seed {seed}, {name}: {steps[name]} steps, {loss:.4f}, {spent[0]:.0f} + {spent[1]:.0f} s", flush=True
            )
    return found, steps


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=float, default=40, help="core seconds without labels")
    parser.add_argument("--fine-tuning", type=float, default=20, help="core seconds with pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, steps = measure(options)
    before = {name: [f"{count:,}" for count in counts] for name, counts in steps.items()}
    rows, values = of_seeds(found, ".3f", before)
    print(f"{machine()}\n")
    print_rows([COLUMNS, *rows])
    if options.write:
        command = typed("text_to_text.py", vars(options), usual(parser))
        write_table(options.write, SECTION, command, COLUMNS, rows, values | {"steps": steps})


if __name__ == "__main__":
    main()
