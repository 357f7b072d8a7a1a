"""A step: its gradient does not depend on the split, rates follow their formulas, each weight has its optimizer."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu.devices import require_compiler
from keifu.errors import UserError
from keifu.models import llama, palm
from keifu.processes import Processes
from keifu.ranges import check
from keifu.training.hardware.cost import Cost
from keifu.training.loop import train
from keifu.training.objectives import language_modeling
from keifu.training.optim.lr_schedules import ratio
from keifu.training.optim.optimizers import Optimizers
from keifu.training.protocols import LossOutput
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer(model: nn.Module, rows: int, clip: float = 0.0, aim=objective, **changed) -> Trainer:
    return Trainer(model, aim, settings(micro_batch=rows, clip=clip, seed=1, **changed))


def masked(model: nn.Module, batch: dict) -> LossOutput:
    """Return a loss whose rows have different weights: in row i the first `lengths[i]` tokens count."""
    tokens = batch["tokens"]
    counts = torch.arange(5) < batch["lengths"][:, None]
    targets = tokens[:, 1:].masked_fill(~counts, -100)
    total = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum")
    return LossOutput(total, counts.sum())


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_the_gradient_does_not_depend_on_the_split(rows: int) -> None:
    batch = Sequences().batch(0) | {"lengths": torch.tensor([5, 1, 0, 4, 2, 3])}
    whole, parts = toy(dropout=0.0), toy(dropout=0.0)
    expected = trainer(whole, 6, aim=masked).gradient(0, batch)
    got = trainer(parts, rows, aim=masked).gradient(0, batch)
    assert expected and got
    assert got.sums.means()["loss"] == pytest.approx(expected.sums.means()["loss"], abs=1e-6)
    assert float(got.norm) == pytest.approx(float(expected.norm), rel=1e-5)
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    model, batch = toy(dropout=0.0), Sequences().batch(0)
    trainer(model, 2).gradient(0, batch)
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    outcome = objective(model, batch)
    (outcome.total / outcome.weight).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("clip", "norm"), [(0.01, 0.01), (100.0, None), (0.0, None)])
def test_clipping_bounds_the_norm_and_reports_the_one_before(clip: float, norm: float | None) -> None:
    model = toy(dropout=0.0)
    gradient = trainer(model, 3, clip=clip).gradient(0, Sequences().batch(0))
    assert gradient is not None
    after = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(after) == pytest.approx(float(gradient.norm) if norm is None else norm, rel=1e-3)
    assert float(gradient.norm) > 0.02


def test_dropout_is_drawn_from_the_seed_and_the_step() -> None:
    model, batch = toy(dropout=0.5), Sequences().batch(0)
    losses = [trainer(model, 6).gradient(step, batch) for step in (0, 1, 0)]
    first, second, again = (gradient.sums["total"].item() for gradient in losses if gradient)
    assert first == again != second


def test_a_stop_between_two_parts_leaves_nothing() -> None:
    model, asked = toy(), iter([False, True])
    assert trainer(model, 2).gradient(0, Sequences().batch(0), lambda: next(asked)) is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_without_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="batch of step 3 has no rows"):
        trainer(toy(), 2).gradient(3, {"tokens": torch.zeros(0, 6, dtype=torch.long)})


def test_a_first_batch_without_rows_is_one_too(tmp_path: Path) -> None:
    class Empty(Sequences):
        def batch(self, step: int):
            return {name: tensor[:0] for name, tensor in super().batch(step).items()}

    with pytest.raises(UserError, match="batch of step 0 has no rows"):
        train(toy(), objective, Empty(), settings(), run(tmp_path))


def test_splitting_keeps_every_row_in_order() -> None:
    parts = [part.batch["tokens"] for part in Processes().micro_batches(Sequences().batch(0), 4)]
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(torch.cat(parts), Sequences().batch(0)["tokens"])


def test_causal_is_the_mean_of_the_next_tokens_loss() -> None:
    config = llama.Config(vocab_size=13, context_length=8, dim=16, hidden_dim=24, n_layers=1, n_heads=2, n_kv_heads=2)
    model, tokens = llama.build(config), torch.randint(13, (3, 7))
    outcome = language_modeling.causal_language_modeling(model, {"tokens": tokens})
    probabilities = model(tokens[:, :-1]).log_softmax(-1)
    expected = -probabilities.gather(-1, tokens[:, 1:, None]).sum()
    torch.testing.assert_close(outcome.total, expected)
    assert outcome.weight == 18
    mask = torch.arange(7).expand(3, 7) >= torch.tensor([[2], [4], [6]])
    outcome = language_modeling.causal_language_modeling(model, {"tokens": tokens, "mask": mask})
    counted = probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    torch.testing.assert_close(outcome.total, -counted.sum())
    assert outcome.weight == 5 + 3 + 1


def test_a_validation_leaves_out_what_has_no_rows() -> None:
    judged, whole = trainer(toy(), 4), Sequences().batch(0)
    empty = {name: rows[:0] for name, rows in whole.items()}
    assert judged.validation([empty, whole, empty]) == judged.validation([whole]) and judged.validation([empty]) == {}


@pytest.mark.parametrize("mask", [False, True])
def test_z_loss_is_in_the_loss_and_its_gradient_and_never_in_a_validation(mask: bool) -> None:
    config = palm.Config(vocab_size=13, context_length=8, dim=16, hidden_dim=24, n_layers=1, n_heads=2, head_dim=8)
    model, batch = palm.build(config), {"tokens": torch.randint(13, (3, 7))}
    if mask:
        batch["mask"] = torch.arange(7).expand(3, 7) >= torch.tensor([[2], [4], [6]])
    plain = language_modeling.causal_language_modeling(model, batch)
    outcome = language_modeling.causal_language_modeling(model.train(), batch, z_loss=0.3)
    log_z = model(batch["tokens"][:, :-1]).logsumexp(-1)
    written_out = plain.total + 0.3 * (log_z.square() * batch.get("mask", torch.ones(3, 7))[:, 1:]).sum()
    torch.testing.assert_close(outcome.total, written_out)
    assert plain.figures == {} and torch.equal(outcome.figures["nats"], plain.total.detach())
    ours, theirs = (torch.autograd.grad(total, list(model.parameters())) for total in (outcome.total, written_out))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    judged = language_modeling.causal_language_modeling(model.eval(), batch, z_loss=0.3)
    assert torch.equal(judged.total, plain.total) and judged.figures == {}


def test_schedules_follow_their_formulas() -> None:
    def rates(schedule: str, final_ratio: float = 0.1) -> list[float]:
        return [ratio(schedule, step, 100, 10, final_ratio) for step in range(100)]

    for schedule in ("constant", "linear", "cosine", "inverse_sqrt"):
        assert rates(schedule)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates("constant")[10:] == [1.0] * 90
    assert rates("linear")[10] == 1.0 and rates("linear")[99] == pytest.approx(0.1)
    assert rates("linear")[50] == pytest.approx(1 - 0.9 * 40 / 89)
    assert rates("cosine")[99] == pytest.approx(0.1)
    assert rates("cosine")[50] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 40 / 89)))
    assert rates("inverse_sqrt")[39] == pytest.approx(0.5)
    assert ratio("cosine", 0, 1, 0, 0.1) == 1.0  # a run of one step


def test_palms_rate_is_held_and_falls_with_the_root_of_the_step() -> None:
    palms = settings(steps=255_000, warmup=0, optimizer="adafactor", schedule="inverse_sqrt", hold=10_000)
    optimisers = Optimizers(toy(), palms)
    for step in (0, 9_999, 10_000, 39_999, 254_999):
        rate = min(1e-2, 1 / math.sqrt(step + 1))
        assert optimisers.rates(step)["learning_rate"] == pytest.approx(rate)
    held = [ratio("linear", step, 100, 10, 0.1, hold=20) for step in range(100)]
    assert held[9:30] == [1.0] * 21 and held[31] < 1 and held[99] == pytest.approx(0.1)


def test_gpt3s_rate_follows_the_rows_while_the_batch_grows_and_then_stays() -> None:
    changed = dict(steps=300, batch_size=10, batch_ramp=(1, 500), warmup=20, decay_steps=200, rate_by="rows")
    growing = settings(**changed, learning_rate=1.0)
    optimisers = Optimizers(toy(), growing)
    seen = [growing.growth.before(step + 1) / 10 for step in range(300)]  # in steps of 10 rows
    rates = [optimisers.rates(step)["learning_rate"] for step in range(300)]
    assert rates[0] == pytest.approx(0.1 / 20)
    for rate, steps in zip(rates, seen, strict=True):
        if steps <= 20:
            assert rate == pytest.approx(steps / 20)
        elif steps >= 200:
            assert rate == pytest.approx(0.1)
        else:
            assert rate == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * max(0, steps - 1 - 20) / (200 - 1 - 20))))
    without = settings(**changed | {"warmup": 0}, learning_rate=1.0)
    assert Optimizers(toy(), without).rates(0)["learning_rate"] == 1.0
    by_steps = Optimizers(toy(), settings(**changed | {"rate_by": "steps"}, learning_rate=1.0))
    assert by_steps.rates(9)["learning_rate"] == pytest.approx(0.5)


def test_what_a_growing_run_costs_counts_its_smaller_batches() -> None:
    growing = settings(steps=20, batch_size=6, batch_stages=((2, 5), (3, 11)))
    assert growing.whole_steps(20) == pytest.approx((5 * 2 + 6 * 3 + 9 * 6) / 6)
    measured = Cost(1, 4, 8, 0, 1, 100, 6, step_seconds=1.0, flops_per_unit=1.0, units_per_step=30.0)
    said = measured.sentence(20, "tokens", growing.whole_steps(20), 0.0)
    assert "20 steps of up to 30 tokens, 410 in all: about 14 s" in said
    said = measured.sentence(20, "tokens", 20.0, 13.0, on_policy=True)
    assert "20 steps of 30 tokens, 600 in all: about 33 s, validations and samples included and rollouts not" in said


def test_data_whose_batches_do_not_grow_are_not_said_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Batches have 6 rows here, not"):
        train(toy(), objective, Sequences(), settings(batch_stages=((2, 5),)), run(tmp_path))


class Watched(Sequences):
    """Batches on policy, which note the weights that they are made with."""

    on_policy = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model, []

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        self.seen.append((step, weights(self.model)["embedding.weight"]))
        return super().batch(step)

    def validation(self) -> list[dict[str, torch.Tensor]]:
        return []

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        assert not state


def test_some_weights_learn_with_a_share_of_the_rate() -> None:
    groups = Optimizers(toy(), settings(rate_shares=(("head", 0.5), ("layers.0", 0.0))))
    groups.update({"adamw": 0.1})
    rates = {n: group["lr"] for group in groups.all["adamw"].param_groups for n in group["param_names"]}
    assert rates["head.weight"] == 0.05 and rates["layers.0.bias"] == 0 and rates["layers.1.weight"] == 0.1
    with pytest.raises(UserError, match="the optimizer is muon"):
        settings(rate_shares=(("head", 0.5),), optimizer="muon")


def test_on_policy_batches_are_made_after_the_update_and_none_twice(tmp_path: Path) -> None:
    model = toy()
    data, largest, told = Watched(model), Sequences().batch(0), []
    out = run(tmp_path / "run", watch=lambda means: told.append(means["loss"]) or ["look"])
    train(model, objective, data, settings(steps=4, warmup=0, log_every=1), out, largest=largest)
    assert [step for step, _ in data.seen] == [0, 1, 2, 3] and len(told) == 4
    made_with = [made for _, made in data.seen] + [weights(model)["embedding.weight"]]
    assert not any(torch.equal(a, b) for a, b in pairwise(made_with))


def test_weight_decay_is_for_matrices_and_embeddings_only() -> None:
    groups = Optimizers(toy(), settings(weight_decay=0.3)).all["adamw"].param_groups
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays["embedding.weight"] == decays["layers.0.weight"] == decays["head.weight"] == 0.3
    assert decays["layers.0.bias"] == decays["norm.weight"] == decays["norm.bias"] == 0.0


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_a_state_in_which_each_matrix_had_tensors_of_its_own_is_read(optimizer: str) -> None:
    model = toy()
    optimizers = Optimizers(model, settings(optimizer=optimizer))
    objective(model, Sequences().batch(0)).total.backward()
    optimizers.step(0)
    old: dict[str, torch.Tensor] = {}
    for key, tensor in optimizers.state().items():
        name, _, field = key.rpartition(".")
        if key.startswith(optimizer):
            parts = tensor.split((6, 10)) if "layers.0" in key and tensor.dim() else [tensor]
            old |= {f"{name}.{n}.{field}": part for n, part in enumerate(parts)}
        else:
            old[key] = tensor
    again = Optimizers(toy(), settings(optimizer=optimizer))
    again.load(old)
    assert again.state().keys() == optimizers.state().keys() and len(old) > len(again.state())
    assert all(torch.equal(tensor, again.state()[key]) for key, tensor in optimizers.state().items())


def test_a_frozen_parameter_is_left_alone(tmp_path: Path) -> None:
    model = toy()
    model.embedding.weight.requires_grad_(False)
    before = weights(model)
    train(model, objective, Sequences(), settings(optimizer="muon", steps=3), run(tmp_path))
    after = weights(model)
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "embedding.weight")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_toy_is_learned(tmp_path: Path, optimizer: str) -> None:
    model = toy(dropout=0.0)
    changed = settings(steps=120, optimizer=optimizer, learning_rate=2e-2, evaluate_every=0, save_every=0)
    summary = train(model, objective, Sequences(rows=16), changed, run(tmp_path))
    assert summary.figures["validation_loss"] < 1.0
    assert summary.figures["validation_accuracy"] > 0.6


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "steps must be a whole number from 1 .*, not 0"),
        ("micro_batch", 0, "micro_batch must be a whole number from 1"),
        ("learning_rate", float("nan"), "learning_rate must be a number from 0 .*, not nan"),
        ("clip", -1.0, "clip must be a number from 0"),
        ("final_ratio", 2.0, "final_ratio must be a number from 0 to 1, not 2.0"),
        ("betas", (0.9, 1.0), r"betas must be .* below 1, not \(0.9, 1.0\)"),
        ("hold", -1, "hold must be a whole number from 0"),
        ("decay_steps", 0, "decay_steps must be a whole number from 1"),
        ("batch_stages", ((8, 5), (16, 4)), r"must ascend from above 0, but are \(5, 4\)"),
        ("batch_ramp", (33, 100), "must start with 1 to 32 rows, not 33"),
        ("warmup", 2000, "A warm-up of 2000 steps does not fit a run of 1000"),
    ],
)
def test_impossible_settings_are_named(field: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Settings(**{field: value})


def test_a_batch_grows_in_one_way() -> None:
    with pytest.raises(UserError, match="batch_stages and batch_ramp are two ways"):
        Settings(batch_stages=((8, 5),), batch_ramp=(1, 100))


@pytest.mark.parametrize(
    ("setting", "value", "near"),
    [("optimizer", "adam", "adamw"), ("schedule", "cosinus", "cosine"), ("precision", "bf16", "bfloat16")],
)
def test_an_unknown_choice_answers_with_the_nearest(setting: str, value: str, near: str) -> None:
    changed = Settings()
    vars(changed)[setting] = value  # beartype refuses it as an argument
    with pytest.raises(UserError, match=rf"There is no {setting} '{value}'. Did you mean '{near}'\?"):
        check(changed)


def test_without_a_compiler_compile_says_so(monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="needs a C.. compiler"):
        require_compiler(CPU)
