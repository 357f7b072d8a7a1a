"""Activation checkpointing: the same bits with less memory, which the memory fit knows."""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import quick
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from test_on_another_device import CASES  # noqa: E402

from keifu.errors import UserError  # noqa: E402
from keifu.models import gpt2  # noqa: E402
from keifu.training.hardware import cost  # noqa: E402
from keifu.training.hardware.recompute import Recomputed, blocks_of, recompute_blocks  # noqa: E402
from keifu.training.objectives.language_modeling import causal_language_modeling  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402

WAYS = ("none", "blocks", "selective")


def step(name: str, how: Any, precision: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of a step in two micro-batches."""
    torch.manual_seed(0)
    model, objective, batch = CASES[name]()
    chosen = Settings(batch_size=3, micro_batch=2, precision=precision, activation_checkpointing=how)
    trainer = Trainer(model.train(), objective, chosen)
    assert any(isinstance(block.forward, Recomputed) for block in blocks_of(model)) == (how != "none")
    found = trainer.gradient(0, batch)
    assert found
    return found.norm, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "precision"),
    quick(product(["gpt1", "llama", "transformer", "ddpm", "dit", "mixtral", "dpo"], ["float32", "bfloat16"])),
)
def test_loss_and_gradients_have_the_same_bits(name: str, precision: str) -> None:
    norm, gradients = step(name, "none", precision)
    for how in WAYS[1:]:
        again, others = step(name, how, precision)
        assert torch.equal(again, norm) and others.keys() == gradients.keys()
        for key in gradients:
            assert torch.equal(others[key], gradients[key]), (how, key)


def trainer_of(how: Any) -> tuple[Trainer, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = gpt2.build(gpt2.Config(vocab_size=31, context_length=64, dim=64, hidden_dim=256, n_layers=6, n_heads=4))
    chosen = Settings(batch_size=4, precision="float32", activation_checkpointing=how)
    return Trainer(model.train(), causal_language_modeling, chosen), {"tokens": torch.randint(31, (4, 65))}


def test_the_memory_fit_knows_what_is_kept_and_what_is_computed_again() -> None:
    """`blocks` keeps the inputs and one block at a time; `selective` keeps the matrix multiplications too."""
    kept = {}
    for how in WAYS:
        trainer, batch = trainer_of(how)
        kept[how] = cost.activations(trainer, batch)[0] / (4 * 64 * 64 * 4)  # tensors [rows, length, dim]
    a_block = kept["none"] / 6
    assert kept["blocks"] == pytest.approx(6 + a_block, rel=0.25)
    assert kept["blocks"] < kept["selective"] < 0.8 * kept["none"]


def test_a_pass_without_gradients_is_the_plain_one() -> None:
    again, batch = trainer_of("selective")
    plain, _ = trainer_of("none")
    models: list[Any] = [each.model.eval() for each in (again, plain)]
    with torch.no_grad():
        assert torch.equal(*(model(batch["tokens"][:, :-1]) for model in models))


def test_what_cannot_be_computed_again_is_refused() -> None:
    with pytest.raises(UserError, match="--activation-checkpointing acts on blocks, and this model lists none"):
        recompute_blocks(nn.Linear(2, 3), "blocks")
    model: Any = trainer_of("none")[0].model
    model.blocks[1].more = nn.Dropout(0.5)
    with pytest.raises(UserError, match=r"needs the same dropout twice.*for more\."):
        recompute_blocks(model, "blocks")
