"""Losses computed inside layers, added to an objective with a weight and reported as a metric."""

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
    """Objective plus `weight` times a loss that layers record in a forward pass, averaged over the layers.

    name: the metric's name. record: context manager that collects one record per layer. loss: computes the loss of a
    record.

    The loss is a mean over the micro-batch, and is counted once per element of the objective. Unlike other losses it
    depends on the micro-batch size.
    """

    objective: Objective
    name: str
    weight: float
    record: Callable[[nn.Module], AbstractContextManager[list[Any]]]
    loss: Callable[[Any], Tensor]

    def __call__(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Return the objective's sums, with the layers' loss added to the total in training mode."""
        with self.record(model) as records:
            outcome = self.objective(model, batch)
        if not records:
            raise UserError(f"No layer of this model has a loss {self.name}: train it without one.")
        added = torch.stack([self.loss(record) for record in records]).mean() * outcome.weight
        figures = {**outcome.figures, self.name: added.detach()}
        # validation: without the layers' loss
        total = outcome.total + self.weight * added if model.training else outcome.total
        return LossOutput(total, outcome.weight, figures)


def with_balancing(objective: Objective, weight: float) -> WithLayerLoss:
    """Add the balancing loss of mixtures of experts (Fedus et al., 2021), as `balancing` in the metrics."""
    return WithLayerLoss(objective, "balancing", weight, recorded_routing, lambda routing: routing.balancing_loss)
