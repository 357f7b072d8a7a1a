"""The state of a training run: the content of a checkpoint, from which a run resumes with the same bits."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from keifu.processes import current
from keifu.training.hardware.failures import Divergence
from keifu.training.hardware.precision import LossScale
from keifu.training.length import Length, with_plan
from keifu.training.optim.loss_spikes import SpikeState
from keifu.training.optim.optimizers import Optimizers
from keifu.training.pace import Clock
from keifu.training.protocols import LossOutput, OnPolicy
from keifu.training.run import checkpoint

OTHERS = ("data.", "sums.")  # prefixes of tensors that belong neither to the model nor to the optimizers


class Sums(dict[str, Tensor]):
    """Running sums by their names in a checkpoint: `total` (the loss), `weight` (the number of elements), and
    `figures.NAME`. They stay on the device until they are read. Empty sums count as 0."""

    @classmethod
    def of(cls, outcome: LossOutput) -> "Sums":
        """Return the sums of one micro-batch, detached."""
        weight = outcome.weight
        if not isinstance(weight, Tensor):
            weight = outcome.total.new_full((), weight, dtype=torch.float32)  # avoids a copy from the host
        figures = {f"figures.{name}": torch.as_tensor(value) for name, value in outcome.figures.items()}
        sums = {"total": outcome.total, "weight": weight.to(outcome.total.device, torch.float32), **figures}
        return cls({name: value.detach() for name, value in sums.items()})

    def __add__(self, other: "Sums") -> "Sums":
        return Sums({name: value + other[name] for name, value in self.items()}) if self else other

    def zeros(self) -> "Sums":
        """Return sums with the same names, all 0."""
        return Sums({name: value * 0 for name, value in self.items()})

    def means(self) -> dict[str, float]:
        """Return the mean loss and figures per element. This waits for the device."""
        weight = float(self["weight"]) or 1.0
        names = sorted(self.keys() - {"total", "weight"})  # the order in which a checkpoint returns them
        means = {name.removeprefix("figures."): float(self[name]) / weight for name in names}
        return {"loss": float(self["total"]) / weight, **means}


@dataclass
class TrainState:
    """State of a run: the weights, and everything else that changes from step to step.

    length: the number of steps of the run. on_policy: data with a state. described: the settings, options and data that
    determine the result. step: number of steps done. sums: since the last line of metrics.
    """

    model: nn.Module
    optimizers: Optimizers
    length: Length
    scale: LossScale
    spikes: SpikeState
    on_policy: OnPolicy | None = None
    described: dict[str, Any] = field(default_factory=dict)
    divergence: Divergence = field(default_factory=Divergence)
    clock: Clock = field(default_factory=Clock)
    step: int = 0
    sums: Sums = field(default_factory=Sums)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name: of the model, the optimizers, the data and the sums."""
        return {
            **checkpoint.model_tensors(self.model),
            **{f"optimisers.{name}": tensor for name, tensor in self.optimizers.state().items()},
            **{f"data.{name}": tensor for name, tensor in (self.on_policy.state() if self.on_policy else {}).items()},
            # a copy: a figure may be the same tensor as the total
            **{f"sums.{name}": tensor.clone() for name, tensor in self.sums.items()},
        }

    def facts(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON."""
        return {
            "described": self.described,
            **self.clock.facts(),
            "divergence": asdict(self.divergence),
            "spikes": self.spikes.facts(),
            "loss_scale": self.scale.facts(),
            **self.length.facts(),
        }

    def load(self, saved: checkpoint.SavedState) -> None:
        """Restore a saved state."""
        facts = saved.facts
        self._load(saved)
        self.spikes = SpikeState(self.spikes.rules, **facts.get("spikes", {}))
        self.scale.load(**facts.get("loss_scale", {}))
        self.clock = Clock(facts["seconds"], facts.get("passed", 0.0), facts.get("lasted", {}))

    def rewind(self, saved: checkpoint.SavedState) -> None:
        """Go back to an earlier state of this run and continue with other batches. The clock is not reset."""
        self.spikes = self.spikes.after(saved.step, SpikeState(self.spikes.rules, **saved.facts["spikes"]))
        self.optimizers.drop_gradients()
        self.optimizers.forget()
        self._load(saved)

    @torch.no_grad()
    def _load(self, saved: checkpoint.SavedState) -> None:
        tensors = saved.tensors
        if current().is_replicated:
            checkpoint.load_into_model(self.model, tensors)
            self.optimizers.load(_with_prefix("optimisers.", tensors))
        else:
            self.optimizers.prime()
            tensors = current().load(saved.path, {n: t for n, t in self.tensors().items() if not n.startswith(OTHERS)})
        if self.optimizers.settings.minutes is not None:
            self.length = with_plan(self.length, saved.facts)
        if self.on_policy:
            self.on_policy.load_state(_with_prefix("data.", tensors))
        device = next(self.model.parameters()).device
        self.sums = Sums({name: tensor.to(device) for name, tensor in _with_prefix("sums.", tensors).items()})
        self.divergence = Divergence(**saved.facts["divergence"])
        self.step = saved.step


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
