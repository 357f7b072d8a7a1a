"""CLIP's sizes are the released ones to the last parameter; its weights begin as the released code draws them."""

import math

import pytest
import torch

from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.clip.image import AntialiasedBottleneck
from keifu.models.sizes import count

RELEASED = {
    "clip-rn50": 102_007_137, "clip-rn101": 119_688_033, "clip-rn50x4": 178_300_601, "clip-rn50x16": 290_979_217,
    "clip-rn50x64": 623_258_305, "clip-vit-b32": 151_277_313, "clip-vit-b16": 149_620_737, "clip-vit-l14": 427_616_513,
    "clip-vit-l14-336": 427_944_193,
}  # fmt: skip


def test_every_size_has_the_released_number_of_parameters() -> None:
    assert {name: count(clip, config) for name, config in clip.SIZES.items()} == RELEASED
    assert count(clip_text, clip_text.SIZES["stable-diffusion-text"]) == 123_060_480


def near(tensor: torch.Tensor, std: float) -> bool:
    return tensor.std().item() == pytest.approx(std, rel=0.1) and abs(tensor.mean().item()) < 0.1 * std


def test_the_text_tower_begins_by_its_width_and_depth() -> None:
    torch.manual_seed(0)
    tower = clip_text.build(clip_text.Config(400, 40, 96, 384, 3, 4, embedding_dim=64))
    block = tower.blocks[1]
    assert near(tower.embedding.weight, 0.02) and near(tower.positions.weight, 0.01)
    assert near(block.attention.qkv.weight, 96**-0.5) and near(block.attention.out.weight, (96 * 6) ** -0.5)
    assert near(block.feedforward.up.weight, 192**-0.5) and near(block.feedforward.down.weight, (96 * 6) ** -0.5)
    assert near(tower.projection.weight, 96**-0.5)
    assert not block.attention.qkv.bias.any() and not block.attention.out.bias.any()


def test_the_image_towers_begin_as_the_released_code_has_them() -> None:
    torch.manual_seed(0)
    config = clip_image.Config(64, 8, 3, 96, 384, 2, 4, embedding_dim=64)
    tower = clip_image.build(config)
    assert near(tower.embedding.positions.weight, 96**-0.5) and near(tower.projection.weight, 96**-0.5)
    assert near(tower.blocks[0].attention.qkv.weight, math.sqrt(2 / (4 * 96)))  # Glorot, of q, k and v as one matrix
    resnet = clip_image.build_resnet(clip_image.ResNetConfig(64, 8, (1, 1, 1, 2), 4, 32))
    assert near(resnet.pool.kv.weight, 256**-0.5) and near(resnet.pool.positions.weight, 256**-0.5)
    blocks = [module for module in resnet.modules() if isinstance(module, AntialiasedBottleneck)]
    assert len(blocks) == 5 and not any(block.norm3.weight.any() for block in blocks)


def test_similarities_begin_multiplied_by_one_over_the_papers_temperature() -> None:
    text, image = clip_text.Config(11, 8, 12, 24, 1, 3), clip_image.Config(16, 8, 3, 12, 24, 1, 3)
    model = clip.build(clip.Config(text, image))
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and model.logit_scale.shape == ()
    same = torch.randn(3, 512)
    assert torch.allclose(model.logits(same, 2 * same).diag(), torch.tensor(1 / 0.07), atol=1e-4)


@torch.no_grad()
def test_a_caption_is_the_same_alone_and_padded() -> None:
    torch.manual_seed(0)
    config = clip_text.Config(50, 12, 24, 48, 2, 3, embedding_dim=8)
    for end_id in (None, 49):
        tower = clip_text.build(clip_text.Config(**vars(config) | {"end_id": end_id})).eval()
        alone = torch.tensor([[48, 3, 7, 49]])
        for padding in (49, 0):
            padded = torch.nn.functional.pad(alone, (0, 6), value=padding)
            assert torch.allclose(tower(alone), tower(padded), atol=1e-6)
