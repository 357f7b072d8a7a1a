"""The moving average of weights: its formula, its place in a run, and bits that are the same after resuming."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_toys import Sequences, objective, run, settings, toy

from keifu.training.loop import train
from keifu.training.optim.weight_averaging import MovingAverage, replaced_weights
from keifu.training.run import checkpoint


def test_the_average_is_its_formula() -> None:
    weights = {"w": nn.Parameter(torch.zeros(3))}
    average, expected = MovingAverage(weights, 0.5), torch.zeros(3)
    for number in range(1, 12):
        with torch.no_grad():
            weights["w"] += number
        average.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weights["w"].detach()
    torch.testing.assert_close(average.means["w"], expected)
    own = weights["w"].detach().clone()
    with replaced_weights(weights, average.means):
        assert torch.equal(weights["w"], average.means["w"])
    assert torch.equal(weights["w"], own)


def test_a_resumed_run_ends_with_the_same_average(tmp_path: Path) -> None:
    def go(name: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        model, chosen = toy(), settings(steps=steps, ema=0.9, schedule="constant", save_every=3)

        def save(directory: Path) -> None:
            save_file(dict(model.state_dict()), directory / "model.safetensors")

        train(model, objective, Sequences(), chosen, run(tmp_path / name, resume=resume), save=save)
        own = {f"own.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
        found = checkpoint.latest(tmp_path / name)[0].tensors
        return {**found, **own, **load_file(tmp_path / name / "model.safetensors")}

    whole = go("whole", 7)
    go("split", 3)
    resumed = go("split", 7, resume=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(whole["optimisers.average.head.weight"], whole["head.weight"])
    assert not torch.equal(whole["head.weight"], whole["own.head.weight"])
    assert torch.equal(whole["own.head.weight"], whole["model.head.weight"])
