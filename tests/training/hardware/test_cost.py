"""The estimate before a run, computed by hand: its sentence, what a step keeps in memory, and how many rows fit."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from training_toys import settings

from keifu.errors import UserError
from keifu.training.hardware import cost
from keifu.training.hardware.cost import Cost
from keifu.training.protocols import Batch, LossOutput
from keifu.training.trainer import Trainer

COST = Cost(
    parameters=2_500_000, parameter_bytes=10_000_000, optimizer_bytes=25_000_000, fixed_bytes=3_000_000,
    row_bytes=500_000, available=8_000_000_000, micro_batch=4, step_seconds=0.5, flops_per_unit=6.0,
    units_per_step=1024.0,
)  # fmt: skip
MEMORY = (
    "and 50 MB of memory (20 MB parameters and gradients, 25 MB optimizer, 5 MB activations), of 8 GB that are free."
)


def test_the_sentence_counts_steps_rows_and_what_comes_between() -> None:
    """1,000 steps of half a second and 30 seconds between them are 8:50 minutes; 900.5 whole steps are 8:00."""
    assert COST.sentence(1000, "tokens", 1000.0, 30.0) == (
        "2.5 M parameters; 1,000 steps of 1,024 tokens, 1.02 M in all: about 8:50 min, "
        f"validations and samples included, {MEMORY}"
    )
    assert COST.sentence(1000, "pictures", 900.5, 30.0) == (
        "2.5 M parameters; 1,000 steps of up to 1,024 pictures, 922 k in all: about 8:00 min, "
        f"validations and samples included, {MEMORY}"
    )
    included = {
        (False, True): "validations and samples included",
        (False, False): "validations and samples not included",
        (True, True): "validations and samples included and rollouts not",
        (True, False): "validations and samples not included, nor rollouts",
    }
    for (on_policy, between), words in included.items():
        assert f" min, {words}, and 50 MB" in COST.sentence(1000, "tokens", 1000.0, 0.0, on_policy, between)


def squares(model: nn.Module, batch: Batch) -> LossOutput:
    """Return the sum of the squared outputs: what is kept for it are the input and the output."""
    return LossOutput(model(batch["x"]).square().sum(), len(batch["x"]), {})


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Return the trainer of a matrix of 3 times 4: three rows take half a second, an update half of that."""
    monkeypatch.setattr(cost, "_timed", lambda trainer, batch, rows: (rows / 6, 4.0 * rows, 600 * rows))
    monkeypatch.setattr(cost.peak, "time_call", lambda work, device: 0.25)
    return Trainer(nn.Linear(4, 3, bias=False), squares, settings(optimizer="adamw"))


def test_activations_are_the_storages_that_the_backward_pass_reads() -> None:
    """Of five rows the input has 80 bytes, the hidden numbers 60 and the output 40; the second matrix, which is read
    too, is no activation."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    assert cost.activations(Trainer(model, squares, settings()), {"x": torch.randn(5, 4)}) == (180, 80)


@pytest.mark.parametrize(
    ("available", "micro_batch", "rows"),
    [
        (10**9, None, 6),
        (10**9, 4, 4),
        (10**9, 9, 6),
        (574, None, 1),
        (576, None, 2),
        (588, None, 2),
        (592, None, 3),
        (633, None, 3),
        (636, None, 6),
    ],
)
def test_rows_at_a_time_are_nearly_equal_parts_of_what_fits(
    available: int, micro_batch: int | None, rows: int, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients have 48 bytes, AdamW's state 96 and a counter of 4; a row of the output 12. The rest is fixed: the
    input's storage of six rows (96 bytes), and twice as much for a gradient and its input. Two rows need 460 bytes,
    which are 0.8 of 575; four and five rows at a time are no fewer parts than three."""
    monkeypatch.setattr(cost, "available_memory", lambda device: available)
    made = cost.estimate(trainer, {"x": torch.randn(6, 4)}, micro_batch)
    assert (made.parameters, made.parameter_bytes, made.optimizer_bytes) == (12, 48, 100)
    assert (made.fixed_bytes, made.row_bytes, made.available, made.micro_batch) == (288, 12, available, rows)
    assert made.activation_bytes == 288 + 12 * rows and made.total_bytes == 2 * 48 + 100 + 288 + 12 * rows
    assert made.step_seconds == pytest.approx(6 / 6 + 0.25), "of all six rows, and one update"
    assert (made.flops_per_unit, made.units_per_step) == (150, 24)


@pytest.mark.parametrize(
    ("longest", "micro_batch", "rows"), [(10**9, None, 6), (240, None, 3), (96, None, 2), (1, None, 1), (1, 4, 4)]
)
def test_a_micro_batch_on_a_cpu_ends_within_seconds_so_that_a_stop_is_heeded(
    longest: float, micro_batch: int | None, rows: int, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two products of a row have 24 FLOP each. Five rows at a time are as many parts as three."""
    monkeypatch.setattr(cost, "LONGEST", longest)
    made = cost.estimate(trainer, {"x": torch.randn(6, 4)}, micro_batch)
    assert made.micro_batch == rows


def test_a_run_of_which_no_row_fits_says_both_amounts(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "available_memory", lambda device: 500)
    with pytest.raises(UserError) as caught:
        cost.estimate(trainer, {"x": torch.randn(6, 4)}, None)
    needed = "one row at a time needs about 448 bytes of memory"
    assert str(caught.value) == f"The run does not fit: {needed}, and 500 bytes are free; {cost.ADVICE}."
