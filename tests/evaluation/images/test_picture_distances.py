"""Distances between sets of pictures and between two pictures, against SciPy, scikit-image and plain loops."""

import numpy as np
import pytest
import torch

from keifu.errors import UserError
from keifu.evaluation.images.distances import (
    discrepancy,
    frechet,
    kernel_distance,
    manifold,
    nearest,
    psnr,
    ssim,
)
from keifu.evaluation.images.features import RandomFeatures, extractor


def rows(count: int, dim: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9))
    return scale * torch.randn(count, dim, generator=generator) @ mix + shift


@pytest.mark.parametrize(("count", "dim"), [(200, 5), (40, 30), (10, 30)])
def test_frechet_against_scipy(count: int, dim: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    real, drawn = rows(300, dim), rows(count, dim, 1, 1.3, 0.2)
    one, other = (np.cov(part.double().numpy().T) for part in (real, drawn))
    apart = float((real.double().mean(0) - drawn.double().mean(0)).square().sum())
    expected = apart + np.trace(one + other - 2 * np.real(linalg.sqrtm(one @ other)))
    assert frechet(real, drawn) == pytest.approx(expected, rel=1e-5) == pytest.approx(frechet(drawn, real), rel=1e-5)


def test_frechet_of_normal_distributions_that_are_known() -> None:
    centred = rows(50, 3).double() - rows(50, 3).double().mean(0)
    one = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T.cov())).T  # mean 0, and the identity as covariance
    assert frechet(one, 2 * one + 1) == pytest.approx(3 + 3 * (1 - 2) ** 2)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="1 pictures have no covariance"):
        frechet(rows(1, 4), rows(5, 4))


def test_discrepancy_as_its_formula_has_it() -> None:
    real, drawn = rows(7, 3).double(), rows(5, 3, 1, shift=0.5).double()
    k = lambda x, y: float((x @ y / 3 + 1) ** 3)  # noqa: E731
    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (real, drawn)]
    expected = sum(within) - 2 * np.mean([k(x, y) for x in real for y in drawn])
    assert discrepancy(real.float(), drawn.float()) == pytest.approx(expected, rel=1e-5)


def test_the_kernel_distance_is_unbiased_and_repeatable() -> None:
    same = [kernel_distance(rows(200, 6, seed) / 4, rows(200, 6, seed + 50) / 4, 8, 50).mean for seed in range(8)]
    spread = float(np.std(same)) / 8**0.5
    assert abs(float(np.mean(same))) < 3.5 * spread
    apart = kernel_distance(rows(200, 6) / 4, rows(200, 6, 1, shift=1.0) / 4, 8, 50)
    assert apart.mean > 5 * float(np.std(same)) and apart.deviation > 0 and apart.size == 50
    assert apart == kernel_distance(rows(200, 6) / 4, rows(200, 6, 1, shift=1.0) / 4, 8, 50)
    assert kernel_distance(rows(20, 3), rows(11, 3), 5).size == 5  # never nearly all of the smaller set
    with pytest.raises(UserError, match="needs 4 pictures on each side, not 3 and 50"):
        kernel_distance(rows(3, 2), rows(50, 2))


def test_precision_and_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(400, 2, generator=generator)
    half = torch.rand(400, 2, generator=generator) * torch.tensor([0.5, 1.0])  # the left half alone
    found = manifold(real, half)
    assert manifold(half, real)[::-1] == found
    assert manifold(real, real + 5) == (0.0, 0.0) and manifold(real, real) == (1.0, 1.0)
    with pytest.raises(UserError, match="more than 3 pictures"):
        manifold(real[:3], real)


def test_nearest_finds_copies_exactly(monkeypatch) -> None:
    monkeypatch.setattr("keifu.evaluation.images.distances.PART", 7)
    among = torch.randint(0, 256, (30, 50), dtype=torch.uint8)
    asked = among[[3, 29, 11]].clone()
    asked[2, 0] ^= 4
    distances, places = nearest(asked, among)
    assert distances.tolist() == [0, 0, 4] and places.tolist() == [3, 29, 11]
    everything = torch.cdist(asked.double(), among.double())
    assert torch.equal(everything.argmin(1), places)
    with pytest.raises(UserError, match="no picture to search"):
        nearest(asked, among[:0])


@pytest.mark.parametrize(("channels", "shape"), [(1, (11, 11)), (3, (16, 23)), (3, (40, 31))])
def test_psnr_and_ssim_against_scikit_image(channels: int, shape: tuple[int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(2)
    one = torch.randint(0, 256, (3, channels, *shape), dtype=torch.uint8, generator=generator)
    noise = torch.randint(-60, 60, one.shape, generator=generator)
    other = (one.int() + noise).clamp(0, 255).byte()
    options = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for place in range(3):
        pair = one[place].numpy(), other[place].numpy()
        expected = metrics.structural_similarity(*pair, data_range=255, **options)
        assert float(ssim(one, other)[place]) == pytest.approx(expected, abs=1e-6)
        expected = metrics.peak_signal_noise_ratio(*pair, data_range=255)
        assert float(psnr(one, other)[place]) == pytest.approx(expected, rel=1e-6)


def test_equal_pictures_and_unequal_sizes() -> None:
    one = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    assert psnr(one, one).tolist() == [torch.inf] * 2 and ssim(one, one).tolist() == [1, 1]
    black = torch.zeros(1, 1, 12, 12, dtype=torch.uint8)  # 10 log10(255² / 5²), and C1 / (255² + C1)
    assert float(psnr(black, black + 5)) == pytest.approx(34.1514, abs=1e-4)
    assert float(ssim(black, black + 255)) == pytest.approx(1e-4 / 1.0001, rel=1e-6)
    with pytest.raises(UserError, match="at least 11 x 11 pixels"):
        ssim(one[..., :9], one[..., :9])


def test_features_are_the_same_every_time_for_every_picture(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    seen, again = extractor(), extractor()
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    features = seen(pictures)
    assert seen.name == again.name == "random convolutions, seed 0, 320 features" and seen.titles[0] != "FID"
    assert torch.equal(again(pictures), features) and features.shape == (5, 320)
    monkeypatch.setattr("keifu.evaluation.images.features.BATCH", 2)
    assert torch.allclose(seen(pictures), features, atol=1e-5)
    assert seen(pictures[:, :1]).shape == (5, 320)
    assert RandomFeatures()(torch.zeros(1, 3, 1, 1)).shape == (1, 320)  # as small as pictures can be
    scale = [float(part.mean()) for part in features.split([32, 64, 96, 128], 1)]
    assert all(0.1 < each < 1.0 for each in scale)  # no stage outweighs the others
