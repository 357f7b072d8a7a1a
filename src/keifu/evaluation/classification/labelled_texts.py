"""Evaluation of a text classifier on a labelled table: accuracy with its 95% interval, and macro F1.

The table's columns are `text` and `label`. `keifu classify --on` accepts other names, and draws the confusion
matrix.
"""

from pathlib import Path
from typing import Any, cast

from torch import nn

from keifu.data.classification.input_formats import read_examples
from keifu.data.classification.tables import CATALOGUED
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.classification.classifiers import text_classifier
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.generation.text.model import Encoder, TaskHeadModel

names = CATALOGUED.keys
ABOUT = "a text classifier on a table of labelled texts: accuracy with its 95% interval, and macro F1"
OPTIONS = {"encoding", "output"}
TABLES = {".csv", ".tsv", ".jsonl"}


def takes(model: nn.Module) -> bool:
    """Return whether the model has a fixed set of labels for texts."""
    return isinstance(model, Encoder | TaskHeadModel) and bool(cast(Any, model).config.labels)


def accepts(on: str) -> bool:
    """Return whether `on` is such a name or a table."""
    return on in CATALOGUED or Path(on).suffix in TABLES


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Classify each text of the table and compare with its label. Raises `UserError` for a label that the model does
    not have."""
    judge = text_classifier(model, tokenizer)
    examples = read_examples(request.on, judge.form, encoding=request.encoding)
    if request.limit is not None:
        examples = examples.chosen(range(min(request.limit, len(examples))))
    for row in examples.rows:
        if row.label not in judge.labels:
            known = ", ".join(map(repr, judge.labels[:5])) + (", ..." if len(judge.labels) > 5 else "")
            raise UserError(f"{row.where}: the model has no label {row.label!r}; it knows {known}.")
    rows, _ = judge.read(examples, judge.limit, False)
    probabilities = judge.predict_proba(rows)
    confusion = judge.confusion(examples, probabilities)
    label, share = confusion.majority
    figures = confusion.accuracy_figures() | {
        "macro F1": round(confusion.macro_f1, 4),
        f"always {label!r}": round(share, 4),
        "texts": len(examples),
    }
    given = [judge.labels[number] for number in probabilities.argmax(-1).tolist()]
    cells = zip(("\t".join(row.texts) for row in examples.rows), examples.labels, given, strict=True)
    items = ResultTable(("text", "label", "given"), list(cells))
    return EvalResult(figures, tables={"by label": confusion.result("texts")}, items=items)
