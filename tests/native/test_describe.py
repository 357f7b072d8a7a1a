"""Models as data: by the layers they are made of, and refused with the layer's name where native code lacks one."""

import pytest
import torch
from native_toys import GROUPED, TOYS, toy
from torch import nn

from keifu.layers.feedforward import SwiGLU
from keifu.layers.lora import LoraSettings, Target, attach, merge
from keifu.layers.meta import on_meta
from keifu.layers.mixture import GroupedSigmoidRouter
from keifu.models import bert, llama, seq2seq
from keifu.native.compiler import Unavailable
from keifu.native.describe import describe


@pytest.mark.parametrize("kind", TOYS)
def test_every_parameter_is_described_once(kind: str) -> None:
    model = toy(kind)
    part, taken = describe(model), dict[str, int]()
    matrices = {(each.weight, each.first): each for each in part.matrices}
    matrices |= {(layer.router.weight, 0): layer.router for layer in part.layers if layer.router}
    for each in matrices.values():
        taken[each.weight] = taken.get(each.weight, 0) + each.rows
    norms = [norm for layer in part.layers for norm in layer.norms.values()] + [part.norm]
    vectors = {n for norm in norms for n in (norm.weight, norm.bias)} | {each.bias for each in matrices.values()}
    vectors |= {layer.sinks for layer in part.layers}
    expected = dict(model.named_parameters())
    assert vectors - {None} == {name for name, each in expected.items() if each.ndim == 1}
    assert taken == {n: len(each) for n, each in expected.items() if each.ndim == 2 and n != "positions.weight"}
    assert part.positions == ("positions.weight" if "positions.weight" in expected else None)


def test_a_model_without_memory_is_described_too() -> None:
    with on_meta():
        model = llama.build(llama.Config(**GROUPED))
    frequencies = [layer.frequencies for layer in describe(model).layers]
    assert all(each is not None and each.device.type == "cpu" for each in frequencies)


def scaled() -> nn.Module:
    from keifu.layers.attention.positions import RopeScaling

    return llama.build(llama.Config(**GROUPED, rope_scaling=RopeScaling("dynamic", 2.0, 40)))


def mixture(name: str, module: nn.Module) -> nn.Module:
    """Return a Mixtral with another part in the mixture of layer 1."""
    model = toy("mixtral")
    setattr(model.get_submodule("blocks.1.feedforward"), name, module)
    return model


REFUSED = {
    "blocks.1.feedforward has an expert that every token uses": lambda: mixture("shared", SwiGLU(60, 88)),
    "blocks.1.feedforward.router is a GroupedSigmoidRouter": lambda: mixture("router", GroupedSigmoidRouter(60, 5, 2)),
    "blocks.1.feedforward has experts with different activations": lambda: mixture(
        "experts", nn.ModuleList(llama.gated(llama.Config(**GROUPED, activation=a), 0) for a in ["silu", "gelu"] * 3)
    ),
    "the model is a Seq2Seq": lambda: seq2seq.build(seq2seq.Config(vocab_size=9, context_length=8, dim=8)),
    "the model is a": lambda: bert.build(
        bert.Config(vocab_size=9, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=2)
    ),
    "blocks.0.attention.rotary has dynamic scaling": scaled,
    "blocks.0.feedforward has an activation": lambda: llama.build(llama.Config(**GROUPED, activation="mish")),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_native_code_lacks_is_named(sentence: str) -> None:
    with pytest.raises(Unavailable, match=sentence):
        describe(REFUSED[sentence]())


def test_a_layer_of_ones_own_is_named() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    model = toy("llama")
    model.set_submodule("blocks.2.feedforward.down", Clipped(88, 60))
    with pytest.raises(Unavailable, match="blocks.2.feedforward.down is a Clipped"):
        describe(model)


def test_hooks_are_refused() -> None:
    model = toy("llama")
    handle = model.get_submodule("blocks.1.attention").register_forward_hook(lambda *_: None)
    with pytest.raises(Unavailable, match="blocks.1.attention has hooks"):
        describe(model)
    handle.remove()
    describe(model)


def test_adapters_must_be_merged() -> None:
    model = attach(toy("llama"), {Target("blocks.1.attention.out", 0, 60, "o_proj"): LoraSettings(2)})
    with pytest.raises(Unavailable, match=r"blocks.1.attention.out has adapters \(LoRA\)"):
        describe(model)
    describe(merge(model))
