"""VQModel's checkpoints give diffusers' pictures and codes from diffusers' files, and back."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel

from keifu import checkpoints
from keifu.checkpoints.registry import read_config
from keifu.training.objectives.autoencoders import VQLoss

CASES: dict[str, dict[str, Any]] = {
    "one-level": {"block_out_channels": (6,)},
    "narrow-codes": {"block_out_channels": (6, 9), "layers_per_block": 2, "vq_embed_dim": 2, "num_vq_embeddings": 37},
    "three-levels": {"block_out_channels": (3, 9, 6), "latent_channels": 5, "in_channels": 1, "out_channels": 1},
    "wide-codes": {"block_out_channels": (9, 6), "latent_channels": 2, "vq_embed_dim": 7, "act_fn": "relu"},
}


def published(**changes: Any) -> Any:
    """Build diffusers' model with a block of each kind for each level, and codes that are far apart."""
    torch.manual_seed(1)
    levels = len(changes["block_out_channels"])
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels,
    }  # fmt: skip
    model: Any = VQModel(**{"norm_num_groups": 3, "num_vq_embeddings": 23, **kinds} | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
        model.quantize.embedding.weight.normal_()
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pictures_and_codes_both_ways(case, weights, tmp_path) -> None:
    reference = published(**CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    pictures = torch.rand(2, model.config.channels, 16, 8) * 2 - 1
    theirs = reference(pictures)
    vectors = reference.encode(pictures).latents
    codes = reference.quantize(vectors)[2][2].view(2, *vectors.shape[2:])
    assert len(codes.unique()) > 3
    assert close(model.vectors(pictures), vectors)
    assert torch.equal(model.encode(pictures), codes)
    assert close(model(pictures), theirs.sample)

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys() and "quantize.embedding.weight" in saved
    assert all(torch.equal(saved[tensor], original[tensor]) for tensor in saved)
    assert close(VQModel.from_pretrained(tmp_path / "ours")(pictures).sample, theirs.sample)
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


def test_the_loss_is_that_of_diffusers_and_passes_straight_through(tmp_path) -> None:
    """diffusers weights the codebook's distance by 0.25 and the commitment by 1: its values, with equal distances, are
    1.25 times the distance, as ours are."""
    reference = published(**CASES["narrow-codes"])
    reference.save_pretrained(tmp_path)
    model: Any = checkpoints.load_model(tmp_path)
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    signed = pictures / 127.5 - 1
    output = reference(signed)
    squared = (output.sample - signed).square().mean()
    loss = VQLoss()(model, {"pictures": pictures})
    torch.testing.assert_close(loss.total / 2, squared + output.commit_loss)
    squared.backward()
    VQLoss(commitment=0.0)(model, {"pictures": pictures}).total.backward()
    found, expected = model.encoder.first.weight.grad / 2, reference.encoder.conv_in.weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert model.codebook.weight.grad.abs().sum() > 0


def test_a_config_that_is_not_covered_is_refused() -> None:
    json = {"model_type": "VQModel", "block_out_channels": [4]}
    for change, words in (
        ({"norm_type": "spatial"}, "norm_type"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types are .*AttnDown"),
        ({"out_channels": 1}, "reads 3 channels and gives 1"),
    ):
        with pytest.raises(ValueError, match=words):
            read_config(json | change, "config.json")
