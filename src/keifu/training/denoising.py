"""What a mixture of denoisers trains a decoder to do, and figures beside the loss; knows no loop and no model.

Axes: batch, length = tokens.
"""

from typing import Any

from torch import nn

from keifu.layers.losses import IGNORED, linear_cross_entropy
from keifu.training.protocols import Batch, Objective, Outcome


def denoising(model: Any, batch: Batch) -> Outcome:
    """Prediction of the tokens of batch["tokens"] [batch, length + 1] for which batch["mask"] is True, or of all.

    A batch is what `keifu.data.denoised_rows` makes. The attention is causal over the prefix too, so that the model is
    an ordinary decoder wherever it is loaded; an encoder-decoder, which reads its inputs in both directions, learns the
    same tasks by `keifu.training.objectives.translation`. Only targets get logits: of a mixture of denoisers they are
    less than half of the tokens. The model offers `hidden` and `head_weight`.
    """
    hidden, targets = model.hidden(batch["tokens"][:, :-1]), batch["tokens"][:, 1:]
    if "mask" not in batch:
        return Outcome(linear_cross_entropy(hidden, model.head_weight, targets), targets.numel())
    wanted = batch["mask"][:, 1:]
    if wanted.device.type == "cpu":  # a GPU would be waited for
        hidden, targets = hidden[wanted], targets[wanted]
    else:
        targets = targets.masked_fill(~wanted, IGNORED)
    return Outcome(linear_cross_entropy(hidden, model.head_weight, targets), wanted.sum())


def measured(model: nn.Module, batch: Batch, objective: Objective, names: list[str]) -> Outcome:
    """The objective, and in evaluation mode the figures `names` beside it, of the batches that are there for one.

    batch["figure"] [batch] says which figure a batch is for, counted from 1; such a batch counts for nothing else. Its
    loss times batch["factor"] [batch] is what it adds to the figure (see `keifu.data.mixed_text.MixedText`).
    """
    outcome = objective(model, batch)
    if model.training or "figure" not in batch:
        return outcome
    figures = dict.fromkeys(names, outcome.total.new_zeros(()))
    if place := int(batch["figure"][0]):
        figures[names[place - 1]] = outcome.total * batch["factor"][0]
        return Outcome(outcome.total * 0, 0.0, figures)
    return Outcome(outcome.total, outcome.weight, figures)
