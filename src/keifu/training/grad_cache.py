"""Gradient caching (GradCache): contrastive losses, which compare the rows of a batch, under micro-batching.

(Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".) First the outputs of all
rows are computed without keeping activations; then the loss of all outputs and its gradient with respect to them; then
each micro-batch again, with a backward pass from its part of that gradient. The gradient is that of the whole batch, up
to rounding; the cost is a second forward pass. Batch normalisation uses the statistics of each micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keifu.training.protocols import Batch, LossOutput

Rows = tuple[Tensor, ...]  # the outputs of a batch: tensors with one row for each of its rows


@dataclass(frozen=True)
class WholeBatchObjective:
    """An objective in two steps: `rows` computes outputs of any part of a batch, `loss` needs those of all its rows."""

    rows: Callable[[Any, Batch], Rows]
    loss: Callable[[Any, Rows], LossOutput]

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """The loss of a batch that fits into memory."""
        return self.loss(model, self.rows(model, batch))


def whole_batch_outputs(
    objective: WholeBatchObjective,
    model: nn.Module,
    parts: Sequence[Batch],
    context: Callable[[], AbstractContextManager[object]],
    begin: Callable[[int], None],
    scale: float = 1.0,
) -> Iterator[LossOutput]:
    """Outputs whose sums and gradients add up to those of the whole batch.

    `context`: surrounds forward passes. `begin`: called with a part's number before each of the two passes over it, so
    that both have the same random numbers. `scale`: the factor by which the caller multiplies each total before its
    backward pass. Where gradients are disabled, there is one output.
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
    (whole.total * scale).backward()  # into the cached outputs, and into the loss's own parameters
    gradients = zip(*(each.grad.split([_size(part) for part in parts]) for each in cached), strict=True)  # pyright: ignore
    for number, (part, wanted) in enumerate(zip(parts, gradients, strict=True)):
        begin(number)
        with context():
            rows = objective.rows(model, part)
        each = [(row.float() * gradient.float()).sum() for row, gradient in zip(rows, wanted, strict=True)]
        carrier = torch.stack(each).sum() / scale
        share = 0.0 if number else 1.0  # the first part has all sums, the others none
        figures = {name: value * share for name, value in whole.figures.items()}
        yield LossOutput(carrier - carrier.detach() + share * whole.total.detach(), whole.weight * share, figures)


def _cache_outputs(
    objective: WholeBatchObjective,
    model: nn.Module,
    parts: Sequence[Batch],
    context: Callable[[], AbstractContextManager[object]],
    begin: Callable[[int], None],
) -> Rows:
    """The outputs of all rows, as leaf tensors that collect a gradient; buffers (running statistics) are restored."""
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
