"""A loss from inside layers: its weight, its line of metrics, its gradient, also with checkpointed blocks."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keifu.errors import UserError
from keifu.layers.mixture import collapsed_routers, mixtures, recorded_routing
from keifu.models import gpt2
from keifu.models.mixture import deepseek_v3, mixtral
from keifu.training.loop import train
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.objectives.layer_losses import with_balancing
from keifu.training.protocols import Run
from keifu.training.run import metrics
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

SMALL: dict[str, Any] = {"vocab_size": 31, "context_length": 16, "dim": 32, "hidden_dim": 24, "n_layers": 2}
SMALL["n_heads"] = 4
TOKENS = torch.randint(31, (8, 13), generator=torch.Generator().manual_seed(3))


def mixture() -> nn.Module:
    torch.manual_seed(0)
    return mixtral.build(mixtral.Config(**SMALL, n_kv_heads=2, n_experts=4)).train()


def gate_gradients(model: nn.Module, **changed: Any) -> list[torch.Tensor]:
    """Return the gradients of the routers, of the mean loss."""
    settings = Settings(**{"batch_size": 8, "micro_batch": 8, "clip": 0.0, "precision": "float32", **changed})
    trainer = Trainer(model, with_balancing(causal_language_modeling, 0.5), settings)
    assert trainer.gradient(0, {"tokens": TOKENS})
    return [p.grad.clone() for name, p in model.named_parameters() if "gate.weight" in name and p.grad is not None]


def test_the_loss_is_the_objectives_and_the_weighted_mean_of_the_layers() -> None:
    model, batch = mixture(), {"tokens": TOKENS}
    plain = causal_language_modeling(model, batch)
    with recorded_routing(model) as routings:
        model(TOKENS[:, :-1])
    balance = torch.stack([routing.balancing_loss for routing in routings]).mean()
    found = with_balancing(causal_language_modeling, 0.5)(model, batch)
    assert len(routings) == 2 and float(balance.detach()) > 2  # two experts of a token: 2 when the load is even
    torch.testing.assert_close(found.total, plain.total + 0.5 * balance * plain.weight)
    torch.testing.assert_close(found.figures["balancing"], balance.detach() * plain.weight)


def test_routers_learn_from_it_also_when_blocks_are_computed_again() -> None:
    model, again = mixture(), mixture()
    expected = gate_gradients(model)
    for block in again.get_submodule("blocks").children():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # pyright: ignore
    torch.testing.assert_close(gate_gradients(again), expected)
    total = with_balancing(causal_language_modeling, 0.5)(model, {"tokens": TOKENS}).total
    total = total - causal_language_modeling(model, {"tokens": TOKENS}).total
    gates = [p for name, p in model.named_parameters() if "gate.weight" in name]
    assert all(float(part.abs().max()) > 1e-3 for part in torch.autograd.grad(total, gates))


def test_it_has_a_line_of_metrics_and_balances_the_load(tmp_path: Path) -> None:
    class Data:
        fingerprint = "tokens"

        def batch(self, step: int) -> dict[str, torch.Tensor]:
            return {"tokens": TOKENS}

        def validation(self) -> list[dict[str, torch.Tensor]]:
            return [{"tokens": TOKENS}]

    settings = Settings(steps=30, batch_size=8, warmup=1, learning_rate=1e-2, precision="float32", log_every=5)
    train(mixture(), with_balancing(causal_language_modeling, 1.0), Data(), settings, Run(tmp_path))
    lines = metrics.read(tmp_path)
    values = [line["balancing"] for line in lines if "balancing" in line]
    assert 2 <= values[-1] < values[0] and any("validation_balancing" in line for line in lines)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="No layer of this model has a loss balancing"):
        with_balancing(causal_language_modeling, 1.0)(gpt2.build(gpt2.Config(**SMALL)), {"tokens": TOKENS})


def grouped() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"expert_dim": 12, "n_dense_layers": 1, "head_dim": 6, "rope_dim": 4, "value_dim": 5, "q_rank": 8}
    experts = {"n_experts": 6, "n_experts_per_token": 2, "n_groups": 2, "n_groups_per_token": 2}
    config = deepseek_v3.Config(**SMALL | sizes | experts, kv_rank=7, rope_scaling=None)
    return deepseek_v3.build(config).train()


def test_each_update_moves_the_corrections_towards_an_even_load() -> None:
    """Whatever the micro-batches are; and a validation between does not count."""
    corrections = []
    for rows in (8, 3):
        model = grouped()
        settings = Settings(batch_size=8, micro_batch=rows, precision="float32")
        trainer = Trainer(model, causal_language_modeling, settings)
        for step in range(3):
            before = model.get_buffer("blocks.1.feedforward.router.correction").clone()
            gradient = trainer.gradient(step, {"tokens": TOKENS})
            assert gradient
            trainer.validation([{"tokens": TOKENS[:5]}])
            trainer.update(gradient)
            [mixture] = mixtures(model).values()
            assert mixture.load is not None and mixture.load.sum() == 8 * 12 * 2
            moved = mixture.router.get_buffer("correction") - before
            torch.testing.assert_close(moved, 1e-3 * (mixture.load.float().mean() - mixture.load).sign())
        corrections.append(model.get_buffer("blocks.1.feedforward.router.correction"))
    assert torch.equal(*corrections) and corrections[0].any()


def test_a_collapsed_router_is_named() -> None:
    torch.manual_seed(0)
    model = mixtral.build(mixtral.Config(**SMALL, n_kv_heads=2, n_experts=6, n_experts_per_token=1)).train()
    trainer = Trainer(model, with_balancing(causal_language_modeling, 0.01), Settings(batch_size=8))
    for step, names in enumerate([[], ["blocks.1.feedforward"]]):
        gradient = trainer.gradient(step, {"tokens": TOKENS})
        assert gradient
        trainer.update(gradient)
        warnings = collapsed_routers(model)
        assert len(warnings) == len(names)
        for name, warning in zip(names, warnings, strict=True):
            assert re.search(rf"{name} has collapsed: expert \d gets 100% of the tokens, and 5 of 6 experts", warning)
        nn.init.zeros_(model.get_parameter("blocks.1.feedforward.router.gate.weight"))  # all scores are equal
