"""Losses that compare the rows of a batch with each other, computed part by part all the same; knows no model.

Gradient caching (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): first
what each row gives, without keeping anything for a backward pass; then the loss of all of these and its gradient by
them; then each part again, which that gradient is sent through. The gradient is that of the whole batch, to rounding;
the price is a second forward pass. A batch norm sees each part by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keifu.training.protocols import Batch, LossOutput

Rows = tuple[Tensor, ...]  # what a batch gives, several tensors of a row for each of its rows


@dataclass(frozen=True)
class WholeBatchObjective:
    """An objective in two steps: `rows` may be computed of a part of the batch, `loss` is of all of its rows."""

    rows: Callable[[Any, Batch], Rows]
    loss: Callable[[Any, Rows], LossOutput]

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """The loss of a batch that fits in memory."""
        return self.loss(model, self.rows(model, batch))


def whole_batch_outputs(
    objective: WholeBatchObjective,
    model: nn.Module,
    parts: Sequence[Batch],
    context: Callable[[], AbstractContextManager[object]],
    begin: Callable[[int], None],
    scale: float = 1.0,
) -> Iterator[LossOutput]:
    """Outcomes whose sums, and whose gradients, added up, are those of the whole batch.

    `context` surrounds forward passes. `begin` is called with a part's number before each of the two passes over it,
    which draw the same random numbers. Where no gradient is asked for, there is one outcome.
    `scale` is what the caller multiplies each total with before it goes back through it.
    """
    if len(parts) == 1:
        begin(0)
        with context():
            found = objective(model, parts[0])
        yield found
        return
    cached = _cache_outputs(objective, model, parts, context, begin)
    with context():
        whole = objective.loss(model, cached)
    if not torch.is_grad_enabled():
        yield whole
        return
    (whole.total * scale).backward()  # into the cached rows, and into what the loss itself has learned
    gradients = zip(*(each.grad.split([_size(part) for part in parts]) for each in cached), strict=True)  # pyright: ignore
    for number, (part, wanted) in enumerate(zip(parts, gradients, strict=True)):
        begin(number)
        with context():
            rows = objective.rows(model, part)
        each = [(row.float() * gradient.float()).sum() for row, gradient in zip(rows, wanted, strict=True)]
        carrier = torch.stack(each).sum() / scale
        share = 0.0 if number else 1.0  # the first part carries all sums, the others none
        figures = {name: value * share for name, value in whole.figures.items()}
        yield LossOutput(carrier - carrier.detach() + share * whole.total.detach(), whole.weight * share, figures)


def _cache_outputs(
    objective: WholeBatchObjective,
    model: nn.Module,
    parts: Sequence[Batch],
    context: Callable[[], AbstractContextManager[object]],
    begin: Callable[[int], None],
) -> Rows:
    """What all rows give, as leaves that collect a gradient; running statistics stay as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    found = []
    with torch.no_grad():
        for number, part in enumerate(parts):
            begin(number)
            with context():
                found.append(objective.rows(model, part))
        for buffer, before in buffers:
            buffer.copy_(before)
    keeps = torch.is_grad_enabled()
    return tuple(torch.cat(pieces).requires_grad_(keeps) for pieces in zip(*found, strict=True))


def _size(part: Batch) -> int:
    return len(next(iter(part.values())))
