"""Promise 3: a run that was killed, stopped or torn and resumed ends with the bits of one that never was."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_toys import Sequences, finished, objective, run, settings, toy, train_slowly

from keifu.errors import UserError
from keifu.processes import Processes, use
from keifu.training.loop import train
from keifu.training.run import checkpoint, metrics
from keifu.training.signals import Interrupted

TIMES = ("seconds", "tokens_per_second", "flops_utilisation")


PROCESSES = get_context("forkserver")  # forks from a process that has imported torch and computed nothing
PROCESSES.set_forkserver_preload(["training_toys"])


def child(directory: Path, optimizer: str) -> BaseProcess:
    """Start a slow run of 40 steps in a separate process. It resumes if there is a state."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the process that forks, which does not get it otherwise
    process = PROCESSES.Process(target=train_slowly, args=(directory, optimizer, directory.with_suffix(".said")))
    process.start()
    return process


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of the same run that nothing stops, which is trained once."""

    @cache
    def trained(optimizer: str) -> Path:
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("whole")
        train(toy(), objective, Sequences(), settings(steps=40, micro_batch=4, optimizer=optimizer), run(folder))
        return folder

    return trained


def said(directory: Path) -> str:
    return directory.with_suffix(".said").read_text()


def wait_for_step(process: BaseProcess, directory: Path, step: int) -> None:
    """Wait until a state of that step or a later one is there."""
    while process.is_alive() and not any(done >= step for done in checkpoint.steps(directory)):
        time.sleep(0.005)


def final(directory: Path) -> dict[str, torch.Tensor]:
    found, _ = checkpoint.latest(directory)
    return found.tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(directory: Path) -> list[dict]:
    """Return metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(directory)]


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_killed_at_any_moment_and_resumed_is_bitwise_the_same(
    tmp_path: Path, optimizer: str, unstopped: Callable[[str], Path]
) -> None:
    killed, whole = tmp_path / "killed", unstopped(optimizer)
    killed.with_suffix(".waits").touch()
    for step in (3, 17):  # two kills: some time after a state, wherever the process is then
        process = child(killed, optimizer)
        wait_for_step(process, killed, step)
        time.sleep(random.random() * 0.06)
        process.kill()
        process.join()
    killed.with_suffix(".waits").unlink()
    child(killed, optimizer).join()
    assert said(killed).count("Going on from step") == 2
    assert checkpoint.steps(killed)[-1] == checkpoint.steps(whole)[-1] == 40
    assert same(final(killed), final(whole))
    assert lines(killed) == lines(whole)


def test_ctrl_c_saves_the_state_and_says_how_to_resume(tmp_path: Path, unstopped: Callable[[str], Path]) -> None:
    stopped = tmp_path / "stopped"
    stopped.with_suffix(".waits").touch()
    process = child(stopped, "adamw")
    wait_for_step(process, stopped, 3)
    os.kill(process.pid or 0, signal.SIGINT)
    stopped.with_suffix(".waits").unlink()
    process.join()
    step = checkpoint.steps(stopped)[-1]
    assert process.exitcode and "once more stops at once" in said(stopped)
    assert f"stopped at step {step}" in (stopped / "report.html").read_text()
    child(stopped, "adamw").join()
    assert same(final(stopped), final(unstopped("adamw")))


class Interrupting(Sequences):
    """Sends this process a signal while a batch is made."""

    def __init__(self, at: int, number: signal.Signals, times: int = 1):
        super().__init__()
        self.at, self.number, self.times = at, number, times

    def batch(self, step: int):
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().batch(step)


def test_every_process_goes_on_from_the_state_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Which alone has seen that the newest one is damaged."""

    class Second(Processes):
        rank, world_size = 1, 2

        def broadcast(self, value):
            return 9 if value == 12 else value

    train(toy(), objective, Sequences(), settings(), run(tmp_path))
    with use(Second()):
        train(toy(), objective, Sequences(), settings(steps=14), run(tmp_path, resume=True))
    assert "Going on from step 9" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_between_steps(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="Stopped after step 5; the state is saved"):
        train(toy(), objective, Interrupting(5, number), settings(), run(tmp_path))
    assert checkpoint.steps(tmp_path)[-1] == 5
    assert signal.getsignal(number) is before


class Breaking(Interrupting):
    """Ctrl-C reaches a program that the step runs, such as a compiler, too: the step fails."""

    def batch(self, step: int):
        found = super().batch(step)
        if step == self.at:
            raise RuntimeError("g++ was interrupted")
        return found


def test_what_fails_by_the_signal_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="Stopped after step 5; the state is saved"):
        train(toy(), objective, Breaking(5, signal.SIGTERM), settings(), run(tmp_path))
    assert checkpoint.steps(tmp_path)[-1] == 5


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is begun without one
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            train(toy(), objective, Interrupting(5, signal.SIGINT, times=2), settings(), run(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(stop.value, Interrupted)
    assert checkpoint.steps(tmp_path)[-1] == 3


def test_resuming_in_the_middle_drops_later_lines_of_metrics(tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole")
    (torn := finished(tmp_path / "torn") / "state/step-00000012.json").unlink()
    summary = train(toy(3), objective, Sequences(), settings(), run(tmp_path / "torn", resume=True))
    assert torn.exists() and summary.steps == 12
    assert same(final(tmp_path / "torn"), final(whole))
    assert lines(tmp_path / "torn") == lines(whole)


def test_a_torn_state_is_named_and_the_one_before_is_used(tmp_path: Path, capsys) -> None:
    finished(tmp_path)
    file = tmp_path / "state/step-00000012.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train(toy(3), objective, Sequences(), settings(), run(tmp_path, resume=True))
    said = capsys.readouterr().err
    assert "step-00000012.safetensors is damaged" in said and "Going on from the one before, of step 9" in said
    assert load_file(file).keys() == final(tmp_path).keys()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"step": 9}'])
def test_without_a_whole_state_every_damaged_one_is_named(tmp_path: Path, damage: bytes) -> None:
    finished(tmp_path)
    for file in (tmp_path / "state").glob("*.json"):
        file.write_bytes(damage)
    with pytest.raises(UserError, match="no state to resume from.*step-00000012.json is damaged.*step-00000009.json"):
        train(toy(), objective, Sequences(), settings(), run(tmp_path, resume=True))


def test_a_truncated_state_is_damaged(tmp_path: Path) -> None:
    finished(tmp_path)
    file = tmp_path / "state/step-00000012.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert checkpoint.latest(tmp_path)[0].step == 9


def test_changed_settings_and_options_are_named_with_both_values(tmp_path: Path) -> None:
    train(toy(), objective, Sequences(), settings(), run(tmp_path, options={"model": {"dim": 8}}))
    again = run(tmp_path, resume=True, options={"model": {"dim": 9}})
    with pytest.raises(UserError, match=r"learning_rate 0.01 → 0.02, betas .*0.99\], model.dim 8 → 9"):
        train(toy(), objective, Sequences(), settings(learning_rate=0.02, betas=(0.9, 0.99)), again)


def test_changed_data_are_an_error(tmp_path: Path) -> None:
    finished(tmp_path)
    other = Sequences()
    other.fingerprint = "other"
    with pytest.raises(UserError, match="counting → other"):
        train(toy(), objective, other, settings(), run(tmp_path, resume=True))


def test_steps_and_the_split_may_change_and_it_is_said(tmp_path: Path, capsys) -> None:
    finished(tmp_path)
    summary = train(toy(), objective, Sequences(), settings(steps=15, micro_batch=2), run(tmp_path, resume=True))
    assert summary.steps == 15
    assert "Going on from step 12; changed: steps 12 → 15, micro_batch 6 → 2." in capsys.readouterr().err


def test_another_model_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    finished(tmp_path)
    other = toy()
    other.head = torch.nn.Linear(8, 12, bias=False)
    both = r"head.weight: \(11, 8\) saved, \(12, 8\) in the model; head.bias: \(11,\) saved, none in the model"
    with pytest.raises(UserError, match=both):
        train(other, objective, Sequences(), settings(), run(tmp_path, resume=True))


def test_a_new_run_does_not_write_over_another(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(UserError, match="already holds a run, saved at step 12: go on with it \\(the same call of"):
        train(toy(), objective, Sequences(), settings(), run(tmp_path))
    train(toy(), objective, Sequences(), settings(steps=4), run(tmp_path, replace=True))
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no state to resume from"):
        train(toy(), objective, Sequences(), settings(), run(tmp_path, resume=True))


def test_a_finished_run_resumed_changes_nothing(tmp_path: Path) -> None:
    finished(tmp_path)
    before, said = final(tmp_path), lines(tmp_path)
    summary = train(toy(5), objective, Sequences(), settings(), run(tmp_path, resume=True))
    assert same(final(tmp_path), before) and lines(tmp_path) == said
    assert summary.figures["validation_loss"] == said[-1]["validation_loss"]


def test_two_names_of_one_tensor_are_saved_once(tmp_path: Path) -> None:
    model = toy()
    model.head.weight = model.embedding.weight
    tensors = checkpoint.model_tensors(model)
    assert "model.embedding.weight" in tensors and "model.head.weight" not in tensors
    checkpoint.save(tmp_path, 1, tensors, {}, lambda step: None)
    other = toy(4)
    other.head.weight = other.embedding.weight
    with torch.no_grad():
        checkpoint.load_into_model(other, checkpoint.latest(tmp_path)[0].tensors)
    assert torch.equal(other.head.weight, model.embedding.weight)


def test_a_number_without_axes_is_no_missing_one() -> None:
    model = toy()
    model.scale = torch.nn.Parameter(torch.ones(()))
    tensors = checkpoint.model_tensors(model)
    with pytest.raises(UserError, match=r"scale: \(\) saved, none in the model"):
        checkpoint.load_into_model(toy(), tensors)


def test_a_figure_that_is_the_loss_itself_is_saved_beside_it(tmp_path: Path) -> None:
    """A state right behind a line of metrics holds the sums of one step, in which nothing was added yet."""

    def twice(model, batch):
        found = objective(model, batch)
        return found._replace(figures={"task_loss": found.total})

    summary = train(toy(), twice, Sequences(), settings(steps=4, log_every=3, save_every=1), run(tmp_path))
    assert summary.figures["task_loss"] == summary.figures["loss"]


def test_facts_of_a_state_are_json(tmp_path: Path) -> None:
    finished(tmp_path)
    facts = json.loads((tmp_path / "state/step-00000012.json").read_text())
    assert facts["described"]["settings"]["steps"] == 12 and facts["resolved"]["precision"] == "float32"


def test_of_three_states_the_newest_undamaged_one_is_used(tmp_path: Path) -> None:
    """With three, the one before the last is not the oldest."""
    train(toy(), objective, Sequences(), settings(keep=3), run(tmp_path))
    assert checkpoint.steps(tmp_path) == [6, 9, 12]
    (tmp_path / "state/step-00000012.safetensors").write_bytes(b"")
    state, problems = checkpoint.latest(tmp_path)
    assert state.step == 9 and len(problems) == 1
    assert "step-00000012" in problems[0] and problems[0].endswith("Going on from the one before, of step 9.")


class Rank(Processes):
    """One of two processes that share a split model, alone: nothing is sent."""

    is_replicated = False

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, 2


def test_two_processes_hash_all_of_five_files(tmp_path: Path) -> None:
    """With a file for each process, the first file of a share would be all of it."""
    there = checkpoint.folder(tmp_path, 3)
    there.mkdir(parents=True)
    names = [f"shard-{number}.safetensors" for number in range(5)]
    for name in names:
        (there / name).write_bytes(name.encode())
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    checkpoint.commit(tmp_path, 3, {"files": digests}, lambda step: None)
    refused = []
    for name in names:
        (there / name).write_bytes(b"damaged")
        for rank in (0, 1):
            with use(Rank(rank)):
                try:
                    checkpoint.read(tmp_path, 3)
                except UserError as error:
                    assert f"{name} is damaged" in str(error)
                    refused.append((name, rank))
        (there / name).write_bytes(name.encode())
    assert refused == [(name, number % 2) for number, name in enumerate(names)]
