"""Which parameters are updated how; knows kinds of layers, no model and no loop.

AdamW (Loshchilov and Hutter, 2019), fused, and Adadelta (Zeiler, 2012) are torch's. Muon (Jordan et al., 2024)
updates hidden matrices, the parts of a joined one apart, and AdamW everything else.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Adadelta, AdamW, Optimizer

from keifu.layers.linear import JoinedLinear
from keifu.training.muon import PartwiseMuon
from keifu.training.schedules import ratio
from keifu.training.settings import Settings


def hidden_matrices(model: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The weights of linear layers inside numbered layers (`blocks.3...`), each with the rows of its parts.

    Embeddings and heads lie outside; they, biases and gains are no business of Muon's.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    numbered = {name: module for name, module in linears.items() if any(piece.isdigit() for piece in name.split("."))}
    hidden = {name: module for name, module in numbered.items() if module.weight.requires_grad}
    parts = {n: m.parts if isinstance(m, JoinedLinear) else (m.out_features,) for n, m in hidden.items()}
    return {f"{name}.weight": (module.weight, parts[name]) for name, module in hidden.items()}


class Optimisers:
    """Everything that a step updates; its rates follow the schedule."""

    def __init__(self, model: nn.Module, settings: Settings):
        self.settings = settings
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = hidden_matrices(model) if settings.optimizer == "muon" else {}
        muon = (settings.matrix_rate, settings.weight_decay, settings.momentum)
        self.muon = PartwiseMuon(matrices, *muon) if matrices else None
        rest = _groups({n: p for n, p in self.parameters.items() if n not in matrices}, settings.weight_decay)
        kind = "adadelta" if settings.optimizer == "adadelta" else "adamw"
        self.all: dict[str, Optimizer] = {kind: KINDS[kind](rest, settings)}
        if self.muon:
            self.all["muon"] = self.muon.optimizer

    def rates(self, step: int) -> dict[str, float]:
        """The rates that update number `step` (from 0) is made with, under the settings' names."""
        s = self.settings
        share = ratio(s.schedule, step, s.steps, s.warmup, s.final_ratio)
        rates = {"learning_rate": share * s.learning_rate}
        return rates | ({"matrix_rate": share * s.matrix_rate} if self.muon else {})

    def step(self, step: int) -> None:
        """Makes update number `step` from the gradients, which are then dropped."""
        self.update(self.rates(step))

    def update(self, rates: dict[str, float]) -> None:
        """An update with these rates; with the rate 0 no weight changes."""
        for kind, rate in zip(self.all, rates.values(), strict=True):
            for group in self.all[kind].param_groups:
                group["lr"] = rate
        if self.muon:
            self.muon.attach()
        for optimizer in self.all.values():
            optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Frees the gradients, also where a step was abandoned."""
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.muon:
            self.muon.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the optimizers keep, by optimizer, parameter and name."""
        return {
            f"{kind}.{name}.{key}": tensor
            for kind, optimizer in self.all.items()
            for name, parameter in _named(optimizer)
            for key, tensor in optimizer.state[parameter].items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        for key, tensor in state.items():
            kind, _, rest = key.partition(".")
            name, _, field = rest.rpartition(".")
            parameter = dict(_named(self.all[kind]))[name]
            counter = field == "step" and (parameter.device.type == "cpu" or kind == "adadelta")
            place = "cpu" if counter else parameter.device
            self.all[kind].state[parameter][field] = tensor.to(place, copy=True)

    def forget(self) -> None:
        """Starts as if no step had been made."""
        for optimizer in self.all.values():
            optimizer.state.clear()


def _groups(named: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for tensors of two or more axes, embeddings among them, as GPT-2's and LLaMA's trainers have it;
    none for biases and gains, which have one axis."""
    decayed = [(name, p) for name, p in named.items() if p.dim() > 1]
    others = [(name, p) for name, p in named.items() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict[str, Any]], settings: Settings) -> AdamW:
    return AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)


def _adadelta(groups: list[dict[str, Any]], settings: Settings) -> Adadelta:
    """Its weight decay is added to the gradient."""
    return Adadelta(groups, lr=settings.learning_rate, rho=0.95, eps=1e-6)


KINDS: dict[str, Callable[[list[dict[str, Any]], Settings], Optimizer]] = {"adamw": _adamw, "adadelta": _adadelta}


def _named(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    groups = optimizer.param_groups
    return [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
