"""Launches and waits of training on a GPU, counted on the simulated device: a table of budgets.

A change that is fast in a CPU's cache is often slow on a GPU: smaller and more operations, or a number that the host
reads. Each row has the kernels of a layer and of all else in a micro-batch, and the waits. The simulated device has a
formula of several kernels for attention, so that a GPU launches fewer.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulated_device import LAUNCHED, READ, SENT, device, simulated  # noqa: E402

from keifu.layers.losses import token_log_probabilities  # noqa: E402
from keifu.models import gpt2, llama  # noqa: E402
from keifu.training.objectives.language_modeling import causal_language_modeling  # noqa: E402
from keifu.training.protocols import LossOutput  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402

SIZE: dict[str, Any] = {"vocab_size": 50_257, "context_length": 64, "dim": 8, "hidden_dim": 16, "n_heads": 2}


class Row(NamedTuple):
    """Budget of a micro-batch: kernels of a layer, kernels of all else, waits."""

    build: Callable[[int], nn.Module]
    objective: Any
    layer: int
    rest: int
    waits: int = 0


def gpt(layers: int, **more: Any) -> nn.Module:
    return gpt2.build(gpt2.Config(**SIZE, n_layers=layers, **more))


def scores(model: Any, batch: dict) -> LossOutput:
    """The log-probabilities that PPO, GRPO and DPO learn by."""
    hidden, targets = model.hidden(batch["tokens"][:, :-1]), batch["tokens"][:, 1:].flatten()
    found, _ = token_log_probabilities(hidden.flatten(0, 1), model.head_weight, targets)
    return LossOutput(-found.sum(), len(targets), {})


TABLE = {
    "gpt2": Row(gpt, causal_language_modeling, 66, 56),
    "llama": Row(lambda n: llama.build(llama.Config(**SIZE, n_layers=n)), causal_language_modeling, 116, 77),
    "z-loss": Row(gpt, partial(causal_language_modeling, z_loss=1e-4), 66, 62),
    "log-probabilities": Row(gpt, scores, 66, 46),
}


def micro_batch(row: Row, layers: int, rows: int) -> tuple[int, int]:
    """Return the kernels and the waits of a forward and a backward pass."""
    torch.manual_seed(0)
    with simulated():
        model = row.build(layers).train().to(device())
        settings = Settings(batch_size=rows, micro_batch=rows, precision="float32")
        trainer = Trainer(model, row.objective, settings)
        tokens = torch.randint(50_257, (rows, 65)).to(device())
        trainer.gradient(0, {"tokens": tokens})  # allocates what later steps reuse
        for counter in (LAUNCHED, READ, SENT):
            counter.clear()
        outcome = trainer.forward({"tokens": tokens})
        outcome.total.backward()
        return sum(LAUNCHED.values()), sum(READ.values()) + sum(SENT.values())


@pytest.mark.parametrize("name", TABLE)
def test_a_micro_batch_keeps_its_budget_of_launches_and_waits(name: str) -> None:
    row = TABLE[name]
    two, three = micro_batch(row, 2, 2), micro_batch(row, 3, 2)
    layer = three[0] - two[0]
    found = {"kernels of a layer": layer, "other kernels": two[0] - 2 * layer, "waits": two[1]}
    budget = {"kernels of a layer": row.layer, "other kernels": row.rest, "waits": row.waits}
    assert all(found[key] <= budget[key] for key in budget), f"{name}: {found}, and the budget is {budget}"
    assert 12 * layer + found["other kernels"] <= 1_100 or name == "llama"
    assert micro_batch(row, 2, 5)[0] == two[0], "the number of kernels depends on the rows"
