"""Dropout acts at each place where a model has it, in training alone: every place by itself, and none is missing."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.dropout import Dropout
from keifu.layers.lora import LoraSettings, Target, attach
from keifu.models import bert, gpt1, gpt2, gpt3, llama, mlp, seq2seq, task_head, transformer
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import conditioned_unet, ddpm

RATE = 0.4
SIZE: dict[str, Any] = {
    "vocab_size": 31,
    "context_length": 16,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
}
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]
TOKENS = torch.arange(14).view(2, 7) * 2 % 31


def decoder(module: Any, **more: Any) -> Callable[[], Made]:
    return lambda: (module.build(module.Config(**SIZE, dropout=RATE, **more)), lambda model: model(TOKENS))


def of_bert() -> Made:
    config = bert.Config(**SIZE, dropout=RATE, labels=("a", "b"), pooled=True, words=False, next_sentence=False)
    return bert.build(config), lambda model: model.classify(TOKENS, None, None)


def of_transformer() -> Made:
    more = {"attention_dropout": RATE, "activation_dropout": RATE}
    config = transformer.Config(**SIZE, dropout=RATE, **more)
    return transformer.build(config), lambda model: model(TOKENS, TOKENS)


def of_seq2seq() -> Made:
    sizes = {"dim": 16, "embedding_dim": 12, "attention_dim": 12, "maxout_dim": 12}
    config = seq2seq.Config(vocab_size=31, context_length=16, dropout=RATE, **sizes)
    return seq2seq.build(config), lambda model: model(TOKENS, TOKENS)


def of_finetuned() -> Made:
    base = gpt2.build(gpt2.Config(**SIZE, dropout=0.0))
    config = task_head.Config(base.config, "classification", ("a", "b", "c"), 28, 29, 30, RATE)
    mask = torch.ones(2, 1, 7, dtype=torch.bool)
    return task_head.add_head(base, config), lambda model: model(TOKENS[:, None], mask)


def of_adapters() -> Made:
    model = llama.build(llama.Config(**SIZE, dropout=0.0))
    names = ["blocks.0.attention.out", "blocks.1.feedforward.down"]
    rows = {name: model.get_submodule(name).weight.shape[0] for name in names}
    attach(model, {Target(name, 0, rows[name], name): LoraSettings(2, 4.0, RATE) for name in names})
    return model, lambda model: model(TOKENS)


def of_ddpm() -> Made:
    config = ddpm.Config(size=8, dim=8, multipliers=(1, 2), n_residual_blocks=1, attention=(1,), norm_groups=4,
                         middle_groups=4, dropout=RATE, noise=Noise())  # fmt: skip
    return ddpm.build(config), lambda model: model(torch.ones(2, 3, 8, 8), torch.tensor([3, 5]))


def of_conditioned_unet() -> Made:
    config = conditioned_unet.Config(
        size=8, channels=3, predicted_channels=3, widths=(8, 16), n_residual_blocks=1, attention=(1,), n_heads=2,
        up_attention=(1,), context_dim=6, norm_groups=4, dropout=RATE,
    )  # fmt: skip
    inputs = torch.ones(2, 3, 8, 8), torch.tensor([3, 5]), torch.ones(2, 4, 6)
    return conditioned_unet.build(config), lambda model: model(*inputs)


def of_clip_text() -> Made:
    config = clip_text.Config(31, 8, 16, 24, 2, 2, embedding_dim=8, attention_dropout=RATE)
    return clip_text.build(config), lambda model: model(TOKENS)


def of_mlp() -> Made:
    return mlp.build(mlp.Config(3, (8, 6), 2, dropout=RATE)), lambda model: model(torch.ones(2, 3))


MODELS: dict[str, Callable[[], Made]] = {
    "gpt1": decoder(gpt1), "gpt2": decoder(gpt2), "gpt3": decoder(gpt3, band=4), "llama": decoder(llama),
    "bert": of_bert, "transformer": of_transformer, "seq2seq": of_seq2seq, "finetuned": of_finetuned,
    "adapters": of_adapters, "ddpm": of_ddpm, "conditioned_unet": of_conditioned_unet, "clip_text": of_clip_text,
    "mlp": of_mlp,
}  # fmt: skip


SUBLAYERS = {"attention.dropout", "attention_dropout", "feedforward_dropout"}  # of weights, and of what is added
DECODER = {"dropout", *(f"blocks.*.{each}" for each in SUBLAYERS)}  # the first: of embeddings
ENCODED = {*SUBLAYERS, "feedforward.dropout"}
DECODED = {*ENCODED, "cross_attention.dropout", "cross_attention_dropout"}
RESIDUALS = {f"unet.{part}.residuals.*.dropout" for part in ("down.*", "middle", "up.*")}
# The places of each model, and how many they are: the blocks' numbers stand as stars.
EXPECTED: dict[str, tuple[set[str], int]] = {
    "gpt1": (DECODER, 7), "gpt2": (DECODER, 7), "gpt3": (DECODER, 7), "llama": (DECODER, 7),
    "bert": ({*DECODER, "classifier_dropout"}, 8),
    "transformer": (
        {"source_dropout", "target_dropout"}
        | {f"encoder.*.{each}" for each in ENCODED} | {f"decoder.*.{each}" for each in DECODED},
        2 + 2 * 4 + 2 * 6,
    ),
    "seq2seq": ({"source_dropout", "target_dropout", "output_dropout"}, 3),
    "finetuned": ({"dropout"}, 1),
    "adapters": ({f"blocks.*.{e}.adapters.*.dropout" for e in ("attention.out", "feedforward.down")}, 2),
    "ddpm": (RESIDUALS, 8), "conditioned_unet": (RESIDUALS, 8),
    "clip_text": ({"blocks.*.attention.dropout"}, 2),
    "mlp": ({"dropouts.*"}, 2),
}  # fmt: skip


def places(model: nn.Module) -> dict[str, Dropout]:
    """Return the layers of dropout that have a rate, by name."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, Dropout) and module.p}


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Count how often each place is gone through."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in places(model).items()
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def made(name: str) -> Made:
    """Return a model in which no weight is zero."""
    torch.manual_seed(1)
    model, call = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, call


@pytest.mark.parametrize("name", MODELS)
def test_each_place_drops_in_training_and_none_in_evaluation(name: str) -> None:
    model, call = made(name)
    plain = call(model.eval()).detach()
    assert torch.equal(call(model.eval()), plain)
    found = places(model)
    assert ({re.sub(r"\.\d+(?=\.|$)", ".*", place) for place in found}, len(found)) == EXPECTED[name]
    for module in found.values():
        assert module.p == RATE
        module.p = 0.0
    torch.testing.assert_close(call(model.train()), plain)
    for place, module in found.items():
        module.p = RATE
        assert not torch.allclose(call(model.train()), plain), f"{place} drops nothing in training"
        torch.testing.assert_close(call(model.eval()), plain)
        module.p = 0.0


@pytest.mark.parametrize("name", MODELS)
def test_each_place_has_a_layer_of_its_own(name: str) -> None:
    """Which is gone through once, as one called twice would drop the same again."""
    model, call = made(name)
    with counted(model) as counts:
        call(model.train())
    assert set(counts.values()) == {1} and set(counts) == set(places(model))
