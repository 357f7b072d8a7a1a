"""The mean of the last states of a run, and a model that has these weights for a while."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu.training.loop import train
from keifu.training.optim.weight_averaging import average_checkpoints, averaged_weights
from keifu.training.run import checkpoint


def saved(directory: Path) -> nn.Module:
    model = toy()
    train(model, objective, Sequences(), settings(save_every=2, keep=4), run(directory))
    return model


def test_the_mean_of_the_last_states_is_made_in_double_precision(tmp_path: Path) -> None:
    model = saved(tmp_path)
    files = [load_file(tmp_path / f"state/step-{step:08d}.safetensors") for step in (8, 10, 12)]
    found = average_checkpoints(tmp_path, 3)
    assert found.keys() == {name for name in files[0] if name.startswith("model.")}
    for name, tensor in found.items():
        expected = sum(file[name].double() for file in files) / 3
        assert torch.equal(tensor, expected.to(tensor.dtype)) and tensor.dtype == files[0][name].dtype
    assert found.keys() == average_checkpoints(tmp_path, 99).keys()  # of those that there are
    assert all(
        torch.equal(tensor, checkpoint.model_tensors(model)[name])
        for name, tensor in average_checkpoints(tmp_path, 1).items()
    )


def test_the_model_has_the_mean_for_a_while_and_its_state_stays(tmp_path: Path) -> None:
    model = saved(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    own, mean = weights(model), average_checkpoints(tmp_path, 3)
    with averaged_weights(model, tmp_path, 3):
        inside = weights(model)
    assert all(torch.equal(inside[name], mean[f"model.{name}"]) for name in inside)
    assert any(not torch.equal(inside[name], own[name]) for name in own)
    assert all(torch.equal(weights(model)[name], own[name]) for name in own)
    assert {path: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before
    for last, directory in ((1, tmp_path), (3, tmp_path / "empty")):
        with averaged_weights(model, directory, last):
            assert all(torch.equal(weights(model)[name], own[name]) for name in own)
