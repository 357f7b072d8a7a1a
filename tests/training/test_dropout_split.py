"""A step's loss and gradient are the same for any micro-batch, dropout included: for every model that has some."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toys import Sequences, objective, run, settings, toy

from keifu.alignment.dpo import dpo
from keifu.alignment.reward_model import ranking_loss
from keifu.checkpoints.lora.peft import adapt
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.dropout import Dropout
from keifu.layers.lora import LoraSettings
from keifu.models import bert, gpt1, gpt2, gpt3, llama, mlp, palm, seq2seq, task_head, transformer
from keifu.models.diffusion import ddpm
from keifu.training.loop import train
from keifu.training.objectives.diffusion import DiffusionLoss, draw_noise
from keifu.training.objectives.language_modeling import (
    causal_language_modeling,
    classification,
    finetuning_loss,
    masked_language_modeling,
    translation,
)
from keifu.training.protocols import Batch, LossOutput, Objective
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")
ROWS, VOCAB = 8, 23
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "context_length": 16, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2,
    "dropout": 0.3,
}  # fmt: skip
RECURRENT: dict[str, Any] = {
    "vocab_size": VOCAB, "context_length": 16, "dim": 16, "embedding_dim": 8, "attention_dim": 16, "maxout_dim": 8,
    "dropout": 0.3,
}  # fmt: skip
UNET: dict[str, Any] = {
    "size": 8, "channels": 1, "dim": 8, "n_residual_blocks": 1, "multipliers": (1, 2), "norm_groups": 4,
    "middle_groups": 4, "dropout": 0.3,
}  # fmt: skip


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, (ROWS, *shape))


def real(*shape: int, least: int = 2) -> Tensor:
    """Return a mask that is True on the first tokens of each row, with a random number of them."""
    lengths = torch.randint(least, shape[-1] + 1, (ROWS, *shape[:-1], 1))
    return torch.arange(shape[-1]) < lengths


def words() -> Batch:
    return {"tokens": tokens(13)}


def pairs() -> Batch:
    return {"source": tokens(7), "target": tokens(9), "source_mask": real(7), "target_mask": real(9, least=3)}


def hidden_words() -> Batch:
    places = torch.stack([torch.randperm(13)[:3] for _ in range(ROWS)])
    return {
        "tokens": tokens(13), "targets": tokens(3), "places": places, "mask": real(13),
        "segments": (torch.arange(13) > 6).long().expand(ROWS, 13), "random_next": torch.randint(0, 2, (ROWS,)),
        "word_weight": torch.full((ROWS,), 2.0), "pair_weight": torch.full((ROWS,), 3.0),
    }  # fmt: skip


def labelled() -> Batch:
    return {"tokens": tokens(9), "mask": real(9), "targets": torch.randint(0, 3, (ROWS,))}


def choices() -> Batch:
    return {"tokens": tokens(2, 9), "mask": real(2, 9), "targets": torch.randint(0, 2, (ROWS,))}


def answers() -> Batch:
    return {"tokens": tokens(2, 9), "mask": real(2, 9), "reference": torch.randn(ROWS, 2)}


def ranked() -> Batch:
    return {"tokens": tokens(3, 9), "mask": real(3, 9), "levels": torch.rand(ROWS, 3)}


def pictures() -> Batch:
    return {"pictures": torch.randn(ROWS, 1, 8, 8), "draws": draw_noise(0, 4, ROWS)}


def points() -> Batch:
    return {"x": torch.randn(ROWS, 2), "targets": torch.randint(0, 2, (ROWS,))}


def of_points(model: nn.Module, batch: Batch) -> LossOutput:
    return LossOutput(
        nn.functional.cross_entropy(model(batch["x"]), batch["targets"], reduction="sum"), len(batch["x"])
    )


def begun(model: nn.Module) -> nn.Module:
    """Return matrices of zeros, with which dropout would change nothing, as they may be after some steps."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted() -> nn.Module:
    model = llama.build(llama.Config(**SMALL | {"dropout": 0.0}, n_kv_heads=1))
    return begun(adapt(model, ("q_proj", "v_proj", "down_proj"), LoraSettings(2, 4.0, dropout=0.4)))


def tuned(form: str, *labels: str) -> Callable[[], nn.Module]:
    decoder = gpt1.Config(**SMALL)
    config = task_head.Config(decoder, form, labels, 1, 2, 3, classifier_dropout=0.3)
    return lambda: task_head.builder(gpt1.build)(config)


CASES: dict[str, tuple[Callable[[], nn.Module], Objective, Callable[[], Batch]]] = {
    "bert": (lambda: bert.build(bert.Config(**SMALL)), masked_language_modeling, hidden_words),
    "classifier": (lambda: bert.build(bert.Config(**SMALL, labels=("a", "b", "c"))), classification, labelled),
    "transformer": (lambda: transformer.build(transformer.Config(**SMALL, attention_dropout=0.2)), translation, pairs),
    "seq2seq": (lambda: seq2seq.build(seq2seq.Config(**RECURRENT)), translation, pairs),
    "gpt1": (lambda: gpt1.build(gpt1.Config(**SMALL)), causal_language_modeling, words),
    "gpt1-finetune": (tuned("choice"), finetuning_loss, choices),
    "gpt2": (lambda: gpt2.build(gpt2.Config(**SMALL)), causal_language_modeling, words),
    "gpt3": (lambda: gpt3.build(gpt3.Config(**SMALL, band=4)), causal_language_modeling, words),
    "palm": (lambda: palm.build(palm.Config(**SMALL)), causal_language_modeling, words),
    "mistral": (
        lambda: llama.build(llama.Config(**SMALL, n_kv_heads=1, sliding_window=5)),
        causal_language_modeling,
        words,
    ),
    "reward": (tuned("score", "reward"), ranking_loss, ranked),
    "dpo": (lambda: gpt2.build(gpt2.Config(**SMALL)), partial(dpo, loss="dpo", beta=0.1), answers),
    "ddpm": (lambda: begun(ddpm.build(ddpm.Config(**UNET))), DiffusionLoss(Noise()), pictures),
    "lora": (adapted, causal_language_modeling, words),
    "mlp": (lambda: mlp.build(mlp.Config(dim=2, hidden_dims=(8, 8), n_outputs=2, dropout=0.3)), of_points, points),
}


def gradients(name: str, micro_batch: int, step: int = 5) -> tuple[float, dict[str, Tensor]]:
    build, aim, data = CASES[name]
    torch.manual_seed(1)
    model = build().train()
    torch.manual_seed(2)
    batch = data()
    changed = Settings(micro_batch=micro_batch, clip=0.0, seed=3, precision="float32")
    found = Trainer(model, aim, changed).gradient(step, batch)
    assert found is not None
    return found.sums.means()["loss"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_changes_neither_loss_nor_gradient(name: str) -> None:
    torch.set_num_threads(1)
    loss, expected = gradients(name, ROWS)
    for rows in (4, 3, 2, 1):
        again, got = gradients(name, rows)
        assert again == pytest.approx(loss, abs=1e-6, rel=1e-6)
        assert got.keys() == expected.keys()
        for parameter, wanted in expected.items():
            torch.testing.assert_close(got[parameter], wanted, atol=1e-6, rtol=1e-5)
    assert gradients(name, ROWS, step=6)[0] != loss  # dropout acts, and is another at another step


@pytest.mark.parametrize("name", CASES)
def test_every_place_of_a_model_is_called_once_in_a_pass(name: str) -> None:
    """A layer that was called twice would have the same mask twice."""
    build, aim, data = CASES[name]
    model, calls = build().train(), []
    for layer in model.modules():
        if isinstance(layer, Dropout):
            layer.register_forward_hook(lambda module, *_: calls.append(module))
    aim(model, data())
    assert calls and len(calls) == len(set(calls))


def test_rows_that_are_shorter_and_stay_together_have_the_same_masks() -> None:
    """`row_elements` puts more rows into a part where they are shorter."""
    found = []
    for elements in (None, 26):
        model, batch = toy(), Sequences().batch(0)
        trainer = Trainer(model, objective, settings(micro_batch=1, clip=0.0, seed=3))
        trainer.row_elements = elements
        found.append(trainer.gradient(0, batch).sums.means()["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_after_a_step_nothing_is_left_that_dropout_draws_from(tmp_path) -> None:
    model = toy()
    trainer = Trainer(model, objective, settings(micro_batch=4))
    for stop in (False, True):
        trainer.gradient(0, Sequences().batch(0), lambda stop=stop: stop)
        assert trainer.dropout.table is None
    trainer.explain(0, Sequences().batch(0))
    assert trainer.dropout.table is None


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("KEIFU_NO_SHAPES") != "1", reason="the hook that checks shapes is not compiled")
def test_a_model_is_not_compiled_anew_at_each_step() -> None:
    build, aim, data = CASES["gpt2"]
    model, batch, losses = build().train(), data(), {}
    for name, running in (("plain", aim), ("compiled", torch.compile(aim, backend="aot_eager"))):
        trainer = Trainer(model, running, Settings(micro_batch=4, clip=0.0, seed=3, precision="float32"))
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = [trainer.gradient(step, batch) for step in range(3)]
        losses[name] = [each.sums.means()["loss"] for each in found if each]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5) and len(set(losses["plain"])) == 3


class Foreign(nn.Module):
    """A module of somebody else's, with torch's dropout, that records which of its inputs are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(64)), nn.Dropout(0.5)
        self.masks: list[list[bool]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        dropped = self.dropout(self.weight)
        self.masks.append((dropped == 0).tolist())
        return dropped.sum() + 0 * tokens


def test_another_modules_dropout_differs_in_every_micro_batch_and_step(tmp_path: Path) -> None:
    """And is the same in a second run: two steps of three micro-batches drop six times, never the same."""
    masks = []
    for name in ("one", "two"):
        model = Foreign()
        loss = lambda model, batch: LossOutput(model(batch["tokens"]).sum(), batch["tokens"].numel(), {})  # noqa: E731
        short = settings(steps=2, warmup=0, micro_batch=2, evaluate_every=9)
        train(model, loss, Sequences(), short, run(tmp_path / name))
        masks.append([tuple(mask) for mask in model.masks if any(mask)][-6:])  # before them, a pass is timed
    assert masks[0] == masks[1] and len({*masks[0]}) == 6
