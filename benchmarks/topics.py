"""Bidirectional pretraining: topics of Wikipedia summaries, classified in several ways from few or many labels.

python benchmarks/topics.py [--only NAME ...] [--labels 100 1000 9033] [--epochs 2] [--tokens 64] [--seeds 0]
    [--left RUN] [--choose] [--write FILE] [--picture PNG]

10,033 summaries have 12 topics. 1,000 of them are held out by a hash of their text; the others are used in the order of
that hash, so that 100 labels are part of the 1,000. The ways: logistic regression on a bag of words (TF-IDF of words
and pairs of words) and on MiniLM's embeddings, with a regularisation chosen by cross-validation on the given labels; a
BERT of MiniLM's shape with random weights; fine-tuned MiniLM; fine-tuned bert-en of keifu's package, with a different
rate and five times as many epochs, since it is small; and with --left RUN a fine-tuned GPT-1 of the same size that has
read the same text as often from left to right (--left-rate, --lm-weight). The BERTs see the first 64 tokens of a
summary, the others all of it; they see 9,033 summaries twice, 1,000 five times and 100 twelve times. --choose evaluates
on 1,000 other summaries that are never trained on, for choosing a rate. Accuracies are means over the seeds. Seconds
are those of training and of reading the held-out texts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _charts import chart
from _results import of_seeds, publish, typed, usual
from _rounds import machine, spread
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from keifu import checkpoints
from keifu.data.catalogue.readers import HELD_OUT_ARTICLES
from keifu.data.classification.examples import Examples
from keifu.data.classification.tables import read
from keifu.evaluation.classification.metrics import Confusion
from keifu.inference.embeddings.classifiers import probabilities
from keifu.inference.embeddings.encoders import embed, encode_texts
from keifu.models import bert
from keifu.recipes.classification import classifier, gpt1_finetune
from keifu.recipes.classification.classifier import SCRATCH, Recipe
from keifu.recipes.classification.table_runs import evaluate
from keifu.recipes.running import train_job

ALL = 9033  # number of labels for training
STRENGTHS = {"logisticregression__C": [0.3, 1.0, 3.0, 10.0, 30.0]}
SHAPE = bert.SIZES["all-minilm-l6-v2"]
Way = Callable[[Examples, Examples, argparse.Namespace], Confusion]


def judged(right: Sequence[str], given: Sequence[str]) -> Confusion:
    """Return the confusion matrix of true labels (`right`) and predicted ones (`given`)."""
    labels = sorted({*right, *given})
    numbers = {label: number for number, label in enumerate(labels)}
    return Confusion.of(*(torch.tensor([numbers[label] for label in each]) for each in (right, given)), labels)


def regression(steps: list[Any], inputs: Any, labels: Sequence[str]) -> Any:
    """Return logistic regression after these steps, with a strength chosen by three-fold cross-validation."""
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(make_pipeline(*steps, LogisticRegression(max_iter=2000)), STRENGTHS, cv=folds)
    return search.fit(inputs, labels)


def bag_of_words(training: Examples, held: Examples, options: argparse.Namespace) -> Confusion:
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, max_features=100_000)
    learned = regression([words], training.texts, training.labels)
    return judged(held.labels, learned.predict(held.texts).tolist())


def frozen(training: Examples, held: Examples, options: argparse.Namespace) -> Confusion:
    model, tokenizer = checkpoints.load("minilm", torch.bfloat16 if options.bfloat16 else None)
    seen, asked = (embed(model, tokenizer, part.texts, cut=True).numpy() for part in (training, held))
    learned = regression([], seen, training.labels)
    return judged(held.labels, learned.predict(asked).tolist())


def passes(training: Examples, options: argparse.Namespace) -> int:
    """Return the number of epochs: more for fewer labels, so that there are enough steps."""
    return max(1, round(options.epochs * (ALL / len(training)) ** 0.4))


def trained(
    training: Examples, held: Examples, options: argparse.Namespace, times: int = 1, **choice: Any
) -> Confusion:
    """Train by the recipe, and return the figures on the held-out texts."""
    recipe = Recipe(cut=options.tokens, epochs=times * passes(training, options), seed=options.seed, **choice)
    task = classifier.ready(recipe, training, held.subset(()))
    with tempfile.TemporaryDirectory() as directory:
        out = (options.out or Path(directory)) / f"{recipe.model}-{len(training)}"
        train_job(classifier.job_of(recipe, task, out), out)
    rows, _ = encode_texts(task.tokenizer, held.texts, options.tokens, cut=True)
    best = probabilities(task.model, rows, task.tokenizer.pad_id or 0).argmax(-1).tolist()
    return judged(held.labels, [training.classes[number] for number in best])


def from_scratch(training: Examples, held: Examples, options: argparse.Namespace) -> Confusion:
    return trained(training, held, options, model=SCRATCH, size=replace(SHAPE, context_length=options.tokens))


def fine_tuned(training: Examples, held: Examples, options: argparse.Namespace) -> Confusion:
    return trained(training, held, options, model="minilm", learning_rate=options.rate)


def small(training: Examples, held: Examples, options: argparse.Namespace) -> Confusion:
    return trained(training, held, options, options.times, model="bert-en", learning_rate=options.small_rate)


def left_to_right(training: Examples, held: Examples, options: argparse.Namespace) -> Confusion:
    """Fine-tune GPT-1 by its recipe, with as many tokens and epochs as `small`. Return the figures."""
    recipe = gpt1_finetune.Recipe(
        model=str(options.left), cut=options.tokens, epochs=options.times * passes(training, options),
        seed=options.seed, lm_weight=options.lm_weight, warmup=0.1, learning_rate=options.left_rate,
    )  # fmt: skip
    task = gpt1_finetune.ready(recipe, training, held)
    with tempfile.TemporaryDirectory() as directory:
        silent = replace(task, held_out=replace(task.held_out, rows=[], targets=[]))
        train_job(gpt1_finetune.job_of(recipe, silent, Path(directory)), Path(directory))
    return evaluate(task)


WAYS: dict[str, tuple[str, Way]] = {
    "words": ("bag of words", bag_of_words),
    "scratch": ("BERT of MiniLM's shape, from scratch", from_scratch),
    "frozen": ("MiniLM's embeddings, frozen", frozen),
    "tuned": ("MiniLM, fine-tuned", fine_tuned),
    "small": ("bert-en, fine-tuned", small),
    "left": ("the same text from left to right, fine-tuned", left_to_right),
}


def draw(accuracies: dict[str, dict[int, float]], majority: float, path: Path) -> None:
    """Draw held-out accuracy by the number of labels, a line for each way."""
    with chart(path, (7, 4.5)) as axes:
        for name, points in accuracies.items():
            axes.plot([*points], [*points.values()], marker="o", label=WAYS[name][0])
        axes.axhline(majority, color="grey", linestyle=":", label="always the most frequent topic")
        axes.set(xscale="log", xlabel="labelled summaries", ylabel="accuracy on 1,000 held-out summaries", ylim=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=WAYS, nargs="+", help="unset: all, left-to-right where there is --left")
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000, ALL])
    parser.add_argument("--held-out", type=int, default=HELD_OUT_ARTICLES)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of a summary that the two BERTs see")
    parser.add_argument("--rate", type=float, default=5e-5, help="the highest rate of fine-tuning")
    parser.add_argument("--small-rate", type=float, default=5e-4, help="the same of bert-en")
    parser.add_argument("--times", type=int, default=5, help="how much more often bert-en sees them")
    parser.add_argument("--left", type=Path, help="a run of keifu train gpt1")
    parser.add_argument("--left-rate", type=float, default=5e-4, help="the highest rate of its fine-tuning")
    parser.add_argument("--lm-weight", type=float, default=0.5, help="of its auxiliary language modelling loss")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="for frozen embeddings")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data, for ways with several seeds")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    options.only = options.only or [name for name in WAYS if name != "left" or options.left]
    training, held = read("wiki-summaries").split(options.held_out)
    if options.choose:
        held = training.subset(range(len(training) - 1000, len(training)))
    majority, share = judged(held.labels, held.labels).majority
    print(f"{machine()}; {len(held)} held-out summaries, always {majority!r}: {share:.1%}\n", flush=True)
    print("| | labels | accuracy | macro F1 | seconds |\n|---|---:|---:|---:|---:|", flush=True)
    accuracies: dict[str, dict[int, float]] = {name: {} for name in options.only}
    by_seed: dict[str, list[list[float]]] = {WAYS[name][0]: [] for name in options.only}
    for name in options.only:
        title, way = WAYS[name]
        for count in options.labels:
            start, found = time.perf_counter(), list[Confusion]()
            for seed in options.seeds:
                options.seed = seed
                found.append(way(training.subset(range(min(count, len(training)))), held, options))
            seconds = (time.perf_counter() - start) / len(found)
            by_seed[title].append([each.accuracy for each in found])
            accuracies[name][count] = mean(by_seed[title][-1])
            right, f1 = spread(by_seed[title][-1], ".1%"), mean(each.macro_f1 for each in found)
            figures = f"{right} | {f1:.3f} | {seconds:.0f}"
            print(f"| {title} | {count:,} | {figures} |", flush=True)
    rows, values = of_seeds(by_seed, ".1%")
    columns = ["accuracy", *(f"{count:,} labels" for count in options.labels)]
    command = typed("topics.py", vars(options), usual(parser))
    publish(options.write, "bert-en with few labels", command, columns, rows, values)
    if options.picture:
        draw(accuracies, share, options.picture)


if __name__ == "__main__":
    main()
