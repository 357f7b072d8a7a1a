"""Rewind and skip: a spike is undone, its batches never come again, and resuming anywhere gives the same bits."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from training_toys import Sequences, objective, run, settings, toy

from keifu.errors import UserError
from keifu.processes import Processes, use
from keifu.training.hardware.failures import Running
from keifu.training.loop import train
from keifu.training.optim.loss_spikes import SpikeSettings, SpikeState
from keifu.training.protocols import Batch
from keifu.training.run import checkpoint, metrics
from keifu.training.settings import Settings
from keifu.training.signals import Interrupted

RULES = SpikeSettings(rise=0.3, steps=2, rewind=6, skip=20)
BAD = range(41, 45)
TIMES = ("seconds", "tokens_per_second", "flops_utilisation")


class Spoiled(Sequences):
    """Some batches count down; notes which batches were asked for, and stops the process at some of the calls."""

    def __init__(self, bad: range = BAD, stop_at: tuple[int, ...] = ()):
        super().__init__(rows=16)
        self.bad, self.stop_at, self.asked = bad, stop_at, []

    def batch(self, step: int) -> Batch:
        self.asked.append(step)
        if len(self.asked) in self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        tokens = super().batch(step)["tokens"]
        return {"tokens": (-tokens) % 11 if step in self.bad else tokens}


def changed(**more) -> Settings:
    fast = dict(steps=60, batch_size=16, micro_batch=16, learning_rate=3e-2, log_every=4, save_every=10)
    return settings(**fast | dict(evaluate_every=30, spikes=RULES) | more)


def lines(directory: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(directory)]


def same(a: Path, b: Path) -> bool:
    one, other = (checkpoint.latest(path)[0] for path in (a, b))
    equal = one.tensors.keys() == other.tensors.keys() and one.facts["spikes"] == other.facts["spikes"]
    return equal and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Train a run with a spike, never stopped, and return its folder."""
    torch.set_num_threads(1)  # as each test has it, which this comes before
    directory = tmp_path_factory.mktemp("whole")
    data = Spoiled()
    train(toy(), objective, data, changed(), run(directory))
    (directory / "asked").write_text(json.dumps(data.asked))
    return directory


def test_the_run_goes_back_and_the_batches_of_the_spike_never_come_again(whole: Path) -> None:
    [event] = [line for line in lines(whole) if "rewound_from" in line]
    assert (event["step"], event["rewound_from"], event["skipped"]) == (33, 42, 20)  # a spike of 41 and 42, from 33 on
    assert event["spike_loss"] > 2
    asked = [number for number in json.loads((whole / "asked").read_text()) if number < 10**5]  # no validation
    rewound = asked.index(53)
    assert asked[:rewound] == [0, 0, *range(1, 43)]  # the first also for the cost; on a CPU none is made ready ahead
    assert asked[rewound : rewound + 27] == list(range(53, 80)) and not set(asked[rewound:]) & set(BAD)
    last = checkpoint.latest(whole)[0]
    assert last.step == 60 and last.facts["spikes"]["skipped"] == 20
    standing = metrics.last_metrics(lines(whole))
    losses = {line["step"]: line["loss"] for line in standing if "loss" in line}
    assert sorted(losses) == list(range(4, 61, 4)) and max(v for k, v in losses.items() if k > 32) < 1.2
    assert all(("skipped" in line) == (line["step"] > 33 or "rewound_from" in line) for line in standing)


def test_without_the_rule_the_spike_is_in_the_run(whole: Path, tmp_path: Path) -> None:
    train(toy(), objective, Spoiled(), changed(spikes=SpikeSettings()), run(tmp_path))
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert max(losses[9:12]) > 1.5
    assert checkpoint.latest(tmp_path)[0].facts["spikes"]["readings"] == 0
    assert checkpoint.steps(tmp_path) == [50, 60] and len(checkpoint.steps(whole)) > 2


STOPS = [(45,), (20, 43, 47)]
STOPS += [pytest.param(stop, marks=pytest.mark.slow) for stop in ((12,), (43,), (44,), (46,), (47,), (50,), (45, 52))]


@pytest.mark.parametrize("stop_at", STOPS)
def test_stopped_anywhere_and_resumed_it_is_bitwise_the_same(whole: Path, tmp_path: Path, stop_at: tuple) -> None:
    """Among them: in the spike, between the spike and the rewind, right after it, and far behind it."""
    data, resume = Spoiled(stop_at=stop_at), False
    for _ in stop_at:
        with pytest.raises(Interrupted):
            train(toy(), objective, data, changed(), run(tmp_path, resume=resume))
        resume = True
    train(toy(7), objective, data, changed(), run(tmp_path, resume=True))
    assert same(tmp_path, whole)
    assert lines(tmp_path) == lines(whole)


def test_a_state_that_is_being_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, read = [], checkpoint.read

    class Writing(Processes):
        def flush(self) -> None:
            order.append("written")

    def reading(directory: Path, step: int) -> checkpoint.SavedState:
        order.append("read")
        return read(directory, step)

    monkeypatch.setattr(checkpoint, "read", reading)
    with use(Writing()):
        train(toy(), objective, Spoiled(), changed(steps=46), run(tmp_path))
    assert order[:2] == ["written", "read"]


def test_a_state_that_could_not_be_written_ends_a_rewind_with_how_to_go_on(tmp_path: Path) -> None:
    class Failing(Processes):
        def flush(self) -> None:
            raise UserError("The state could not be written: the disk is full.")

    sentence = r"Stopped after step \d+, whose state is saved. The state could not be written.* To go on: "
    with use(Failing()), pytest.raises(UserError, match=sentence):
        train(toy(), objective, Spoiled(), changed(steps=46), run(tmp_path))


def test_from_a_state_before_the_rewind_the_spike_is_met_and_left_again(whole: Path, tmp_path: Path, capsys) -> None:
    """Killed in the spike: the newest state is from before it."""
    data = Spoiled(stop_at=(42,))
    with pytest.raises(Interrupted):
        train(toy(), objective, data, changed(), run(tmp_path))
    for step in [step for step in checkpoint.steps(tmp_path) if step > 36]:
        checkpoint.remove(tmp_path, step)
    capsys.readouterr()
    train(toy(9), objective, Spoiled(), changed(), run(tmp_path, resume=True))
    said = capsys.readouterr().err
    assert "Step 42: the loss is" in said and "going on from step 33, where it was" in said
    assert "The 20 batches that came next are left out, 20 in all." in said
    assert same(tmp_path, whole) and lines(tmp_path) == lines(whole)


def test_the_report_shows_what_was_undone(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "undone</span>" in page and "spikes.rewind" in page
    recipe = json.loads((whole / "recipe.json").read_text())
    assert recipe["settings"]["spikes.skip"] == 20 and recipe["figures"]["skipped"] == 20


def test_a_run_that_spikes_wherever_it_goes_stops_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="spiked again after 3 rewinds to step 33: a lower learning rate"):
        train(toy(), objective, Spoiled(range(41, 10**6)), changed(), run(tmp_path))
    assert len([line for line in lines(tmp_path) if "rewound_from" in line]) == 3
    assert checkpoint.steps(tmp_path)[-1] == 34


def test_a_spike_is_some_steps_in_a_row_far_above() -> None:
    spikes = SpikeState(RULES)
    assert not any(spikes.complete(3.0 + 0.1 * (i % 3)) for i in range(30))
    assert not spikes.complete(9.0) and not spikes.complete(3.0) and not spikes.complete(9.0)
    mean = spikes.mean
    assert spikes.complete(9.0) and spikes.mean == mean  # what is far is not taken in
    assert spikes.target(33) == 24  # the spike began at 32; 26 is the last that is 6 before, and states come by threes
    assert spikes.target(3) == 0
    after = spikes.after(24, SpikeState(RULES, mean=1.0, readings=24))
    assert (after.skipped, after.back, after.streak, after.mean) == (20, 24, 0, 1.0)
    assert after.target(30) == 24  # never before the last one
    assert SpikeState(RULES, **after.facts()).facts() == after.facts()


def test_without_the_rule_nothing_is_due() -> None:
    assert not any(SpikeState(SpikeSettings()).due(step) for step in range(200))
    assert [step for step in range(120) if SpikeState(SpikeSettings(rise=0.5)).due(step)] == [0, 50, 100]


def test_the_deviation_counts_too() -> None:
    def left_out(loss: float, rise: float) -> bool:
        return not Running(mean=1.0, variance=0.25, readings=50).take(loss, rise)

    assert not left_out(3.9, 0.1) and left_out(4.1, 0.1) and not left_out(4.1, 3.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(rise=-0.1), "spikes.rise must be a number from 0 .*, not -0.1"),
        (dict(rise=float("nan")), "spikes.rise must be a number from 0"),
        (dict(steps=0), "spikes.steps must be a whole number from 1"),
        (dict(rewind=0), "spikes.rewind must be a whole number from 1"),
        (dict(rise=0.5, skip=100), "spikes.skip must be at least 153 with a rewind of 100 steps"),
    ],
)
def test_rules_that_cannot_be_are_named(given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        SpikeSettings(**given)


def test_a_resumed_run_keeps_its_rules_and_an_older_run_had_none(tmp_path: Path) -> None:
    train(toy(), objective, Sequences(), settings(), run(tmp_path))
    file = tmp_path / "state/step-00000012.json"
    facts = json.loads(file.read_text())
    del facts["spikes"]
    old = {name: value for name, value in facts["described"]["settings"].items() if not name.startswith("spikes.")}
    facts["described"]["settings"] = old
    file.write_text(json.dumps(facts))
    assert train(toy(), objective, Sequences(), settings(steps=14), run(tmp_path, resume=True)).steps == 14
    with pytest.raises(UserError, match=r"spikes.rise 0.0 → 0.3"):
        train(toy(), objective, Sequences(), settings(steps=14, spikes=RULES), run(tmp_path, resume=True))


def test_a_state_keeps_those_within_reach(tmp_path: Path) -> None:
    prune = partial(checkpoint.remove_old, tmp_path, keep=2, reach=6, due=lambda step: True)
    for step in (0, 3, 6, 9, 12, 15, 18):
        checkpoint.save(tmp_path, step, checkpoint.model_tensors(toy()), {}, prune)
    assert checkpoint.steps(tmp_path) == [9, 12, 15, 18]
    checkpoint.save(tmp_path, 12, checkpoint.model_tensors(toy()), {}, prune)
    assert checkpoint.steps(tmp_path) == [9, 12]
