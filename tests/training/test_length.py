"""Runs that are made longer or shorter while they are resumed: their rates, their bits, and what is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_toys import Sequences, objective, run, settings, toy

from keifu.errors import UserError
from keifu.training.length import Change, Length
from keifu.training.loop import Summary, train
from keifu.training.run import checkpoint, metrics, run_directory
from keifu.training.settings import Settings

COSINE = Settings(steps=100, warmup=10, final_ratio=0.1)


def rates(length: Length, s: Settings, first: int, last: int) -> list[float]:
    return [length.rate_share(s, step) for step in range(first, last)]


def test_without_a_change_the_rate_is_the_schedules() -> None:
    assert Length(100).rate_share(COSINE, 4) == 0.5 and Length(100).rate_share(COSINE, 99) == 0.1


def test_a_run_made_longer_begins_at_its_rate_and_ends_on_the_longer_curve() -> None:
    longer = Length(100).changed(60, 200, COSINE.warmup)
    whole = Length(200)
    assert longer.changes == (Change(60, 200, 10),)
    assert longer.rate_share(COSINE, 60) == pytest.approx(Length(100).rate_share(COSINE, 60), abs=1e-15)
    assert rates(longer, COSINE, 70, 200) == rates(whole, COSINE, 70, 200)
    gaps = [a - b for a, b in zip(rates(longer, COSINE, 60, 71), rates(whole, COSINE, 60, 71), strict=True)]
    assert gaps[:11] == pytest.approx([gaps[0] * (1 - n / 10) for n in range(11)], abs=1e-12) and gaps[0] < -0.1


def test_a_finished_run_rises_from_its_last_rate_and_the_warm_up_is_kept() -> None:
    s = replace(COSINE, final_ratio=0.0)
    longer = Length(100).changed(100, 200, s.warmup)
    found = rates(longer, s, 100, 200)
    assert found[0] == 0 and found[10] == Length(200).rate_share(s, 110) > 0.4 and found[-1] == 0
    assert all(share >= 0 for share in found)
    assert rates(longer, s, 0, 100) == rates(Length(100), s, 0, 100)  # also after a rewind


def test_a_run_made_shorter_falls_to_the_end_within_what_is_left() -> None:
    shorter = Length(100).changed(60, 66, COSINE.warmup)
    assert shorter.changes[0].over == 3 and shorter.rate_share(COSINE, 65) == pytest.approx(0.1)
    assert shorter.rate_share(COSINE, 60) == pytest.approx(Length(100).rate_share(COSINE, 60))
    with pytest.raises(UserError, match="60 steps are done, so the run cannot end at step 59"):
        Length(100).changed(60, 59, 10)


def test_an_end_of_the_decay_moves_in_proportion_and_curves_without_an_end_stay() -> None:
    early = replace(COSINE, decay_steps=80)
    assert Length(100).changed(50, 200, 10).rate_share(early, 159) == pytest.approx(0.1)
    for schedule in ("constant", "inverse_sqrt"):
        s = replace(COSINE, schedule=schedule)
        assert rates(Length(100).changed(50, 200, 10), s, 50, 99) == rates(Length(100), s, 50, 99)


def go(directory: Path, steps: int, resume: bool = True, seed: int = 0) -> Summary:
    chosen = settings(steps=steps, schedule="linear", final_ratio=0.0)
    return train(toy(seed), objective, Sequences(), chosen, run(directory, resume=resume))


def test_extended_then_stopped_and_resumed_is_bitwise_extended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("once", "twice"):
        go(tmp_path / name, 12, resume=False)
    go(tmp_path / "once", 20)
    said = capsys.readouterr().err
    assert "The run is made longer, from 12 to 20 steps. Its warm-up of 3 stays" in said and "over 3 updates" in said
    go(tmp_path / "twice", 20)
    checkpoint.remove(tmp_path / "twice", 20)  # as if it had been killed behind step 18
    assert go(tmp_path / "twice", 12, seed=4).steps == 20  # the settings that it was begun with keep its length
    once, twice = (checkpoint.latest(tmp_path / name)[0] for name in ("once", "twice"))
    assert once.facts["length"] == twice.facts["length"] == [{"at": 12, "steps": 20, "over": 3}]
    assert once.tensors.keys() == twice.tensors.keys()
    assert all(torch.equal(once.tensors[name], twice.tensors[name]) for name in once.tensors)
    rates = [line["learning_rate"] for line in metrics.read(tmp_path / "once") if "learning_rate" in line]
    assert rates[5] == 0 < rates[6] and rates[-1] == 0
    assert run_directory.read_recipe(tmp_path / "once")["settings"]["steps"] == 12


def test_what_recipe_json_asks_for_is_the_length(tmp_path: Path) -> None:
    go(tmp_path, 12, resume=False)
    run_directory.record(tmp_path, "toy", {}, steps=15)
    assert go(tmp_path, 12).steps == 15
    assert go(tmp_path, 18).steps == 18 and run_directory.recorded(tmp_path)["steps"] == 18
    run_directory.record(tmp_path, "toy", {}, steps=17)
    with pytest.raises(UserError, match="18 steps are done"):
        go(tmp_path, 12)
