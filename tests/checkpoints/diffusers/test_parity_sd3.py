"""Stable Diffusion 3's transformer gives diffusers' predictions from diffusers' folders, and back."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from quick import others_slow

from keifu import checkpoints
from keifu.errors import UserError
from keifu.models.diffusion import sd3

diffusers = pytest.importorskip("diffusers")

PLAIN: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 3, "joint_attention_dim": 14, "caption_projection_dim": 24, "pooled_projection_dim": 10,
    "out_channels": 4, "pos_embed_max_size": 9,
}  # fmt: skip
CASES = {
    "as published": {},
    "3.5 medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "3.5 large": {"qk_norm": "rms_norm", "num_layers": 4},
    "dual in the last block": {"dual_attention_layers": (2,)},
    "dual without norms": {"dual_attention_layers": (0, 2), "pos_embed_max_size": 13},
    "one block": {"num_layers": 1, "out_channels": None},
    "odd channels": {"in_channels": 3, "out_channels": 5, "joint_attention_dim": 7, "pooled_projection_dim": 1},
    "odd patches": {"patch_size": 3, "sample_size": 10, "pos_embed_max_size": 7},
    "one head": {"num_attention_heads": 1, "attention_head_dim": 20, "caption_projection_dim": 20, "patch_size": 1},
    "odd heads": {"num_attention_heads": 4, "attention_head_dim": 5, "caption_projection_dim": 20},
}


def theirs(seed: int = 1, **changed):
    """Return diffusers' network, every weight random, norms too."""
    torch.manual_seed(seed)
    model = diffusers.SD3Transformer2DModel(**PLAIN | changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def inputs(model, height: int, width: int, seen: int) -> tuple[torch.Tensor, ...]:
    c = model.config
    text, pooled = torch.randn(2, seen, c.joint_attention_dim), torch.randn(2, c.pooled_projection_dim)
    return torch.randn(2, c.in_channels, height, width), torch.tensor([7.25, 899]), text, pooled


def expected(model, x, timestep, text, pooled) -> torch.Tensor:
    return model(x, text, pooled, timestep).sample


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", others_slow(CASES, *[*CASES][::2]))
@torch.no_grad()
def test_predictions_both_ways(case, seed, weights, tmp_path) -> None:
    reference = theirs(seed, **CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model, tokenizer = checkpoints.load(tmp_path / "theirs")
    assert tokenizer is None
    patch, most = reference.config.patch_size, reference.config.pos_embed_max_size
    for height, width, seen in ((4, 4, 6), (most, 3, 1), (2, 5, 0), (1, 1, 11)):
        given = inputs(reference, height * patch, width * patch + patch - 1, seen)
        wanted = expected(reference, *given)
        assert wanted.std() > 0.1 and close(model(*given), wanted)
    assert close(model(*(each[1:] for each in given)), wanted[1:])
    again = inputs(reference, 4 * patch, 4 * patch, 6)
    wanted = expected(reference, *again)
    assert close(model(again[0], torch.tensor(899), *again[2:])[1], wanted[1])

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)
    back = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(expected(back, *again), wanted)
    assert checkpoints.load(tmp_path / "ours")[0].config == model.config


@torch.no_grad()
def test_a_new_model_is_one_of_diffusers(tmp_path) -> None:
    torch.manual_seed(0)
    model = sd3.build(sd3.Config(8, 2, 4, 4, 2, 6, 2, 9, 5, 7, (1,), True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoints.save(model, None, tmp_path)
    reference = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    given = inputs(reference, 12, 8, 4)
    assert close(model(*given), expected(reference, *given))
    half = checkpoints.load_model(tmp_path, torch.bfloat16)
    got = half(*given)
    assert got.dtype == torch.float32
    assert (got - expected(reference, *given)).abs().max() < 0.1 * got.abs().max()


def test_it_learns_which_text_a_picture_has() -> None:
    """The text alone says where the picture is bright; both streams must be read."""
    torch.manual_seed(0)
    model = sd3.build(sd3.Config(4, 2, 1, 1, 2, 8, 2, 6, 3, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    text, pooled = torch.randn(4, 3, 6), torch.zeros(4, 3)
    pictures = torch.randn(4, 1, 4, 4).sign()
    first, last = 0.0, 0.0
    for step in range(150):
        noise, t = torch.randn(4, 1, 4, 4), torch.rand(4, 1, 1, 1)
        flow = model((1 - t) * pictures + t * noise, 1000 * t.flatten(), text, pooled)
        loss = (flow - (noise - pictures)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step < 1 else first), 0.9 * last + 0.1 * loss.item()
    assert last < 0.6 * first
    with torch.no_grad():
        mixed = model(noise, 1000 * t.flatten(), text.roll(1, 0), pooled)
        assert (mixed - flow).abs().mean() > 0.2


def test_what_is_not_implemented_is_refused(tmp_path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    model: Any = checkpoints.load_model(tmp_path)
    given = inputs(reference, 8, 20, 3)
    with pytest.raises(UserError, match="4 x 10 patches do not fit the 9 x 9 positions"):
        model(*given)
    with pytest.raises(UserError, match="reads 4 channels, not 3"):
        model(given[0][:, :3], *given[1:])
    config = json.loads((tmp_path / "config.json").read_text())
    changes = {"qk_norm": "layer_norm", "caption_projection_dim": 25, "pos_embed_max_size": None}
    for name, value in changes.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=name):
            checkpoints.load_model(tmp_path)
    with pytest.raises(UserError, match="must be a multiple of 4"):
        sd3.Config(n_heads=3, head_dim=5)
    with pytest.raises(UserError, match="A patch of 9 does not fit a side of 8"):
        replace(model.config, patch_size=9)
