"""`keep_best`: a finished run leaves the weights of its lowest validation loss, also when it was stopped before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu.training.loop import train
from keifu.training.run import checkpoint, metrics
from keifu.training.run.checkpoint import LOSS


class Worsening(Sequences):
    """Sequences whose training rows count backwards, so that each step makes the validation loss worse."""

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        found = super().batch(step)["tokens"]
        return {"tokens": found if step == 10**6 else found.flip(1)}


def trained(directory: Path, **changed) -> tuple[torch.nn.Module, dict]:
    """Train a model to count, then to count backwards. Return it with the figures of the second run."""
    model = toy(dropout=0.0)
    train(model, objective, Sequences(), settings(steps=60), run(directory / "first"))
    chosen = settings(**{"steps": 12, "keep_best": True, **changed})
    return model, train(model, objective, Worsening(), chosen, run(directory / "second")).figures


def test_a_run_that_only_makes_things_worse_leaves_the_weights_that_it_began_with(tmp_path: Path, capsys) -> None:
    learned = toy(dropout=0.0)
    train(learned, objective, Sequences(), settings(steps=60), run(tmp_path / "alone"))
    model, figures = trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(learned).values(), weights(model).values(), strict=True))
    losses = [line[LOSS] for line in metrics.read(tmp_path / "second") if LOSS in line]
    assert figures[LOSS] == min(losses) == losses[0] < losses[-1]
    said = capsys.readouterr().err
    assert f"{losses[0]:.4g} before and {losses[-1]:.4g} after" in said and "of step 0" in said


def test_without_it_the_last_weights_stay_and_a_better_end_is_kept(tmp_path: Path) -> None:
    _, figures = trained(tmp_path / "off", keep_best=False)
    losses = [line[LOSS] for line in metrics.read(tmp_path / "off" / "second") if LOSS in line]
    assert figures[LOSS] == losses[-1] > losses[0] and checkpoint.read_best(tmp_path / "off" / "second") is None
    model = toy(dropout=0.0)
    train(model, objective, Sequences(), settings(keep_best=True), run(tmp_path / "better"))
    state, _ = checkpoint.latest(tmp_path / "better")
    assert all(torch.equal(state.tensors[f"model.{name}"], tensor) for name, tensor in weights(model).items())


@pytest.mark.parametrize("damage", [{"figures": None}, {"figures": 3}, {"figures": {}}, {"step": "x"}])
def test_a_damaged_record_of_the_best_weights_is_as_none(tmp_path: Path, damage: dict) -> None:
    best = checkpoint.Best(3, {LOSS: 1.0})
    (tmp_path / checkpoint.FOLDER).mkdir()
    checkpoint.keep_best(tmp_path, toy(), best)
    assert checkpoint.read_best(tmp_path) == best
    facts = tmp_path / checkpoint.FOLDER / "best.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | damage))
    assert checkpoint.read_best(tmp_path) is None


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_weights_survive_a_stop(ema: float, tmp_path: Path) -> None:
    chosen = settings(steps=12, keep_best=True, ema=ema, learning_rate=0.3, warmup=0, schedule="constant")
    saved: dict[str, dict[str, torch.Tensor]] = {}

    def go(name: str, resume: bool, steps: int) -> None:
        model = toy()

        def save(directory: Path) -> None:
            saved[name] = {key: tensor.clone() for key, tensor in weights(model).items()}

        how = replace(run(tmp_path / name), resume=resume)
        train(model, objective, Sequences(), replace(chosen, steps=steps), how, save=save)

    go("whole", False, 12)
    go("stopped", False, 8)
    go("stopped", True, 12)
    assert (kept := checkpoint.read_best(tmp_path / "whole")) == checkpoint.read_best(
        tmp_path / "stopped"
    ) and kept is not None
    assert all(torch.equal(saved["whole"][name], tensor) for name, tensor in saved["stopped"].items())


def test_a_damaged_file_of_the_best_weights_counts_as_none(tmp_path: Path) -> None:
    trained(tmp_path)
    file = tmp_path / "second" / checkpoint.FOLDER / "best.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert checkpoint.read_best(tmp_path / "second") is None
