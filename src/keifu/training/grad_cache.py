"""Gradient caching (GradCache): micro-batching for contrastive losses, which compare all rows of a batch.

(Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".) First compute the outputs
of all rows without storing activations. Then compute the loss and its gradient with respect to these outputs. Then run
each micro-batch again, with a backward pass from its part of that gradient. The result is the gradient of the whole
batch, up to rounding, at the cost of a second forward pass. Batch normalisation uses the statistics of each
micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keifu.processes import Processes
from keifu.training.protocols import Batch, LossOutput

Rows = tuple[Tensor, ...]  # outputs of a batch: the first axis of each tensor is the batch


@dataclass(frozen=True)
class WholeBatchObjective:
    """An objective in two steps: `rows` computes the outputs of any part of a batch; `loss` needs the outputs of all
    rows.
    """

    rows: Callable[[Any, Batch], Rows]
    loss: Callable[[Any, Rows], LossOutput]

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss of a batch that fits into memory."""
        return self.loss(model, self.rows(model, batch))


def whole_batch_outputs(
    objective: WholeBatchObjective, model: nn.Module, call: Callable[..., Any], passes: Callable[[], Iterator[Batch]],
    sizes: Sequence[int], scale: float, ranks: Processes,
) -> Iterator[LossOutput]:  # fmt: skip
    """Yield one output per micro-batch. Their sums and gradients, over all ranks, add up to those of the whole batch.

    call: runs a function of the model (compiled, if the run is). passes: yields this rank's micro-batches, of `sizes`
    rows, with the same random numbers each time. scale: the factor by which the caller multiplies each total before the
    backward pass. If gradients are disabled, one output is yielded.
    """
    if len(sizes) == ranks.data_size == 1:
        yield from (call(objective, part) for part in passes())
        return
    local = _cache_outputs(objective, model, call, passes)
    keeps = torch.is_grad_enabled()
    outputs = tuple(ranks.gather_rows(rows).requires_grad_(keeps) for rows in local)
    batch_output = call(objective.loss, outputs)
    counted = 0.0 if ranks.data_rank else 1.0  # every rank computes the whole loss, and data rank 0 counts it
    if not keeps:
        yield _share_of(batch_output, counted)
        return
    part_of_scale = scale / ranks.data_size  # the gradient of the loss's parameters is divided equally among the ranks
    (batch_output.total * part_of_scale).backward()
    first = sum(ranks.counts(local[0])[: ranks.data_rank])
    mine = (output.grad[first : first + len(local[0])].split(list(sizes)) for output in outputs)  # pyright: ignore
    for number, (part, gradients) in enumerate(zip(passes(), zip(*mine, strict=True), strict=True)):
        rows = call(objective.rows, part)
        sums = [(row.float() * gradient.float()).sum() for row, gradient in zip(rows, gradients, strict=True)]
        carrier = torch.stack(sums).sum() / part_of_scale
        share = _share_of(
            batch_output, 0.0 if number else counted
        )  # the first micro-batch carries all sums, the others none
        yield share._replace(total=carrier - carrier.detach() + share.total)


def _share_of(output: LossOutput, share: float) -> LossOutput:
    """Return a share of the sums, detached."""
    figures = {name: value * share for name, value in output.figures.items()}
    return LossOutput(share * output.total.detach(), output.weight * share, figures)


def _cache_outputs(
    objective: WholeBatchObjective, model: nn.Module, call: Callable[..., Any], passes: Callable[[], Iterator[Batch]]
) -> Rows:
    """Return the outputs of all this rank's rows, without activations. Restore buffers (running statistics)
    afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad():
        outputs = [call(objective.rows, part) for part in passes()]
        for buffer, before in buffers:
            buffer.copy_(before)
    return tuple(torch.cat(pieces) for pieces in zip(*outputs, strict=True))
