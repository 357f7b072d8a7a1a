"""Dropout acts at each place where a model has it, in training alone: every place by itself, and none is missing."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keifu.layers.attention import attend
from keifu.layers.lora import Adapted, Adapter, Low, Target, attach
from keifu.layers.noise import Noise
from keifu.models import (
    bert,
    clip_text,
    conditioned_unet,
    ddpm,
    finetuned,
    gpt1,
    gpt2,
    gpt3,
    llama,
    mlp,
    seq2seq,
    transformer,
)

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
    config = finetuned.Config(base.config, "classification", ("a", "b", "c"), 28, 29, 30, RATE)
    mask = torch.ones(2, 1, 7, dtype=torch.bool)
    return finetuned.finetuned(base, config), lambda model: model(TOKENS[:, None], mask)


def of_adapters() -> Made:
    model = llama.build(llama.Config(**SIZE, dropout=0.0))
    names = ["blocks.0.attention.out", "blocks.1.feedforward.down"]
    rows = {name: model.get_submodule(name).weight.shape[0] for name in names}
    attach(model, {Target(name, 0, rows[name], name): Low(2, 4.0, RATE) for name in names})
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


# With two blocks: of embeddings, of what a sublayer adds, inside feed-forwards, before a classifier; attention's own.
DECODER = {"dropout": 1 + 2 * 2, "attention": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "gpt1": DECODER, "gpt2": DECODER, "gpt3": DECODER, "llama": DECODER,
    "bert": {"dropout": 1 + 2 * 2 + 1, "attention": 2},
    "transformer": {"dropout": (1 + 2 * 2 + 2) + (1 + 2 * 3 + 2), "attention": 2 + 2, "cross_attention": 2},
    "seq2seq": {"dropout": 3},  # of both embeddings and of the output
    "finetuned": {"dropout": 1}, "adapters": {"out": 1, "down": 1}, "clip_text": {"attention": 2},
    "mlp": {"dropout": 2},
    "ddpm": {"dropout": 2 + 2 + 2 * 2}, "conditioned_unet": {"dropout": 2 + 2 + 2 * 2},  # of every residual block
}  # fmt: skip


def places(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that drop something, by name: layers of dropout, attention, adapters."""
    found = {}
    for name, module in model.named_modules():
        if "Dropout" in type(module).__name__ or isinstance(getattr(module, "dropout", None), float):
            found[name] = module
        if isinstance(module, Adapted):
            found[name] = module
    return found


def rates(module: nn.Module, new: float | None) -> float:
    """The rate of a place, after it was set to `new`."""
    if isinstance(module, Adapted):
        for adapter in module.adapters:
            assert isinstance(adapter, Adapter)
            if new is not None:
                adapter.low = Low(adapter.low.rank, adapter.low.alpha, new)
        return module.parts[0].low.dropout
    name = "dropout" if isinstance(getattr(module, "dropout", None), float) else "p"
    if new is not None:
        setattr(module, name, new)
    return getattr(module, name)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each place is gone through."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in places(model).items()
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def made(name: str) -> Made:
    """A model none of whose weights is zero."""
    torch.manual_seed(1)
    model, call = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, call


def twice(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        torch.manual_seed(2)
        first = call(model)
        torch.manual_seed(3)
        return first, call(model)


@pytest.mark.parametrize("name", MODELS)
def test_each_place_drops_in_training_and_none_in_evaluation(name: str) -> None:
    model, call = made(name)
    plain = twice(model.eval(), call)[0]
    assert torch.equal(*twice(model.eval(), call))
    found = {place: module for place, module in places(model).items() if rates(module, None)}
    for module in found.values():
        rates(module, 0.0)
    torch.testing.assert_close(twice(model.train(), call)[0], plain)
    for place, module in found.items():
        rates(module, RATE)
        assert not torch.allclose(twice(model.train(), call)[0], plain), f"{place} drops nothing in training"
        assert torch.equal(*twice(model.eval(), call)), f"{place} drops in evaluation"
        torch.testing.assert_close(call(model.eval()).detach(), plain)
        rates(module, 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_no_place_is_missing(name: str) -> None:
    """Each place's rate is the Config's, and it is gone through as often as the table says."""
    model, call = made(name)
    with counted(model) as counts:
        twice(model.train(), call)
    assert {rates(module, None) for module in places(model).values() if rates(module, None)} == {RATE}
    kinds: Counter[str] = Counter()
    for place, count in counts.items():
        if rates(places(model)[place], None):
            kinds[place.rpartition(".")[2] if "." in place else place] += count // 2
    assert kinds == EXPECTED[name]


def test_attention_written_out_drops_weights_too() -> None:
    """In bfloat16, where a text is short and learned from."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ones = torch.ones_like(v)
    assert torch.allclose(attend(q, k, ones, "causal").float(), torch.ones(1, 64, 16), atol=0.01)
    sums = attend(q, k, ones, "causal", dropout=0.5).float()
    assert float(sums.std()) > 0.2 and float(sums.mean()) == pytest.approx(1, abs=0.1)
