"""The objective of denoisers: the loss of what was hidden alone, figures beside it; both kinds of model learn it."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keifu.data.text.span_corruption import MODES, Markers, SpanCorruptionBatches, ul2
from keifu.models import palm
from keifu.training.objectives.language_modeling import (
    causal_language_modeling,
    masked_share_loss,
    span_corruption,
)
from keifu.training.settings import Settings
from keifu.training.state import Sums
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")
MARKERS = Markers(dict(zip(MODES, (1, 2, 3), strict=True)), np.arange(4, 14), 0, 14)
SIZES = {"vocab_size": 40, "context_length": 24, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}


def batch(rows: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    task = SpanCorruptionBatches(ul2(), MARKERS, 24)
    windows = np.random.default_rng(seed).integers(15, 40, (rows, task.width))
    made = task.rows(windows, np.arange(rows), np.random.default_rng(seed))
    return {name: torch.from_numpy(array) for name, array in made.items()}


def learner(model, objective, steps: int, micro: int = 8) -> Trainer:
    settings = Settings(
        steps=steps, batch_size=8, micro_batch=micro, learning_rate=1e-2, weight_decay=0.0, precision="float32"
    )
    return Trainer(model, objective, settings)


def test_the_loss_is_that_of_the_targets_alone() -> None:
    model, given = palm.build(palm.Config(**SIZES, head_dim=8)), batch()
    logits, targets, mask = model(given["tokens"][:, :-1]), given["tokens"][:, 1:], given["mask"][:, 1:]
    expected = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
    found = span_corruption(model, given)
    assert torch.allclose(found.total, expected, rtol=1e-5) and int(found.weight) == int(mask.sum())
    assert torch.allclose(causal_language_modeling(model, given).total, expected, rtol=1e-5)
    plain = {"tokens": given["tokens"]}
    assert torch.allclose(span_corruption(model, plain).total, causal_language_modeling(model, plain).total)


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_a_split_changes_neither_loss_nor_gradient(micro: int) -> None:
    found = []
    for rows in (8, micro):
        torch.manual_seed(1)
        model = palm.build(palm.Config(**SIZES, head_dim=8)).train()
        gradient = learner(model, span_corruption, 1, rows).gradient(0, batch())
        found.append((gradient.sums.means()["loss"], [p.grad for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_figures_stand_beside_the_loss_in_evaluation_alone() -> None:
    model = palm.build(palm.Config(**SIZES, head_dim=8)).eval()
    objective = partial(masked_share_loss, objective=span_corruption, names=["a/loss", "b/loss"])
    parts = [batch(seed=seed) for seed in range(3)]
    own = span_corruption(model, parts[0])
    counts = [int(part["mask"][:, 1:].sum()) for part in parts]
    marked = [
        part | {"figure": torch.full((8,), n), "factor": torch.full((8,), counts[0] / counts[n])}
        for n, part in enumerate(parts)
    ]
    with torch.no_grad():
        sums = [Sums.of(objective(model, part)) for part in marked]
    means = (sums[0] + sums[1] + sums[2]).means()
    assert means["loss"] == pytest.approx(float(own.total.detach()) / counts[0], rel=1e-5)
    for n, name in ((1, "a/loss"), (2, "b/loss")):
        expected = float(span_corruption(model, parts[n]).total.detach()) / counts[n]
        assert means[name] == pytest.approx(expected, rel=1e-5)
    assert objective(model.train(), parts[0]).figures == {}


def test_a_model_learns_a_mixture_of_denoisers_by_heart() -> None:
    torch.manual_seed(0)
    model = palm.build(palm.Config(**SIZES, head_dim=8)).train()
    trainer, given, losses = learner(model, span_corruption, 150), batch(), []
    for step in range(150):
        gradient = trainer.gradient(step, given)
        losses.append(gradient.sums.means()["loss"])
        trainer.update(gradient)
    assert losses[0] > 3.3  # nothing was known: log 40 is 3.69
    assert losses[-1] < 0.3
