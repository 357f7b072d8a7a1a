"""Evaluation of a text classifier on a labelled table: accuracy with its 95% interval, and macro F1.

The table's columns are `text` and `label`. `keifu classify --on` accepts other names, and draws the confusion matrix.
Axes: examples, answers = labels, or the answers of an example.
"""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.data.classification.examples import Examples
from keifu.data.classification.input_formats import read_examples
from keifu.data.classification.tables import CATALOGUED
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.inference.embeddings.classifiers import TextClassifier, text_classifier
from keifu.inference.text.model import Encoder, TaskHeadModel

NAMES = CATALOGUED
ABOUT = "a text classifier on a table of labelled texts: accuracy with its 95% interval, and macro F1"
OPTIONS = {"encoding", "output"}
TABLES = {".csv", ".tsv", ".jsonl"}


def confusion_of(
    judge: TextClassifier, examples: Examples, probabilities: Float[Tensor, "examples answers"]
) -> Confusion:
    """Return the confusion matrix. In multiple choice the labels are the numbers of the answers."""
    labels = tuple(map(str, range(probabilities.shape[1]))) if judge.form.answers else judge.labels
    return Confusion.of(torch.tensor(judge.targets(examples)), probabilities.argmax(-1).cpu(), labels)


def takes(model: nn.Module) -> bool:
    """Return whether the model has a fixed set of labels for texts."""
    return isinstance(model, Encoder | TaskHeadModel) and bool(cast(Any, model).config.labels)


def accepts(on: str) -> bool:
    """Return whether `on` is a table."""
    return Path(on).suffix in TABLES


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Classify each text of the table and compare with its label. Raises `UserError` for a label that the model does
    not have."""
    judge = text_classifier(model, tokenizer)
    examples = read_examples(request.on, judge.form, encoding=request.encoding)
    examples = examples.subset(range(len(examples))[: request.limit])
    for row in examples.rows:
        if row.label not in judge.labels:
            known_labels = ", ".join(map(repr, judge.labels[:5])) + (", ..." if len(judge.labels) > 5 else "")
            raise UserError(f"{row.where}: the model has no label {row.label!r}; it knows {known_labels}.")
    rows, _ = judge.read(examples, judge.limit, False)
    predicted = judge.predict_proba(rows)
    confusion = confusion_of(judge, examples, predicted)
    label, share = confusion.majority
    figures = confusion.accuracy_figures() | {
        "macro F1": round(confusion.macro_f1, 4),
        f"always {label!r}": round(share, 4),
        "texts": len(examples),
    }
    predicted_labels = [judge.labels[number] for number in predicted.argmax(-1).tolist()]
    cells = zip(("\t".join(row.texts) for row in examples.rows), examples.labels, predicted_labels, strict=True)
    items = ResultTable(("text", "label", "given"), list(cells))
    return EvalResult(figures, tables={"by label": confusion.result("texts")}, items=items)
