"""Mixtures of experts: routing, dispatch and balancing, compared with plain loops and with transformers."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from keifu.errors import UserError
from keifu.layers.feedforward import SwiGLU
from keifu.layers.mixture import (
    GroupedSigmoidRouter,
    MixtureOfExperts,
    Routing,
    SoftmaxRouter,
    collapsed_routers,
    end_step,
    idle_parameters,
    recorded_routing,
)


def mixture(router: SoftmaxRouter | GroupedSigmoidRouter, n_experts: int, shared: bool = False) -> MixtureOfExperts:
    return MixtureOfExperts(router, [SwiGLU(6, 10) for _ in range(n_experts)], SwiGLU(6, 8) if shared else None)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_the_output_is_the_weighted_sum_of_the_chosen_experts(k: int, shared: bool) -> None:
    torch.manual_seed(0)
    model, x = mixture(SoftmaxRouter(6, 5, k), 5, shared), torch.randn(2, 7, 6)
    routing = model.router(x.flatten(0, 1))
    expected = torch.zeros(14, 6)
    for token, (weights, experts) in enumerate(zip(routing.weights, routing.experts, strict=True)):
        for weight, expert in zip(weights, experts, strict=True):
            expected[token] += weight * model.experts[expert](x.flatten(0, 1)[token])
    expected = expected.view(2, 7, 6) + (model.shared(x) if model.shared is not None else 0)
    torch.testing.assert_close(model(x), expected)


def test_a_collapsed_router_sends_every_token_to_one_expert_and_all_weights_get_a_gradient() -> None:
    """The worst case of sharded training: experts without a token still take part in the backward pass."""
    model = mixture(SoftmaxRouter(6, 4, 1), 4).train()
    nn.init.zeros_(model.router.gate.weight)
    model.router.gate.weight.data[2] = 1.0
    x = torch.rand(3, 5, 6) + 0.1
    with recorded_routing(model) as routings:
        model(x).sum().backward()
    assert [routing.load.tolist() for routing in routings] == [[0, 0, 15, 0]]
    assert all(parameter.grad is not None for parameter in model.experts.parameters())
    assert not any(parameter.grad.any() for parameter in model.experts[0].parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.experts[2](x))
        assert model(x[:, :0]).shape == (3, 0, 6)


@pytest.mark.parametrize(("groups", "chosen"), [(1, 1), (4, 2), (4, 1)])
def test_the_grouped_router_is_deepseek_v3s(groups: int, chosen: int) -> None:
    torch.manual_seed(3)
    theirs = DeepseekV3TopkRouter(
        transformers.DeepseekV3Config(
            hidden_size=6, n_routed_experts=12, num_local_experts=12, num_experts_per_tok=3, n_group=groups,
            topk_group=chosen, routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_()
    ours = GroupedSigmoidRouter(6, 12, 3, groups, chosen, scale=2.5)
    ours.load_state_dict({"gate.weight": theirs.weight, "correction": theirs.e_score_correction_bias})
    x = torch.randn(50, 6)
    _, weights, experts = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.experts.sort(-1).values, experts.sort(-1).values)
    order, other = routing.experts.argsort(-1), experts.argsort(-1)
    torch.testing.assert_close(routing.weights.gather(-1, order), weights.gather(-1, other))
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(50))


def test_the_balancing_loss_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    router, x = SoftmaxRouter(6, 5, 2), torch.randn(30, 6)
    routing = router(x)
    theirs = load_balancing_loss_func((router.gate(x),), 5, 2)
    torch.testing.assert_close(routing.balancing_loss, theirs)
    even = Routing(torch.ones(10, 2), torch.arange(20).view(10, 2) % 5, torch.full((10, 5), 0.2))
    torch.testing.assert_close(even.balancing_loss, torch.tensor(2.0))


def test_corrections_even_out_a_skewed_load() -> None:
    """DeepSeek-V3's balancing without a loss: the busiest expert's share falls from all tokens to about its share."""
    torch.manual_seed(2)
    model = mixture(GroupedSigmoidRouter(6, 4, 1), 4).train()
    model.router.gate.weight.data[0] += 0.5
    x = torch.rand(1, 400, 6)
    before = loads(model, x)
    for _ in range(400):
        model.router.balance_(loads(model, x), 3e-3)
    assert before.max() > 300 and loads(model, x).max() < 150


def loads(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with recorded_routing(model) as routings:
        model(x)
    [routing] = routings
    return routing.load


@pytest.mark.parametrize(("n_experts", "k"), [(4, 5), (4, 0)])
def test_an_impossible_choice_is_refused(n_experts: int, k: int) -> None:
    with pytest.raises(UserError, match=f"{k} experts of a token cannot be chosen from {n_experts}"):
        SoftmaxRouter(6, n_experts, k)
    with pytest.raises(UserError, match="groups"):
        GroupedSigmoidRouter(6, 4, 1, 3)


@pytest.mark.parametrize(("share", "warns"), [(0.8, False), (1.0, True)])
def test_a_router_with_two_experts_per_token_is_reported_by_its_share_of_tokens(share: float, warns: bool) -> None:
    """The largest expert has at most half of the choices, and still all of the tokens."""
    model = nn.Sequential(mixture(SoftmaxRouter(6, 8, 2), 8))
    model[0].load = torch.tensor([0.0, 100 * share, 0, 40, 60, 100 * (1 - share), 0, 0])
    assert model[0].load.sum() == 200 and model[0].load.max() <= 100
    found = collapsed_routers(model)
    assert len(found) == warns
    if warns:
        assert (
            "The router of 0 has collapsed: expert 1 gets 100% of the tokens, and 5 of 8 experts get none" in found[0]
        )


def test_routers_are_balanced_by_the_loads_of_all_ranks() -> None:
    """Here the first expert has most tokens, over all ranks it has the fewest: the two corrections have other signs."""
    router = GroupedSigmoidRouter(6, 3, 1)
    model = nn.Sequential(mixture(router, 3))
    model[0].counted = torch.tensor([4, 1, 1])
    before = router.correction.clone()
    end_step(model, lambda counts: counts + torch.tensor([0, 9, 9]))
    assert model[0].load.tolist() == [4, 10, 10]
    assert (router.correction - before).sign().tolist() == [1, -1, -1]


def test_a_token_leaves_the_experts_idle_that_it_does_not_choose() -> None:
    """Of five experts of 3 · 6 · 10 weights, a token uses two."""
    assert idle_parameters(nn.Sequential(mixture(SoftmaxRouter(6, 5, 2), 5))) == 3 * 180
