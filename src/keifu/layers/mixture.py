"""Mixture of experts: a router sends each token to a few of many feed-forward networks (Shazeer et al., 2017).

Axes: tokens = batch · length, dim, experts, k = experts of one token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.linear import Linear

Tokens = Float[Tensor, "tokens dim"]


class Routing(NamedTuple):
    """A router's choice: the experts of each token, their weights, and the scores of all experts, which sum to 1."""

    weights: Float[Tensor, "tokens k"]
    experts: Int[Tensor, "tokens k"]
    scores: Float[Tensor, "tokens experts"]

    @property
    def load(self) -> Int[Tensor, " experts"]:
        """Return the number of tokens of each expert."""
        return self.experts.flatten().bincount(minlength=self.scores.shape[-1])

    @property
    def balancing_loss(self) -> Float[Tensor, ""]:
        """The balancing loss of Switch Transformers (Fedus et al., 2021, equations 4 to 6).

        It is n_experts · Σ share of tokens · mean score: k if the load is even, and more if it is not.
        """
        shares = self.load.to(self.scores) / len(self.scores)
        return self.scores.shape[-1] * (shares * self.scores.mean(0)).sum()


class Router(nn.Module):
    """Base class of routers, which choose k of the experts.

    normalised: whether the weights of a token are divided by their sum.
    """

    def __init__(self, n_experts: int, k: int, normalised: bool):
        super().__init__()
        if not 1 <= k <= n_experts:
            raise UserError(f"{k} experts of a token cannot be chosen from {n_experts}: choose 1 to {n_experts}.")
        self.n_experts, self.k, self.normalised = n_experts, k, normalised


class SoftmaxRouter(Router):
    """Router that takes the k highest of a softmax (Shazeer et al., 2017; Mixtral, Qwen3-MoE, OLMoE, gpt-oss)."""

    def __init__(self, dim: int, n_experts: int, k: int, normalised: bool = True, bias: bool = False):
        super().__init__(n_experts, k, normalised)
        self.gate = Linear(dim, n_experts, bias)

    def forward(self, x: Tokens) -> Routing:
        """Choose the experts of each token. The softmax is computed in float32."""
        scores = self.gate(x).float().softmax(-1)
        weights, experts = scores.topk(self.k, -1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights, experts, scores)


class FloatLinear(Linear):
    """Linear layer without a bias that computes in float32 for any dtype of its input and weight."""

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:  # noqa: A002
        return nn.functional.linear(input.float(), self.weight.float())


class GroupedSigmoidRouter(Router):
    """Router of DeepSeek-V3 (2024, section 2.1.2): sigmoid scores, a correction that affects only the choice, and
    groups.

    Experts are chosen within the `k_groups` groups whose two best corrected scores have the highest sum. The weights
    are the uncorrected scores, times `scale`.
    """

    def __init__(
        self, dim: int, n_experts: int, k: int, n_groups: int = 1, k_groups: int = 1, normalised: bool = True,
        scale: float = 1.0,
    ):  # fmt: skip
        super().__init__(n_experts, k, normalised)
        if n_experts % n_groups or not 1 <= k_groups <= n_groups:
            raise UserError(f"{n_experts} experts cannot be in {n_groups} groups of which {k_groups} are chosen.")
        self.n_groups, self.k_groups, self.scale = n_groups, k_groups, scale
        self.gate = FloatLinear(dim, n_experts, bias=False)
        self.register_buffer("correction", torch.zeros(n_experts))
        self.correction: Tensor

    def forward(self, x: Tokens) -> Routing:
        """Choose the experts of each token. The scores are computed in float32."""
        scores = self.gate(x).sigmoid()
        corrected = (scores + self.correction).unflatten(-1, (self.n_groups, -1))
        best = corrected.topk(min(2, corrected.shape[-1]), -1).values.sum(-1)
        group_mask = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(self.k_groups, -1).indices, True)
        experts = corrected.masked_fill(~group_mask[..., None], -torch.inf).flatten(-2).topk(self.k, -1).indices
        weights = scores.gather(-1, experts)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights * self.scale, experts, scores / scores.sum(-1, keepdim=True))

    @torch.no_grad()
    def balance_(self, load: Int[Tensor, " experts"], rate: float = 1e-3) -> None:
        """Raise the correction of experts below the mean load, and lower that of the others (Wang et al., 2024)."""
        load = load.to(self.correction)
        self.correction += rate * (load.mean() - load).sign()


class GatedNetwork(nn.Module):
    """Shared expert whose output is multiplied by the sigmoid of one number, computed from the token
    (Qwen2-MoE, 2024)."""

    def __init__(self, dim: int, network: Any):
        super().__init__()
        self.gate, self.network = Linear(dim, 1, bias=False), network

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        y = self.network(x)
        # expanded first: the bits of a sigmoid depend on the number's index in a tensor
        return self.gate(x).expand_as(y).sigmoid() * y

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return self.network.residual_weights


class MixtureOfExperts(nn.Module):
    """Feed-forward network: a router, its experts, and a network that every token uses (`shared`)."""

    def __init__(self, router: Router, experts: Sequence[nn.Module], shared: nn.Module | None = None):
        super().__init__()
        self.router, self.experts, self.shared = router, nn.ModuleList(experts), shared
        self.counted: Tensor | None = None  # tokens of each expert in the current training step
        self.load: Tensor | None = None  # tokens of each expert in the last training step, of all ranks

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        tokens = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(tokens)
        load = routing.load
        if self.training:
            self.counted = load if self.counted is None else self.counted + load
        outputs = self._outputs(tokens, routing.experts, load)
        y = (outputs * routing.weights[..., None].to(x.dtype)).sum(1).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def _outputs(
        self, tokens: Tokens, experts: Int[Tensor, "tokens k"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, "tokens k dim"]:
        """Return the output of each chosen expert. Tokens are sorted by expert, so that each expert runs once.

        In training, experts without tokens run too: sharded training needs a gradient of every weight on every rank.
        """
        order = experts.flatten().argsort(stable=True)
        parts = tokens[order // experts.shape[1]].split(counts.tolist())
        outputs = [
            expert(part)
            for expert, part in zip(self.experts, parts, strict=True)
            if len(part) or torch.is_grad_enabled()
        ]
        joined = torch.cat(outputs) if outputs else tokens[:0]
        return torch.empty_like(joined).index_copy(0, order, joined).unflatten(0, experts.shape)

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        networks: list[Any] = [*self.experts, *([] if self.shared is None else [self.shared])]
        return [weight for network in networks for weight in network.residual_weights]


def mixtures(model: nn.Module) -> dict[str, MixtureOfExperts]:
    """Return the mixtures of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def end_step(model: nn.Module, total: Callable[[Tensor], Tensor]) -> None:
    """End a training step: store the load of each mixture, and balance the routers that have a correction.

    total: sums a tensor over the ranks that share a batch.
    """
    for mixture in mixtures(model).values():
        if mixture.counted is None:
            continue
        mixture.load, mixture.counted = total(mixture.counted), None
        if isinstance(mixture.router, GroupedSigmoidRouter):
            mixture.router.balance_(mixture.load)


COLLAPSED = 0.9  # a router is reported if one expert has a larger share of the tokens


def collapsed_routers(model: nn.Module) -> list[str]:
    """Return a warning for each router that sent almost all tokens of the last step to the same expert.

    Routers that choose more than a third of the experts are not checked.
    """
    warnings = []
    for name, mixture in mixtures(model).items():
        k, n_experts = mixture.router.k, mixture.router.n_experts
        if mixture.load is None or n_experts < 3 * k:
            continue
        share, idle = float(mixture.load.max() * k / mixture.load.sum()), int((mixture.load == 0).sum())
        if share > COLLAPSED:
            warnings.append(
                f"The router of {name} has collapsed: expert {int(mixture.load.argmax())} gets {share:.0%} of the "
                f"tokens, and {idle} of {n_experts} experts get none. Raise the weight of its balancing loss."
            )
    return warnings


def idle_parameters(model: nn.Module) -> int:
    """Return how many parameters of a model one token does not use: those of the experts that are not chosen."""
    idle = 0
    for mixture in mixtures(model).values():
        expert = sum(weight.numel() for weight in mixture.experts[0].parameters())
        idle += (mixture.router.n_experts - mixture.router.k) * expert
    return idle


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the routing of every mixture in the forward passes inside the block, in the order of the layers."""
    routings: list[Routing] = []
    routers = [mixture.router for mixture in mixtures(model).values()]
    handles = [router.register_forward_hook(lambda *call: routings.append(call[-1])) for router in routers]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()
