"""Classification from few labels: logistic regression on a frozen encoder's embeddings.

With a few hundred labels this is better than fine-tuning, and it takes seconds (docs/results/sentences.md). The saved
model is the encoder with the regression as its head, for `keifu classify` and `keifu embed`.

The regression has an L2 penalty and is computed by L-BFGS (Liu and Nocedal, 1989), in float64. The objective is
scikit-learn's: C times the sum of the cross-entropies, plus half of the squared weights. The bias has no penalty.
Cross-validation chooses the strength C with the lowest cross-entropy, so that probabilities are calibrated.

Axes: rows, dim, labels.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from keifu import checkpoints
from keifu.data.classification.tables import Examples
from keifu.evaluation.classification import metrics
from keifu.evaluation.classification.labelled_texts import confusion_of
from keifu.inference.embeddings import classifiers, encoders
from keifu.models import bert
from keifu.recipes.classification.table_runs import LEAST_CUT, TableOptions, check_cut
from keifu.training.run.report import write_page

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
ITERATIONS = 300


@dataclass(frozen=True, eq=False)
class Regression:
    """Fitted regression, and its accuracy in cross-validation."""

    weight: Float[Tensor, "labels dim"]
    bias: Float[Tensor, "labels"]
    strength: float
    accuracy: float


def fit(
    inputs: Float[Tensor, "rows dim"], targets: Int[Tensor, "rows"], labels: int, strength: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "labels dim"], Float[Tensor, "labels"]]:  # fmt: skip
    """Return weights and biases at the minimum. start: initial weights and biases; None: zeros."""
    inputs = inputs.double()
    weight, bias = start or (inputs.new_zeros(labels, inputs.shape[1]), inputs.new_zeros(labels))
    weight = weight.clone().requires_grad_(True)
    bias = bias.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitting = F.cross_entropy(F.linear(inputs, weight, bias), targets)
        value = fitting + weight.square().sum() / (2 * strength * len(targets))
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()


def folds(targets: Int[Tensor, "rows"], count: int) -> Int[Tensor, "rows"]:
    """Return the fold of each row. The rows of each label are distributed evenly over the folds."""
    order = targets.argsort(stable=True)
    folds_of_rows = torch.empty_like(targets)
    folds_of_rows[order] = torch.arange(len(targets)) % count
    return folds_of_rows


def cross_validate(
    inputs: Float[Tensor, "rows dim"], targets: Int[Tensor, "rows"], labels: int, count: int = FOLDS
) -> dict[float, tuple[float, float]]:
    """Return (cross-entropy, accuracy) in cross-validation for each strength."""
    fold = folds(targets, min(count, len(targets)))
    sums = {strength: [0.0, 0.0] for strength in STRENGTHS}
    for part in fold.unique().tolist():
        in_training, tested = fold != part, fold == part
        start = None
        for strength in STRENGTHS:
            start = fit(inputs[in_training], targets[in_training], labels, strength, start)
            logits = F.linear(inputs[tested].double(), *start)
            sums[strength][0] += float(F.cross_entropy(logits, targets[tested], reduction="sum"))
            sums[strength][1] += int((logits.argmax(-1) == targets[tested]).sum())
    return {strength: (loss / len(targets), right / len(targets)) for strength, (loss, right) in sums.items()}


def fit_best(inputs: Float[Tensor, "rows dim"], targets: Int[Tensor, "rows"], labels: int) -> Regression:
    """Return the regression on all rows, at the strength with the lowest cross-entropy in cross-validation."""
    figures = cross_validate(inputs, targets, labels)
    strength = min(STRENGTHS, key=lambda value: figures[value])
    return Regression(*fit(inputs, targets, labels, strength), strength, figures[strength][1])


def learn(recipe: TableOptions, training: Examples, unseen: Examples, out: Path) -> metrics.Confusion | None:
    """Fit the regression, save the model into `out` with a report, and print the figures. Return the confusion matrix
    of held-out rows, if there are any."""
    model, tokenizer = checkpoints.load(recipe.model, torch.float32)
    config = encoders.encoder(model).config
    check_cut(recipe.cut, LEAST_CUT, config.context_length)
    limit = recipe.cut or config.context_length
    rows, shortened = encoders.encode_texts(tokenizer, training.texts, limit, recipe.cut is not None)
    print(f"Computing the embeddings of {len(training):,} texts ...", flush=True)
    inputs = encoders.embed_rows(model, rows, tokenizer.pad_id or 0).cpu()
    labels = training.classes
    numbers = {label: number for number, label in enumerate(labels)}
    targets = torch.tensor([numbers[label] for label in training.labels])
    regression = fit_best(inputs, targets, len(labels))
    classifier = with_regression(model, config, labels, regression)
    checkpoints.save(classifier, tokenizer, out)
    tested = confusion(classifier, tokenizer, unseen, recipe) if len(unseen) else None
    text = sentence(len(training), regression, tested)
    facts = {
        "encoder": recipe.model, "data": recipe.data, "rows": len(training), "held out": len(unseen), "cut": shortened,
        "strength C": regression.strength, "cross-validated accuracy": regression.accuracy,
    }  # fmt: skip
    pictures = {} if tested is None else {"confusion": tested.picture()}
    title = f"Logistic regression on frozen embeddings learns “{Path(recipe.data).stem}”"
    write_page(out, title, text, facts, pictures, "" if tested is None else tested.page())
    print(text)
    return tested


def with_regression(model: Any, config: bert.Config, labels: tuple[str, ...], regression: Regression) -> bert.Bert:
    """Return the encoder with the regression as its classification head."""
    without = replace(config, labels=(), sentence_head=False)
    heads: dict[str, Any] = {"labels": labels, "sentence_head": True, "words": False, "next_sentence": False}
    classifier = bert.with_heads(model, without, pooled=False, **heads)
    assert classifier.sentence_head is not None
    with torch.no_grad():
        classifier.sentence_head.project.weight.copy_(regression.weight)
        classifier.sentence_head.project.bias.copy_(regression.bias)
    return classifier


def confusion(model: bert.Bert, tokenizer: Any, validation: Examples, recipe: TableOptions) -> metrics.Confusion:
    """Return the confusion matrix of held-out rows, computed like `keifu classify --on`."""
    judge = classifiers.text_classifier(model, tokenizer)
    rows, _ = judge.read(validation, recipe.cut or judge.limit, recipe.cut is not None)
    return confusion_of(judge, validation, judge.predict_proba(rows))


def sentence(rows: int, regression: Regression, tested: metrics.Confusion | None) -> str:
    """Describe the accuracy in cross-validation, and on held-out rows if there are any, in a sentence."""
    first = (
        f"Cross-validation on the {rows:,} training rows: accuracy {regression.accuracy:.1%} (strength C = "
        f"{regression.strength:g}, chosen there)."
    )
    return first if tested is None else f"{first}\nOn held-out texts: {tested.verdict()}"
