"""Micro-batches of steps whose rows have different numbers and lengths, also after a run is resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import Sequences, objective, run, settings, toy

from keifu.training.loop import train
from keifu.training.protocols import Batch


class Uneven(Sequences):
    """Batches of the same number of tokens: few long rows, then many short ones."""

    def batch(self, step: int) -> Batch:
        return Sequences(rows=4, length=11).batch(step) if step % 2 == 0 else Sequences(12, 3).batch(step)


@pytest.mark.parametrize(("rows", "parts"), [(None, [4, 12, 4, 4]), (2, [2, 2, 6, 6, 2, 2, 2, 2])])
def test_more_rows_that_are_shorter_stay_together(tmp_path: Path, rows: int | None, parts: list[int]) -> None:
    model, seen = toy(dropout=0.0), []
    changed = settings(steps=3, micro_batch=rows, evaluate_every=0, warmup=0)

    def watched(model: nn.Module, given: Batch):
        seen.append(len(given["tokens"]))
        return objective(model, given)

    train(model, watched, Uneven(), changed, run(tmp_path), largest=Uneven().batch(0))
    assert seen[-len(parts) :] == parts  # the last of them is the validation


def test_a_resumed_run_of_uneven_batches_is_split_as_before(tmp_path: Path) -> None:
    changed = settings(micro_batch=None, save_every=5, schedule="constant")
    for name, steps in (("whole", 12), ("parts", 5)):
        train(toy(), objective, Uneven(), replace(changed, steps=steps), run(tmp_path / name))
    train(toy(1), objective, Uneven(), changed, run(tmp_path / "parts", resume=True))  # goes on at a batch of many rows
    files = [load_file(tmp_path / name / "state/step-00000012.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
