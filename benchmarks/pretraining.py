"""Generative pretraining: topics of Wikipedia summaries, classified by a GPT-1 with and without pretraining.

python benchmarks/pretraining.py [--minutes 12] [--labels 100 1000 9033] [--epochs 2] [--tokens 64] [--picture PNG]

10,033 summaries with 12 topics, 1,000 of them held out by a hash of their text (the split of benchmarks/topics.py). A
GPT-1 of 4 blocks and width 256 is pretrained with the settings of `keifu train gpt1` for --minutes on the catalogue's
English text without the held-out summaries; its tokenizer is trained on the same text. Then `keifu train gpt1-finetune`
trains it on the topics, with and without the auxiliary loss, and the same model with random weights for as many steps.
All read the first 64 tokens of a summary, and see 9,033 of them twice, 1,000 five times and 100 twelve times. Random
weights have a higher rate than pretrained ones. Seconds are those of fine-tuning and of reading the held-out texts;
accuracies are means over the seeds.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from _charts import chart
from _rounds import machine

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.data.classification.examples import Examples
from keifu.data.classification.tables import read
from keifu.data.text.normalization import key
from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import prepare_parts
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation.classification.metrics import Confusion
from keifu.models import gpt1
from keifu.recipes.classification import gpt1_finetune as telling
from keifu.recipes.classification.table_runs import evaluate
from keifu.recipes.language import gpt1 as writing
from keifu.recipes.language.pretraining import VALIDATION_TOKENS, Text, TextTask, pretraining_job
from keifu.recipes.running import train_job
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.setup import steps_within

HELD_OUT, ALL = 1000, 9033
VALIDATION = 0x400  # of 2^16 keys: one document in 64 is for the pretraining loss
MODEL = replace(writing.SMALL, context_length=128)
DROPOUT = 0.1  # in fine-tuning, as in the paper
WARMUP = 0.1  # of the steps: random weights with post-norm need a warm-up, and there are few steps


@dataclass(frozen=True)
class Way:
    """Line of the table: the initial weights, and the weight of the auxiliary loss."""

    title: str
    pretrained: bool
    lm_weight: float


WAYS = {
    "scratch": Way("random weights", False, 0.0),
    "scratch-lm": Way("random weights, auxiliary loss", False, 0.5),
    "tuned": Way("pretrained", True, 0.0),
    "tuned-lm": Way("pretrained, auxiliary loss", True, 0.5),
}


def texts(names: list[str], held: Examples) -> Iterator[str]:
    """Yield the catalogue's documents without the held-out summaries. The comparison ignores case and punctuation."""
    hidden = {key(row.texts[0]) for row in held.rows}
    for name in names:
        yield from (text for text in catalogue.documents(name) if key(text) not in hidden)


def prepared(options: argparse.Namespace, held: Examples) -> TextTask:
    """Return the pretraining text, its tokenizer and its token ids."""
    parts = {part for name in options.texts for part in (catalogue.entry(name).parts or (name,))}
    names = sorted(parts)
    print(f"Learning a tokenizer from {', '.join(names)} ...", flush=True)
    tokenizer = train_tokenizer("bpe", texts(names, held), options.vocab_size)

    def both() -> tuple[list[str], list[str]]:
        sides: tuple[list[str], list[str]] = [], []
        for text in texts(names, held):
            sides[int(key(text)[:4], 16) < VALIDATION].append(text)
        return sides

    content = hashlib.sha256(repr((names, sorted(key(row.texts[0]) for row in held.rows))).encode()).hexdigest()
    return TextTask(Text("+".join(names)), tokenizer, prepare_parts("pretraining", content, both, tokenizer))


def pretrained(options: argparse.Namespace, task: TextTask, out: Path) -> None:
    """Train for --minutes, and save the model in a folder."""
    recipe = writing.Recipe(model=MODEL, batch_size=32, seed=options.seeds[0])
    config = replace(MODEL, vocab_size=task.tokenizer.vocab_size)
    data = PackedText(task.shards, config.context_length, 32, options.seeds[0], VALIDATION_TOKENS)
    torch.manual_seed(0)
    trial = replace(writing.choose_settings(recipe, 10**7), steps=1000)
    steps = steps_within(options.minutes, gpt1.build(config), causal_language_modeling, data, trial, data.batch(0))
    settings = writing.choose_settings(replace(recipe, steps=steps), 0)
    summary = train_job(pretraining_job("gpt1", task, gpt1.build, MODEL, settings, prompt="The"), out, replaces=True)
    seen = steps * 32 * config.context_length
    loss, bits = summary.figures["validation_loss"], summary.figures["bits_per_byte"]
    passes = seen / len(task.shards.tokens)
    print(f"Pretrained: {steps:,} steps, {seen / 1e6:.1f} M tokens ({passes:.2f} passes) in {summary.seconds:.0f} s; ")
    print(f"{loss:.3f} nats per token, {bits:.3f} bits per byte, on text that was kept apart.\n", flush=True)


def with_dropout(folder: Path, out: Path, tokenizer: Tokenizer | None = None) -> str:
    """Save a folder's model with the dropout for fine-tuning. If a tokenizer is given, save a new model of the same
    shape."""
    if tokenizer is None:
        weights, words = checkpoints.load(folder)
        model = gpt1.build(replace(weights.config, dropout=DROPOUT))
        model.load_state_dict(weights.state_dict())
    else:
        words = tokenizer
        model = gpt1.build(replace(MODEL, vocab_size=tokenizer.vocab_size, dropout=DROPOUT))
    checkpoints.save(model, words, out)
    return str(out)


def tuned(way: Way, base: str, training: Examples, held: Examples, seed: int, options: argparse.Namespace) -> Confusion:
    """Fine-tune by the recipe and evaluate. A run with fewer labels has more epochs, so that it has enough steps."""
    epochs = max(1, round(options.epochs * (ALL / len(training)) ** 0.4))
    recipe = telling.Recipe(
        model=base, cut=options.tokens, epochs=epochs, seed=seed, lm_weight=way.lm_weight, warmup=WARMUP,
        learning_rate=options.rate if way.pretrained else options.scratch_rate,
    )  # fmt: skip
    task = telling.ready(recipe, training, held)
    with tempfile.TemporaryDirectory() as directory:
        silent = replace(task, held_out=replace(task.held_out, rows=[], targets=[]))
        train_job(telling.job_of(recipe, silent, Path(directory)), Path(directory))
    return evaluate(task)


def draw(accuracies: dict[str, dict[int, float]], majority: float, path: Path) -> None:
    """Draw held-out accuracy by the number of labels, a line for each way."""
    with chart(path, (7, 4.5)) as axes:
        for name, points in accuracies.items():
            style = "-" if WAYS[name].lm_weight else "--"
            colour = "tab:blue" if WAYS[name].pretrained else "tab:orange"
            axes.plot([*points], [*points.values()], style, color=colour, marker="o", label=WAYS[name].title)
        axes.axhline(majority, color="grey", linestyle=":", label="always the most frequent topic")
        axes.set(xscale="log", xlabel="labelled summaries", ylabel="accuracy on 1,000 held-out summaries", ylim=(0, 1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="of pretraining")
    parser.add_argument("--texts", nargs="+", default=["english"], help="of the catalogue")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--only", choices=WAYS, nargs="+", default=[*WAYS])
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000, ALL])
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of a summary that are read")
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest one of fine-tuning")
    parser.add_argument("--scratch-rate", type=float, default=1e-3, help="the same where weights begin at random")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--run", type=Path, help="keep the pretrained model in this folder, or take the one there")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    training, held = read("wiki-summaries").split(options.held_out)
    print(f"{machine()}; {len(held)} held-out summaries\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or Path(folder) / "pretrained"
        if not (run / "config.json").exists():
            pretrained(options, prepared(options, held), run)
        tokenizer = checkpoints.load(run)[1]
        bases = {
            True: with_dropout(run, Path(folder) / "written"),
            False: with_dropout(run, Path(folder) / "random", tokenizer),
        }
        compare(options, bases, training, held)


def compare(options: argparse.Namespace, bases: dict[bool, str], training: Examples, held: Examples) -> None:
    """Print the table, and draw it if a path is given."""
    print("| | labels | accuracy | macro F1 | seconds |\n|---|---:|---:|---:|---:|", flush=True)
    accuracies: dict[str, dict[int, float]] = {name: {} for name in options.only}
    share = 0.0
    for name in options.only:
        way = WAYS[name]
        for count in options.labels:
            some, start = training.subset(range(min(count, len(training)))), time.perf_counter()
            found = [tuned(way, bases[way.pretrained], some, held, seed, options) for seed in options.seeds]
            seconds = (time.perf_counter() - start) / len(found)
            share, accuracies[name][count] = found[0].majority[1], mean(each.accuracy for each in found)
            figures = f"{accuracies[name][count]:.1%} | {mean(each.macro_f1 for each in found):.3f} | {seconds:.0f}"
            print(f"| {way.title} | {count:,} | {figures} |", flush=True)
    print(f"\nAlways the most frequent topic: {share:.1%}.")
    if options.picture:
        draw(accuracies, share, options.picture)


if __name__ == "__main__":
    main()
