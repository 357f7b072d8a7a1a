"""AdamW in 8 bits: the state's size, small errors, and the loss of AdamW."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training_toys import Sequences, objective, run, settings, toy  # noqa: E402

from keifu.errors import UserError  # noqa: E402
from keifu.models import gpt2  # noqa: E402
from keifu.processes import Processes, use  # noqa: E402
from keifu.training.loop import train  # noqa: E402
from keifu.training.objectives.language_modeling import causal_language_modeling  # noqa: E402
from keifu.training.optim import adamw8bit  # noqa: E402
from keifu.training.optim.optimizers import Optimizers  # noqa: E402
from keifu.training.run import checkpoint  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402


def learned(state: Any, steps: int) -> tuple[list[float], Trainer]:
    """Return the losses of a small language model that learns to count, and its trainer."""
    torch.manual_seed(0)
    model = gpt2.build(gpt2.Config(vocab_size=64, context_length=32, dim=64, hidden_dim=128, n_layers=2, n_heads=4,
                                   dropout=0.0))  # fmt: skip
    chosen = Settings(steps=steps, batch_size=8, precision="float32", optimizer_state=state, learning_rate=3e-3)
    trainer = Trainer(model.train(), causal_language_modeling, chosen)
    generator, losses = torch.Generator().manual_seed(1), list[float]()
    for step in range(steps):
        start, stride = (torch.randint(1, n, (8, 1), generator=generator) for n in (64, 4))
        gradient = trainer.gradient(step, {"tokens": (start + stride * torch.arange(33)) % 64})
        assert gradient
        trainer.update(gradient)
        losses.append(gradient.sums.means()["loss"])
    return losses, trainer


def test_it_learns_as_adamw_with_a_quarter_of_the_state() -> None:
    plain, wide = learned("float32", 40)
    losses, narrow = learned("int8", 40)
    assert losses[0] == plain[0] and losses[-1] < 0.7 * losses[0]
    assert sum(losses[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.1)
    sizes = [
        sum(t.nbytes for name, t in each.optimizers.state().items() if "embedding" in name) for each in (wide, narrow)
    ]
    assert sizes[1] < 0.27 * sizes[0]


@pytest.mark.parametrize("size", [(64, 100), (5, 7, 191), (adamw8bit.SMALL,)])
def test_averages_are_kept_to_a_few_percent_and_divisors_are_never_too_small(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = torch.zeros(size)
    mean, square = torch.randn(size), torch.rand(size) ** 8
    square.view(-1)[3], mean.view(-1)[5] = 0, 0
    state: dict[str, torch.Tensor] = {}
    for name, value in (("mean", mean), ("square", square)):
        adamw8bit._keep(state, name, value.clone())
        assert state[name].shape == p.shape and state[name].element_size() == 1
    found = [adamw8bit._load(state, name, p) for name in ("mean", "square")]
    assert float((found[0] - mean).abs().max()) < 0.02 * float(mean.abs().max())
    assert bool((found[1] >= square * (1 - 1e-5)).all()) and bool((found[1].view(-1)[3] == 0).all())
    assert found[0].view(-1)[5] == 0
    assert float((found[1] - square).abs().max()) < 0.02


def test_a_resumed_run_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw8bit, "SMALL", 1)
    changed = settings(optimizer="muon", optimizer_state="int8", keep=9)
    for name in ("whole", "cut"):
        train(toy(), objective, Sequences(), changed, run(tmp_path / name))
    for step in (9, 12):
        checkpoint.remove(tmp_path / "cut", step)
    train(toy(), objective, Sequences(), changed, run(tmp_path / "cut", resume=True))
    one, other = (checkpoint.latest(tmp_path / name)[0].tensors for name in ("whole", "cut"))
    assert any(name.endswith("mean_scale") for name in one) and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_that_is_split_and_another_optimizer_are_refused() -> None:
    class Split(Processes):
        is_replicated = False

    with use(Split()), pytest.raises(UserError, match="--optimizer-state int8 needs whole tensors: leave it or"):
        Optimizers(toy(), settings(optimizer_state="int8"))
    with pytest.raises(UserError, match="optimizer_state int8 is of AdamW, and the optimizer is adafactor"):
        settings(optimizer="adafactor", optimizer_state="int8")
