"""Adadelta is PyTorch's, follows the schedule and resumes with the same bits; Adam's epsilon is a setting."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu.errors import UserError
from keifu.training.loop import train
from keifu.training.optim.optimizers import Optimizers


def test_adadelta_is_torchs_and_its_rate_follows_the_schedule(tmp_path: Path) -> None:
    ours, theirs = toy(dropout=0.0), toy(dropout=0.0)
    changed = settings(optimizer="adadelta", learning_rate=1.0, schedule="constant", warmup=0, weight_decay=0.0)
    optimisers = Optimizers(ours, changed)
    reference = torch.optim.Adadelta(theirs.parameters(), lr=1.0, rho=0.95, eps=1e-6)
    for step in range(3):
        for model in (ours, theirs):
            objective(model, Sequences().batch(step)).total.backward()
        optimisers.step(step)
        reference.step()
        reference.zero_grad()
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name).detach(), rtol=0, atol=1e-7)
    assert optimisers.rates(0) == {"learning_rate": 1.0}


def test_adadelta_resumes_bitwise(tmp_path: Path) -> None:
    changed = settings(optimizer="adadelta", learning_rate=1.0, schedule="constant")
    train(toy(), objective, Sequences(), changed, run(tmp_path / "whole"))
    train(toy(), objective, Sequences(), replace(changed, steps=7), run(tmp_path / "parts"))
    train(toy(1), objective, Sequences(), changed, run(tmp_path / "parts", resume=True))
    files = [load_file(tmp_path / name / "state/step-00000012.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_epsilon_is_adams() -> None:
    assert Optimizers(toy(), settings(epsilon=1e-3)).all["adamw"].defaults["eps"] == 1e-3
    with pytest.raises(UserError, match="epsilon must be a number from 0 .*, not -1.0"):
        settings(epsilon=-1.0)
