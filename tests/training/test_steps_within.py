"""The number of steps that fit a limit of time, measured before the run."""

import pytest
import torch
from training_toys import Sequences, objective, settings, toy

from keifu.processes import Processes, use
from keifu.training import setup


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adadelta"])
def test_trying_the_pace_changes_nothing(optimizer: str) -> None:
    model = toy()
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    changed = settings(optimizer=optimizer, micro_batch=None)
    steps = setup.steps_within(0.02, model, objective, Sequences(), changed, Sequences().batch(0))
    assert steps > 5 and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_steps_are_those_that_fit(monkeypatch) -> None:
    monkeypatch.setattr(setup.cost.peak, "time_call", lambda work, device: (work(), 0.5)[1])
    steps = setup.steps_within(50.0, toy(), objective, Sequences(), settings(), Sequences().batch(0))
    assert steps == 3000  # both passes take half a second on this clock, and the update the other half


def test_all_processes_make_the_steps_that_fit_on_the_first_one() -> None:
    class Second(Processes):
        rank, world_size = 1, 2

        def broadcast(self, value):
            return 77

    with use(Second()):
        assert setup.steps_within(0.001, toy(), objective, Sequences(), settings(), Sequences().batch(0)) == 77
