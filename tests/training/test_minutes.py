"""A budget in minutes is kept while the pace changes, on a clock that tests move; resumed, the bits are the same."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu.processes import rows_of
from keifu.training import pace
from keifu.training.hardware import cost
from keifu.training.length import Length, with_plan
from keifu.training.loop import Summary, train
from keifu.training.optim.optimizers import Optimizers
from keifu.training.protocols import Batch
from keifu.training.run import checkpoint, metrics
from keifu.training.trainer import Trainer


class Clock:
    """Stands still but where a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made, timed = Clock(), cost._timed

    def second(trainer: Trainer, batch: Batch, rows: int) -> tuple[float, float, float]:
        return rows / rows_of(batch), *timed(trainer, batch, rows)[1:]

    monkeypatch.setattr(pace, "time", made)
    monkeypatch.setattr(cost, "_timed", second)
    return made


class Slowing(Sequences):
    """A batch takes a second, from step `slow` on `later` seconds, and a validation `validating`."""

    def __init__(self, clock: Clock, slow: int = 10**9, later: float = 1.0, validating: float = 0.0):
        super().__init__()
        self.clock, self.slow, self.later, self.validating = clock, slow, later, validating

    def batch(self, step: int) -> Batch:
        self.clock.now += self.later if step >= self.slow else 1.0
        return super().batch(step)

    def validation(self) -> Iterable[Batch]:
        self.clock.now += self.validating
        return [super().batch(10**6)]


CHOSEN: dict[str, Any] = dict(steps=100, minutes=100 / 60, log_every=5, evaluate_every=20, save_every=25, keep=9)


def go(directory: Path, data: Sequences, resume: bool = False, **changed: Any) -> tuple[Summary, nn.Module]:
    model = toy()
    return train(model, objective, data, settings(**CHOSEN | changed), run(directory, resume=resume)), model


@pytest.mark.parametrize(
    ("slow", "later", "validating", "steps"),
    [(40, 3.0, 0.0, 60), (40, 0.5, 0.0, 160), (1000, 1.0, 10.0, 80), (0, 7.0, 0.0, 15)],
)
def test_the_minutes_are_kept_where_the_pace_changes_or_validations_take_long(
    clock: Clock, tmp_path: Path, slow: int, later: float, validating: float, steps: int
) -> None:
    start = clock.now
    summary, _ = go(tmp_path, Slowing(clock, slow, later, validating))
    assert summary.steps == pytest.approx(steps, abs=7)
    counting = validating  # the batches of a validation are counted before the run, which takes no time but here
    assert clock.now - start - counting == pytest.approx(100, abs=2 * later + validating / 2)
    lines = metrics.read(tmp_path)
    assert [line["planned_steps"] for line in lines if "planned_steps" in line][-1] == summary.steps
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[-1] < 1.2e-3, "the rate falls to a tenth of 1e-2 over the steps that there are"


def test_stopped_and_resumed_with_the_plan_of_its_state_it_has_the_same_bits(clock: Clock, tmp_path: Path) -> None:
    _, whole = go(tmp_path / "whole", Slowing(clock, 30, 2.0))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in checkpoint.steps(tmp_path / "again")[2:]:
        checkpoint.remove(tmp_path / "again", step)
    facts = json.loads((tmp_path / "again/state/step-00000050.json").read_text())
    assert facts["plan"]["steps"] < 100 and facts["passed"] == pytest.approx(70, abs=3)
    _, again = go(tmp_path / "again", Slowing(clock, 0, 1e-3), resume=True)  # nearly no time passes: the plan stays
    assert checkpoint.steps(tmp_path / "whole") == checkpoint.steps(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))


class Learning(Slowing):
    """Has more steps in its recipe than fit, and samples that take as long as `sampling` steps."""

    def __init__(self, clock: Clock, sampling: float):
        super().__init__(clock)
        self.sampling, self.samples = sampling, list[int]()

    def sample(self, step: int) -> str:
        self.samples.append(step)
        self.clock.now += self.sampling
        return "a sample"


@pytest.mark.parametrize(
    ("minutes", "sampling", "steps", "samples"),
    [
        (1.0, 0.0, 59, [*range(0, 55, 6), 59]),
        (1.0, 1.0, 53, [0, 12, 24, 36, 48, 53]),
        pytest.param(1.0, 4.0, 47, [0, 35, 47], marks=pytest.mark.slow),
        (1.0, 20.0, 39, [0]),
        pytest.param(5.0, 0.0, 299, [*range(0, 271, 30), 299], marks=pytest.mark.slow),
    ],
)
def test_a_run_of_another_length_has_as_many_validations_and_samples_and_these_take_a_tenth_of_the_time(
    clock: Clock, tmp_path: Path, minutes: float, sampling: float, steps: int, samples: list[int], capsys
) -> None:
    data, start = Learning(clock, sampling), clock.now
    chosen = settings(**CHOSEN | dict(steps=100, minutes=minutes, evaluate_every=10, sample_every=10, save_every=0))
    summary = train(toy(), objective, data, chosen, run(tmp_path), data.sample)
    assert summary.steps == steps
    assert data.samples == samples
    assert clock.now - start <= 60 * minutes + 3
    shown = capsys.readouterr().err
    assert ("No last sample is made" in shown) == (sampling > 6)
    assert ("of 100 steps fit into 60 s" in shown) == (sampling > 1)


@pytest.mark.parametrize(("minutes", "words"), [(0.1, "Out of time: "), (0.4, "Done: 24 steps")])
def test_a_run_that_ends_after_some_steps_is_not_called_done(
    clock: Clock, tmp_path: Path, minutes: float, words: str, capsys: pytest.CaptureFixture
) -> None:
    go(tmp_path, Slowing(clock), minutes=minutes)
    assert words in capsys.readouterr().err


def test_a_changed_plan_goes_on_evenly_to_the_end_of_the_schedule() -> None:
    optimisers = Optimizers(toy(), settings(steps=100, schedule="linear", warmup=0, final_ratio=0.0))
    before = [optimisers.rates(step)["learning_rate"] for step in range(100)]
    same = Length(100).fitted(3, 100)
    assert [optimisers.rates(step, same)["learning_rate"] for step in range(100)] == before, "the same number of steps"
    changed = Length(100).fitted(40, 60)
    rates = [optimisers.rates(step, changed)["learning_rate"] for step in range(40, 61)]
    assert rates[0] == before[40], "no jump"
    assert rates[-1] == 0.0 and rates == sorted(rates, reverse=True)
    assert rates[10] == pytest.approx(1e-2 * (1 - 70 / 99), rel=1e-3)
    again = changed.fitted(50, 100)
    assert again.position == 70 and again.rate_share(optimisers.settings, 99) == pytest.approx(0, abs=0.05)
    assert with_plan(Length(100), again.facts()) == again and with_plan(Length(90), again.facts()) == Length(90)


def test_what_is_left_counts_what_comes_between_steps_and_after_the_last_one(clock: Clock) -> None:
    watch = pace.Clock()
    watch.start(0, {"validation": 10, "sample": 0})
    clock.now += 20.0
    for name, seconds in (("validation", 5.0), ("sample", 3.0)):
        with watch.paused(name):
            clock.now += seconds
    assert watch.left(10, 30) == pytest.approx(20 * 2.0 + 2 * 5.0 + 3.0), "validations at 20 and 30, a sample at 30"
    assert watch.steps(10, 30) == 30, "without a budget"


class Checked(Slowing):
    """Has a validation as large as so many batches."""

    def __init__(self, clock: Clock, batches: int):
        super().__init__(clock)
        self.batches = batches

    def validation(self) -> Iterable[Batch]:
        return [Sequences.batch(self, 10**6 + number) for number in range(self.batches)]


def validated(directory: Path) -> list[int]:
    return [line["step"] for line in metrics.read(directory) if "validation_loss" in line]


@pytest.mark.parametrize(("share", "expected"), [(0.1, [0, 54, 100]), (0.5, [0, 20, 40, 60, 80, 100]), (1.0, None)])
def test_validations_take_no_more_than_their_share(
    clock: Clock, tmp_path: Path, share: float, expected: list[int] | None, capsys: pytest.CaptureFixture
) -> None:
    every = 20 if expected else 5
    train(
        toy(),
        objective,
        Checked(clock, 18),
        settings(steps=100, evaluate_every=every, evaluate_share=share, save_every=0),
        run(tmp_path),
    )
    assert validated(tmp_path) == (expected or [*range(0, 101, 5)])
    said = "A validation takes about as long as 6.0 steps, so one comes every 54 steps, not 20."
    assert (said in capsys.readouterr().err) == (share == 0.1)


def test_a_resumed_run_validates_at_the_same_steps(clock: Clock, tmp_path: Path) -> None:
    chosen = settings(steps=60, evaluate_every=1, save_every=20, keep=9)
    for directory in (tmp_path / "whole", tmp_path / "again"):
        train(toy(), objective, Checked(clock, 5), chosen, run(directory))
    for step in checkpoint.steps(tmp_path / "again")[1:]:
        checkpoint.remove(tmp_path / "again", step)
    train(toy(), objective, Checked(clock, 5), chosen, run(tmp_path / "again", resume=True))
    assert validated(tmp_path / "again") == validated(tmp_path / "whole") == [0, *range(15, 60, 15), 60]


def test_the_estimate_includes_validations_and_samples(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def sample(step: int) -> str:
        clock.now += 100.0
        return "a sample"

    chosen = settings(steps=20, evaluate_every=10, sample_every=5, save_every=0)
    train(toy(), objective, Slowing(clock, validating=1000.0), chosen, run(tmp_path), sample)
    assert "20 steps of 30 tokens, 600 in all: about 40:20 min" in capsys.readouterr().err  # 2 validations, 4 samples
