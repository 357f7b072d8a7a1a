"""A text-to-image run that is stopped in the training of one of its parts and gone on with, beside one that is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keifu import checkpoints
from keifu.recipes.running import run_jobs
from keifu.training import runs
from keifu.training.signals import Interrupted

Weights = dict[str, Any]


def stopped_and_whole(
    module: Any, recipe: Any, stopped: str, steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Weights, Weights]:
    """Return the weights of a run that was stopped and resumed, and those of a run that was not.

    It stops after so many steps of the training whose folder has the name `stopped`. The rate is constant, since a
    schedule would follow the fewer steps.
    """
    train = runs.train

    def limited(place: str | None) -> Any:
        def way(model: Any, objective: Any, data: Any, settings: Any, run: Any, *rest: Any) -> Any:
            changed = replace(settings, schedule="constant", warmup=0)
            if run.directory.name == place:
                train(model, objective, data, replace(changed, steps=steps), run, *rest)
                raise Interrupted("stopped")
            return train(model, objective, data, changed, run, *rest)

        return way

    monkeypatch.setattr(runs, "train", limited(stopped))
    with pytest.raises(Interrupted):
        run_jobs(module.jobs(recipe), folder / "parts")
    monkeypatch.setattr(runs, "train", limited(None))
    run_jobs(module.jobs(recipe), folder / "parts", True)
    run_jobs(module.jobs(recipe), folder / "whole")
    ours, theirs = (checkpoints.load_model(folder / name).state_dict() for name in ("parts", "whole"))
    return ours, theirs
