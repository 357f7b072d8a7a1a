"""Pictures and latents in tiles beside diffusers' tiles and beside the whole, and half precision that fails."""

import numpy as np
import pytest
import torch
from PIL import Image

from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.inference.images.tiled_vae import LatentCodec, decode_tiled, tile_of, tile_starts

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_pieces_lie_evenly_and_cover_all() -> None:
    assert tile_starts(16, 16, 4) == tile_starts(9, 16, 4) == [0]
    for length in range(17, 90):
        found = tile_starts(length, 16, 4)
        assert found[0] == 0 and found[-1] == length - 16
        steps = [b - a for a, b in zip(found, found[1:], strict=False)]
        assert max(steps) <= 12 and max(steps) - min(steps) <= 1


def test_work_that_sees_one_pixel_is_the_same_in_pieces() -> None:
    x = torch.randn(2, 3, 22, 37)
    torch.testing.assert_close(decode_tiled(lambda piece, _: 2 * piece, x, 8, 2), 2 * x, rtol=0, atol=1e-6)
    small = decode_tiled(lambda piece, _: piece[..., ::2, ::2], x[..., :36], 5, 1, cell=2)
    torch.testing.assert_close(small, x[..., :36:2][..., ::2, :], rtol=0, atol=1e-6)
    assert decode_tiled(lambda piece, _: piece.repeat(1, 1, 2, 2), x, 8, 2, result_cell=2).shape == (2, 3, 44, 74)
    places = torch.arange(22.0)[:, None] * 100 + torch.arange(37.0)
    given = places.expand(2, 3, -1, -1)
    assert torch.allclose(decode_tiled(lambda _, place: given[(..., *place)], x, 8, 2), given, atol=1e-2)


@torch.no_grad()
def test_seams_are_smaller_than_diffusers(pipeline) -> None:
    """How far tiles are from the whole, decoded and encoded, at sizes that leave diffusers a narrow last tile."""
    theirs, model = pipeline[0].vae, checkpoints.load_model(pipeline[1])
    latents, picture = torch.randn(1, 4, 26, 37), torch.rand(1, 3, 52, 74) * 2 - 1
    noise = torch.zeros_like(latents)
    coder, whole = LatentCodec(model, 2, 32), LatentCodec(model, 2, 0)
    apart = {"keifu": [], "diffusers": []}
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 16, 32
    theirs.enable_tiling()
    try:
        expected = theirs.decode(latents / theirs.config.scaling_factor).sample
        coded = theirs.encode(picture).latent_dist.mean * theirs.config.scaling_factor
    finally:
        theirs.disable_tiling()
    for name, decoded, encoded in (
        ("keifu", coder.pictures(latents), coder.latents(picture, noise)), ("diffusers", expected, coded),
    ):  # fmt: skip
        apart[name] = [
            float((decoded - whole.pictures(latents)).square().mean()),
            float((encoded - whole.latents(picture, noise)).square().mean()),
        ]
    assert all(ours < other for ours, other in zip(*apart.values(), strict=True)), apart


def test_a_tile_as_large_as_the_picture_is_the_whole(pipeline) -> None:
    model = checkpoints.load_model(pipeline[1])
    latents = torch.randn(2, 4, 8, 12)
    assert torch.equal(LatentCodec(model, 2, 24).pictures(latents), LatentCodec(model, 2, 0).pictures(latents))


def test_half_precision_that_fails_goes_on_in_float32_and_says_so(pipeline, capsys) -> None:
    model = checkpoints.load_model(pipeline[1], torch.float16)
    with torch.no_grad():
        model.autoencoder.decoder.first.weight.mul_(2e4)  # sums beyond float16's numbers
    latents = torch.randn(1, 4, 8, 8) * 9
    assert LatentCodec(model, 2, 0).pictures(latents).isfinite().all()
    assert "not finite in float16: it goes on in float32" in capsys.readouterr().err
    assert model.autoencoder.decoder.first.weight.dtype == torch.float32
    LatentCodec(model, 2, 0).pictures(latents)
    assert capsys.readouterr().err == ""


def test_sides_of_tiles() -> None:
    assert tile_of(None, (1024, 1024), 8) == 0 and tile_of(None, (1024, 1032), 8) == 512
    assert tile_of(None, (4096, 4096), 1) == tile_of(0, (64, 64), 1) == 0
    with pytest.raises(UserError, match="draws pixels: leave --tile out"):
        tile_of(256, (64, 64), 1)
    assert tile_of(0, (4096, 4096), 8) == 0 and tile_of(256, (64, 64), 8) == 256
    for wrong, near in ((100, 96), (16, 32), (-8, 32)):
        with pytest.raises(UserError, match=f"not {wrong}: take {near}"):
            tile_of(wrong, (64, 64), 8)


def test_the_command_draws_in_tiles_and_again(pipeline, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["draw", str(pipeline[1]), "a cat", "--steps", "1", "--seed", "1", "--guidance", "1", "--size", "40x24"]
    for tile, name in (("16", "a.png"), ("0", "b.png")):
        cli.main([*words, "--tile", tile, "-o", name])
    tiles, whole = (np.asarray(Image.open(name)).astype(int) for name in ("a.png", "b.png"))
    assert tiles.shape == whole.shape == (24, 40, 3) and not np.array_equal(tiles, whole)
    cli.main(["draw", "--again", "a.png"])
    assert np.array_equal(np.asarray(Image.open("a-again.png")), tiles)
    capsys.readouterr()
