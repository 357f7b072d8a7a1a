"""LLaVA and SmolVLM outside of their own files: what counts, adapts, splits, packs or refuses them by name."""

from typing import Any

import pytest
import torch
from torch import nn

from keifu.checkpoints.gguf.config import architecture_for
from keifu.checkpoints.lora.peft import adapt
from keifu.commands.reference.plan import architecture
from keifu.distributed.tensor import stacks_of
from keifu.errors import UserError
from keifu.layers.lora import LoraSettings, adapters, merge
from keifu.models import llama
from keifu.models.clip import image as clip_image
from keifu.models.hf.image_processor import Pixels, Tiles
from keifu.models.multimodal import llava, siglip, smolvlm
from keifu.models.sizes import published_sizes
from keifu.native.compiler import Unavailable
from keifu.native.describe import describe
from keifu.training.hardware.flops import count_flops

TEXT = llama.Config(50, 64, 16, 32, 2, 2)
TOWERS: dict[str, Any] = {
    "clip": clip_image.Config(8, 4, 3, 12, 24, 2, 2, projected=False),
    "siglip": siglip.Config(8, 4, 3, 12, 24, 2, 2),
}
KINDS = [*TOWERS, "smolvlm"]
TOKENS = torch.tensor([[1, 49, 49, 49, 49, 5, 6]])


def toy(tower: str = "clip") -> llava.Llava:
    torch.manual_seed(0)
    if tower == "smolvlm":
        return smolvlm.build(smolvlm.Config(TEXT, siglip.Config(8, 2, 3, 12, 24, 2, 2), Tiles(16, 8), 49, 2)).eval()
    config = llava.Config(TEXT, TOWERS[tower], Pixels(8, 8), image_token=49, full=tower == "siglip")
    return llava.build(config).eval()


@pytest.mark.parametrize("tower", KINDS)
@torch.no_grad()
def test_pictures_are_counted_and_adapted(tower: str) -> None:
    model, pixels = toy(tower), torch.randn(1, 3, 8, 8)
    whole = model(TOKENS, pixels=pixels)
    assert count_flops(lambda: model(TOKENS, pixels=pixels)) > count_flops(lambda: model(TOKENS)) > 0
    adapt(model, ["all-linear"], LoraSettings(rank=2))
    torch.testing.assert_close(model(TOKENS, pixels=pixels), whole, rtol=1e-5, atol=1e-5)
    for adapter in adapters(model):
        nn.init.normal_(adapter.b, std=0.1)
    changed = model(TOKENS, pixels=pixels)
    assert not torch.allclose(changed, whole)
    torch.testing.assert_close(merge(model)(TOKENS, pixels=pixels), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("clip", "Llava"), ("smolvlm", "SmolVLM")])
def test_what_is_not_supported_is_refused_by_name(kind: str, name: str) -> None:
    model = toy(kind)
    with pytest.raises(Unavailable, match=f"the model is a {name}, which native code does not have"):
        describe(model)
    with pytest.raises(UserError, match="writes no GGUF"):
        architecture_for(model.config)
    for size in published_sizes():
        if size.model == f"multimodal.{name.lower()}":
            with pytest.raises(UserError, match="is no Transformer of tokens alone: plans are of such models"):
                architecture(size)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallelism_splits_the_decoder_alone(kind: str) -> None:
    model = toy(kind)
    assert stacks_of(model, {module: path for path, module in model.named_modules()}) == [[*model.blocks]]


def test_layers_that_a_tower_has_not_are_refused() -> None:
    with pytest.raises(UserError, match=r"feature_layers is \(4,\), and the tower has 3 hidden states"):
        llava.build(llava.Config(TEXT, TOWERS["clip"], Pixels(8, 8), image_token=49, feature_layers=(4,)))
