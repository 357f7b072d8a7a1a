"""The run of a recipe's jobs: what the recipe receives for each, folders of stages, and a stop within a job."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keifu.data.epochs import OwnBatches
from keifu.training import runs
from keifu.training.job import RUN_FOLDER, Computation, Job, Jobs, JobStage, RunFacts, staged
from keifu.training.loop import Summary
from keifu.training.protocols import LossOutput
from keifu.training.settings import Settings


def job() -> Job:
    data = OwnBatches({"x": torch.eye(3)}, 1, 0)
    return Job(model=nn.Linear(1, 1), objective=LossOutput, data=data, settings=Settings(), facts=RunFacts(title="it"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the folders in which jobs were trained, each by a loop that only makes a summary."""
    folders: list[Path] = []

    def train(*arguments: Any) -> Summary:
        folders.append(arguments[4].directory)
        return Summary(folders[-1], 3, 0.0, {})

    monkeypatch.setattr(runs, "train", train)
    return folders


def test_a_recipe_receives_its_folder_summaries_and_results(tmp_path: Path, trained: list[Path]) -> None:
    received: list[Any] = []

    def other_recipe() -> Jobs:
        received.append((yield job()).directory)

    def recipe() -> Jobs:
        received.append((yield RUN_FOLDER))
        received.append((yield Computation(lambda folder: folder.name)))
        yield from staged(other_recipe(), JobStage("first", "First"))
        received.append((yield job()).directory)

    summary = runs.run_jobs(recipe(), tmp_path, False, lambda *_: None)
    assert received == [tmp_path, tmp_path.name, tmp_path / "first", tmp_path]
    assert trained == [tmp_path / "first", tmp_path] and summary is not None and summary.directory == tmp_path


def test_what_stops_a_job_is_raised_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Summary:
        raise KeyboardInterrupt("at step 3")

    def recipe() -> Jobs:
        try:
            yield job()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"in the first part, {stop}") from stop

    monkeypatch.setattr(runs, "train", stopped)
    with pytest.raises(KeyboardInterrupt, match="in the first part, at step 3"):
        runs.run_jobs(recipe(), tmp_path, False, lambda *_: None)
    with pytest.raises(KeyboardInterrupt, match="^at step 3"):
        runs.run_jobs(iter([job()]), tmp_path, False, lambda *_: None)
