"""Evaluation of networks of neurons on numeric rows: accuracy on digits, a toy set or a CSV file."""

import torch
from torch import nn

from keifu.data.classification import tables
from keifu.errors import UserError
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.inference.embeddings.row_classifiers import RowClassifier

ABOUT = "a network of neurons on rows of numbers with classes: accuracy"
NAMES = tables.NAMES
OPTIONS = {"output"}


def takes(model: nn.Module) -> bool:
    """Return whether the model classifies numeric rows."""
    return isinstance(model, RowClassifier)


def accepts(on: str) -> bool:
    """Return whether `on` is a table."""
    return on.endswith(".csv")


def evaluate(model: nn.Module, tokenizer: None, request: EvalRequest) -> EvalResult:
    """Return the accuracy on the held-out rows, or on all rows if the set is too small to hold any out."""
    assert isinstance(model, RowClassifier)
    data = tables.toy_dataset(request.on)
    inputs, targets = data.held_out.inputs[: request.limit], data.held_out.targets[: request.limit]
    has, data_size = (model.config.dim, len(model.classes)), (inputs.shape[1], len(data.classes))
    if has != data_size:
        raise UserError(
            f"{request.on} has rows of {data_size[0]} numbers in {data_size[1]} classes, and the network is for "
            f"{has[0]} in {has[1]}: evaluate it on what it was trained for."
        )
    given_classes = model.predict_proba(inputs).argmax(-1)
    confusion = Confusion.of(targets, given_classes, data.classes)
    figures = confusion.accuracy_figures() | {"rows": len(targets)}
    rows = [
        (data.classes[right], data.classes[data_size]) for right, data_size in torch.stack([targets, given_classes], 1)
    ]
    return EvalResult(figures, (), {"by class": confusion.result("rows")}, ResultTable(("right", "given"), rows))
