"""Losses from inside layers, added to an objective with a weight and their own line of metrics."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.mixture import recorded_routing
from keifu.training.protocols import Batch, LossOutput, Objective


@dataclass(frozen=True)
class WithLayerLoss:
    """Objective plus `weight` times the mean over layers of a loss that they record in a forward pass.

    name: of the line of metrics. record: a context manager that collects a record of each layer. loss: of one record.

    The loss is a mean over the rows computed at a time, and counts once for each element of the objective. Unlike other
    losses it depends on the micro-batch.
    """

    objective: Objective
    name: str
    weight: float
    record: Callable[[nn.Module], AbstractContextManager[list[Any]]]
    loss: Callable[[Any], Tensor]

    def __call__(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Return the objective's sums with the layers' loss in them."""
        with self.record(model) as records:
            outcome = self.objective(model, batch)
        if not records:
            raise UserError(f"No layer of this model has a loss {self.name}: train it without one.")
        added = torch.stack([self.loss(record) for record in records]).mean() * outcome.weight
        figures = {**outcome.figures, self.name: added.detach()}
        total = outcome.total + self.weight * added if model.training else outcome.total  # validation: language alone
        return LossOutput(total, outcome.weight, figures)


def with_balancing(objective: Objective, weight: float) -> WithLayerLoss:
    """Add the balancing loss of mixtures of experts (Fedus et al., 2021), as `balancing` in the metrics."""
    return WithLayerLoss(objective, "balancing", weight, recorded_routing, lambda routing: routing.balancing_loss)
