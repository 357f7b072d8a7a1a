"""Learning to translate: its loss, its optimizer, its memory, the mean of its states and its budget of time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu.errors import UserError
from keifu.layers.losses.cross_entropy import linear_cross_entropy
from keifu.models import transformer
from keifu.processes import Processes, use
from keifu.training import setup
from keifu.training.loop import train
from keifu.training.objectives.language_modeling import translation
from keifu.training.optim.optimizers import Optimizers
from keifu.training.optim.weight_averaging import average_checkpoints, averaged_weights
from keifu.training.protocols import Batch
from keifu.training.run import checkpoint

SMALL = transformer.Config(
    vocab_size=13, context_length=16, dim=16, hidden_dim=24, n_layers=1, n_heads=2, dropout=0.0, start_id=1
)


def batch() -> Batch:
    """Return three pairs of unequal lengths."""
    source, target = torch.randint(4, 13, (3, 5)), torch.randint(4, 13, (3, 6))
    masks = [torch.arange(n) < torch.tensor(lengths)[:, None] for n, lengths in ((5, [5, 3, 2]), (6, [4, 6, 3]))]
    target[:, 0] = 1
    return {"source": source, "source_mask": masks[0], "target": target, "target_mask": masks[1]}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_is_that_of_each_next_token_and_padding_counts_nothing(smoothing: float, biased: bool) -> None:
    model, given = transformer.build(SMALL), batch()
    if biased:
        model.logits_bias.copy_(torch.randn(1, 13))
    logits = model(given["source"], given["target"][:, :-1], given["source_mask"])
    counted = given["target_mask"][:, 1:]
    plain = (-logits.log_softmax(-1).gather(-1, given["target"][:, 1:, None]).squeeze(-1) * counted).sum()
    smooth = (-logits.log_softmax(-1).mean(-1) * counted).sum()
    outcome = translation(model.train(), given, smoothing)
    torch.testing.assert_close(outcome.total, (1 - smoothing) * plain + smoothing * smooth)
    torch.testing.assert_close(outcome.figures["nats"], plain)
    assert int(outcome.weight) == 3 + 5 + 2 and not outcome.figures["nats"].requires_grad
    judged = translation(model.eval(), given, smoothing)  # smoothing is for training
    torch.testing.assert_close(judged.total, plain)
    assert judged.figures == {}


def test_what_padding_holds_changes_nothing() -> None:
    model, given = transformer.build(SMALL).eval(), batch()
    other = {name: tensor.clone() for name, tensor in given.items()}
    for side in ("source", "target"):
        other[side][~given[f"{side}_mask"]] = 7
    torch.testing.assert_close(translation(model, given).total, translation(model, other).total)


def test_a_head_with_a_bias_has_its_gradient() -> None:
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((9, 4), (11, 4), (11,)))
    targets = torch.randint(11, (9,))
    ours, plain = linear_cross_entropy(hidden, weight, bias, targets, label_smoothing=0.2)
    theirs = nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum"))
    everything = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(ours, everything), torch.autograd.grad(theirs, everything))


def test_adadelta_is_torchs_and_its_rate_follows_the_schedule(tmp_path: Path) -> None:
    ours, theirs = toy(dropout=0.0), toy(dropout=0.0)
    changed = settings(optimizer="adadelta", learning_rate=1.0, schedule="constant", warmup=0, weight_decay=0.0)
    optimisers = Optimizers(ours, changed)
    reference = torch.optim.Adadelta(theirs.parameters(), lr=1.0, rho=0.95, eps=1e-6)
    for step in range(3):
        for model in (ours, theirs):
            objective(model, Sequences().batch(step)).total.backward()
        optimisers.step(step)
        reference.step()
        reference.zero_grad()
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name).detach(), rtol=0, atol=1e-7)
    assert optimisers.rates(0) == {"learning_rate": 1.0}


def test_adadelta_resumes_bitwise(tmp_path: Path) -> None:
    changed = settings(optimizer="adadelta", learning_rate=1.0, schedule="constant")
    train(toy(), objective, Sequences(), changed, run(tmp_path / "whole"))
    train(toy(), objective, Sequences(), replace(changed, steps=7), run(tmp_path / "parts"))
    train(toy(1), objective, Sequences(), changed, run(tmp_path / "parts", resume=True))
    files = [load_file(tmp_path / name / "state/step-00000012.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_epsilon_is_adams() -> None:
    assert Optimizers(toy(), settings(epsilon=1e-3)).all["adamw"].defaults["eps"] == 1e-3
    with pytest.raises(UserError, match="epsilon must be a number from 0 .*, not -1.0"):
        settings(epsilon=-1.0)


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adadelta"])
def test_trying_the_pace_changes_nothing(optimizer: str) -> None:
    model = toy()
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    changed = settings(optimizer=optimizer, micro_batch=None)
    steps = setup.steps_within(0.02, model, objective, Sequences(), changed, Sequences().batch(0))
    assert steps > 5 and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_steps_are_those_that_fit(monkeypatch) -> None:
    monkeypatch.setattr(setup.cost.peak, "time_call", lambda work, device: (work(), 0.5)[1])
    steps = setup.steps_within(50.0, toy(), objective, Sequences(), settings(), Sequences().batch(0))
    assert steps == 3000  # both passes take half a second on this clock, and the update the other half


def test_all_processes_make_the_steps_that_fit_on_the_first_one() -> None:
    class Second(Processes):
        rank, world_size = 1, 2

        def broadcast(self, value):
            return 77

    with use(Second()):
        assert setup.steps_within(0.001, toy(), objective, Sequences(), settings(), Sequences().batch(0)) == 77
