"""What is validated, sampled and saved is the average of the weights where one is kept; an optimizer has the settings'
figures."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_toys import Sequences, objective, run, settings, toy

from keifu.training.loop import train
from keifu.training.optim.optimizers import Optimizers
from keifu.training.run import checkpoint, metrics


def loss_with(weights: dict[str, torch.Tensor]) -> float:
    """Return the validation loss of these weights."""
    model = toy().eval()
    model.load_state_dict(model.state_dict() | weights)
    [batch] = Sequences().validation()
    with torch.no_grad():
        outcome = objective(model, batch)
    return float(outcome.total) / float(outcome.weight)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_validated_sampled_and_saved(ema: float, tmp_path: Path) -> None:
    model, seen = toy(), []
    chosen = settings(steps=6, ema=ema, schedule="constant", save_every=3, evaluate_every=3, sample_every=3)

    def sample(step: int) -> str:
        assert not model.training
        seen.append(model.head.weight.detach().clone())
        return "a sample"

    def save(directory: Path) -> None:
        assert not model.training
        save_file(dict(model.state_dict()), directory / "model.safetensors")

    train(model, objective, Sequences(), chosen, run(tmp_path), sample=sample, save=save)
    validated = [line["validation_loss"] for line in metrics.read(tmp_path) if "validation_loss" in line]
    assert len(validated) == len(seen) == 3
    assert torch.equal(seen[0], toy().head.weight), "before the first step"
    for number, step in ((1, 3), (2, 6)):
        tensors = checkpoint.read(tmp_path, step).tensors
        prefix = "optimisers.average." if ema else "model."
        weights = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        weights = {name: each for name, each in weights.items() if name in dict(model.named_parameters())}
        assert len(weights) == len(list(model.parameters()))
        assert validated[number] == pytest.approx(loss_with(weights), rel=1e-5)
        torch.testing.assert_close(seen[number], weights["head.weight"])
        own = {n.removeprefix("model."): each for n, each in tensors.items() if n.startswith("model.")}
        assert (abs(loss_with(own) - validated[number]) > 1e-4) == bool(ema)
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["head.weight"], seen[-1])


def test_adamw_has_the_settings_figures() -> None:
    chosen = settings(learning_rate=0.03, betas=(0.7, 0.8), epsilon=1e-5, weight_decay=0.2)
    [optimizer] = Optimizers(toy(), chosen).all.values()
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-5)
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.2}


def test_two_updates_of_adamw_are_the_equations() -> None:
    """Loshchilov and Hutter (2019), algorithm 2, written out."""
    chosen = settings(
        optimizer="adamw", learning_rate=0.03, betas=(0.7, 0.8), epsilon=1e-3, weight_decay=0.2, schedule="constant",
        warmup=0,
    )  # fmt: skip
    model = nn.Linear(3, 2, bias=False)
    weight = model.weight.detach().double().clone()
    optimisers, mean, square = Optimizers(model, chosen), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for step in range(1, 3):
        gradient = torch.randn(2, 3)
        model.weight.grad = gradient.clone()
        optimisers.step(step - 1)
        mean, square = 0.7 * mean + 0.3 * gradient, 0.8 * square + 0.2 * gradient.double() ** 2
        update = (mean / (1 - 0.7**step)) / ((square / (1 - 0.8**step)).sqrt() + 1e-3)
        weight = weight - 0.03 * 0.2 * weight - 0.03 * update
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=0, atol=1e-6)


def test_muons_and_adadeltas_figures() -> None:
    found = Optimizers(toy(), settings(optimizer="muon", matrix_rate=0.05, momentum=0.6, weight_decay=0.2)).all
    [group] = found["muon"].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.6, 0.2)
    [adadelta] = Optimizers(toy(), settings(optimizer="adadelta", learning_rate=1.0)).all.values()
    assert {(group["rho"], group["eps"]) for group in adadelta.param_groups} == {(0.95, 1e-6)}
