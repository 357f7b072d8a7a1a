"""What bidirectional pretraining bought: the topics of Wikipedia summaries, told by four ways from few labels or many.

python benchmarks/topics.py [--only NAME ...] [--labels 100 1000 9033] [--epochs 2] [--tokens 64] [--picture PNG]

10,033 summaries with 12 topics, of which 1,000 are held out by a hash of their text and never learned from; the others
are taken in the order of that hash, so that 100 labels are part of the 1,000. The ways: bag of words (TF-IDF of words
and pairs of words) and logistic regression on the embeddings of MiniLM as it is, whose strength of regularisation is
chosen by cross-validation on the labels at hand; a BERT of MiniLM's shape that begins with random weights; MiniLM
fine-tuned; bert-en of keifu's package, fine-tuned with a rate of its own and five times as often, since it is small.
The BERTs see the first 64 tokens of a summary, the others all of it; they see 9,033 summaries twice, 1,000 five times
and 100 twelve times. Seconds are those of learning and of reading the held-out texts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _rounds import machine
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from keifu import checkpoints
from keifu.data.classification.tables import HELD_OUT, LabelledTexts, read, split
from keifu.evaluation.classification.embeddings import embed, encode_texts
from keifu.evaluation.classification.metrics import Confusion, probabilities
from keifu.models import bert
from keifu.recipes.classification import classifier
from keifu.recipes.classification.classifier import SCRATCH, Recipe

ALL = 9033  # labels that are left to learn from
STRENGTHS = {"logisticregression__C": [0.3, 1.0, 3.0, 10.0, 30.0]}
SHAPE = bert.SIZES["all-minilm-l6-v2"]
Way = Callable[[LabelledTexts, LabelledTexts, argparse.Namespace], Confusion]


def judged(right: Sequence[str], given: Sequence[str]) -> Confusion:
    """The figures of given labels."""
    labels = sorted({*right, *given})
    numbers = {label: number for number, label in enumerate(labels)}
    return Confusion.of(*(torch.tensor([numbers[label] for label in each]) for each in (right, given)), labels)


def regression(steps: list[Any], inputs: Any, labels: Sequence[str]) -> Any:
    """Logistic regression behind these steps, its strength chosen by three-fold cross-validation."""
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(make_pipeline(*steps, LogisticRegression(max_iter=2000)), STRENGTHS, cv=folds)
    return search.fit(inputs, labels)


def bag_of_words(training: LabelledTexts, held: LabelledTexts, options: argparse.Namespace) -> Confusion:
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, max_features=100_000)
    learned = regression([words], training.texts, training.labels)
    return judged(held.labels, learned.predict(held.texts).tolist())


def frozen(training: LabelledTexts, held: LabelledTexts, options: argparse.Namespace) -> Confusion:
    model, tokenizer = checkpoints.load("minilm", torch.bfloat16 if options.bfloat16 else None)
    seen, asked = (embed(model, tokenizer, part.texts, cut=True).numpy() for part in (training, held))
    learned = regression([], seen, training.labels)
    return judged(held.labels, learned.predict(asked).tolist())


def trained(
    training: LabelledTexts, held: LabelledTexts, options: argparse.Namespace, times: int = 1, **choice: Any
) -> Confusion:
    """A run of the recipe; fewer labels are seen more often, for otherwise there would be few steps."""
    epochs = times * max(1, round(options.epochs * (ALL / len(training)) ** 0.4))
    recipe = Recipe(cut=options.tokens, epochs=epochs, seed=options.seed, **choice)
    task = classifier.ready(recipe, training, replace(held, texts=(), labels=()))
    with tempfile.TemporaryDirectory() as directory:
        classifier.learn(recipe, task, (options.out or Path(directory)) / f"{recipe.model}-{len(training)}")
    rows, _ = encode_texts(task.tokenizer, held.texts, options.tokens, cut=True)
    best = probabilities(task.model, rows, task.tokenizer.pad_id or 0).argmax(-1).tolist()
    return judged(held.labels, [task.labels[number] for number in best])


def from_scratch(training: LabelledTexts, held: LabelledTexts, options: argparse.Namespace) -> Confusion:
    return trained(training, held, options, model=SCRATCH, size=replace(SHAPE, context_length=options.tokens))


def fine_tuned(training: LabelledTexts, held: LabelledTexts, options: argparse.Namespace) -> Confusion:
    return trained(training, held, options, model="minilm", learning_rate=options.rate)


def small(training: LabelledTexts, held: LabelledTexts, options: argparse.Namespace) -> Confusion:
    return trained(training, held, options, options.times, model="bert-en", learning_rate=options.small_rate)


WAYS: dict[str, tuple[str, Way]] = {
    "words": ("bag of words", bag_of_words),
    "scratch": ("BERT of MiniLM's shape, from scratch", from_scratch),
    "frozen": ("MiniLM's embeddings, frozen", frozen),
    "tuned": ("MiniLM, fine-tuned", fine_tuned),
    "small": ("bert-en, fine-tuned", small),
}


def draw(accuracies: dict[str, dict[int, float]], majority: float, path: Path) -> None:
    """Held-out accuracy by the number of labels, a line for each way."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in accuracies.items():
        axes.plot([*points], [*points.values()], marker="o", label=WAYS[name][0])
    axes.axhline(majority, color="grey", linestyle=":", label="always the most frequent topic")
    axes.set(xscale="log", xlabel="labelled summaries", ylabel="accuracy on 1,000 held-out summaries", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=WAYS, nargs="+", default=[*WAYS])
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000, ALL])
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of a summary that the two BERTs see")
    parser.add_argument("--rate", type=float, default=5e-5, help="the highest rate of fine-tuning")
    parser.add_argument("--small-rate", type=float, default=5e-4, help="the same of bert-en")
    parser.add_argument("--times", type=int, default=5, help="how much more often bert-en sees them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="for frozen embeddings")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    training, held = split(read("wiki-summaries"), options.held_out)
    majority, share = judged(held.labels, held.labels).majority
    print(f"{machine()}; {len(held)} held-out summaries, always {majority!r}: {share:.1%}\n", flush=True)
    print("| | labels | accuracy | macro F1 | seconds |\n|---|---:|---:|---:|---:|", flush=True)
    accuracies: dict[str, dict[int, float]] = {name: {} for name in options.only}
    for name in options.only:
        title, way = WAYS[name]
        for count in options.labels:
            start = time.perf_counter()
            confusion = way(training.chosen(range(min(count, len(training)))), held, options)
            seconds = time.perf_counter() - start
            accuracies[name][count] = confusion.accuracy
            figures = f"{confusion.accuracy:.1%} | {confusion.macro_f1:.3f} | {seconds:.0f}"
            print(f"| {title} | {count:,} | {figures} |", flush=True)
    if options.picture:
        draw(accuracies, share, options.picture)


if __name__ == "__main__":
    main()
