"""Held-out pictures found again in noise, and their bits: beside computations by hand, and through the command line."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keifu import checkpoints, cli
from keifu.data.images.dataset import ImageDataset
from keifu.errors import UserError
from keifu.evaluation.images import generative
from keifu.evaluation.images.distances import psnr, ssim
from keifu.evaluation.images.generative import bits, condition_labels, reconstruct
from keifu.layers.counter_rng import normal
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models.diffusion import ddpm
from keifu.training.objectives.diffusion import HELD_OUT, draw_noise

sys.path[:0] = [str(Path(__file__).parents[2] / "data")]
from pictures_toys import folder, picture  # noqa: E402

SIDE = 12


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def toys(count: int, classes: tuple[str, ...] = (), side: int = SIDE) -> ImageDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    labels = np.arange(count) % len(classes) if classes else np.full(count, -1)
    names = tuple(str(place) for place in range(count))
    return ImageDataset(
        "toys", pixels, np.arange(count), names, {}, labels, classes, *[np.arange(count)] * 2, ("",) * count, "f"
    )


class Knowing(ImageModel):
    """A network that says the same grey of every picture, or a class's own, at every noise level."""

    draws = "pixels"

    def __init__(self, noise: Noise, greys: tuple[float, ...] = (0.2,), classes: tuple[str, ...] = (), free=True):
        super().__init__()
        self.greys = nn.Parameter(torch.tensor(greys), requires_grad=False)  # its device is the model's
        n_classes = len(greys) if len(greys) > 1 else 0
        self.config = SimpleNamespace(
            size=SIDE, channels=3, n_classes=n_classes, null_class=free, classes=classes, noise=noise
        )

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        return self.greys[torch.zeros(len(x), dtype=int) if label is None else label][:, None, None, None].expand_as(x)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Accept any size."""


def test_psnr_is_its_definition_and_ssim_that_of_a_loop_over_windows() -> None:
    one, other = (torch.randint(0, 256, (2, 3, 14, 13), dtype=torch.uint8) for _ in range(2))
    x, y = one.numpy().astype(float), other.numpy().astype(float)
    expected = [10 * math.log10(255**2 / ((x[n] - y[n]) ** 2).mean()) for n in range(2)]
    assert psnr(one, other).tolist() == pytest.approx(expected, rel=1e-6)
    ramp = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(ramp, ramp) / ramp.sum() ** 2
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, np.empty((2, 3, 4, 3))
    for place in np.ndindex(found.shape):
        n, channel, row, column = place
        a, b = (z[n, channel, row : row + 11, column : column + 11] for z in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        both = (window * (a - mean_a) * (b - mean_b)).sum()
        found[place] = (2 * mean_a * mean_b + c1) * (2 * both + c2)
        found[place] /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    assert ssim(one, other).tolist() == pytest.approx(found.mean((1, 2, 3)).tolist(), rel=1e-5)
    assert ssim(one, one).tolist() == pytest.approx([1, 1]) and psnr(one, one).tolist() == [math.inf] * 2


def test_pictures_are_found_again_as_ddim_by_hand_finds_them() -> None:
    """With the velocity as target: from the level where at least a half is left, in strides of T / steps."""
    noise = Noise("cosine", 40, target="velocity", clip=None)
    pictures, seed, steps = toys(5), 3, 10
    figures, table = reconstruct(Knowing(noise), pictures, seed, 2, steps)
    clean = pictures.take(slice(None)).double().numpy() / 127.5 - 1
    # Batches of 2 from 0, 2 and 4 on, each picture's noise by its place among all.
    added = torch.cat([normal(draw_noise(seed, HELD_OUT, 1, n), (3, SIDE, SIDE)) for n in range(5)]).double().numpy()
    left = noise.alpha_bar.numpy()
    for row, (least, timestep) in enumerate([(0.9, 4), (0.5, 16), (0.1, 28)]):
        assert left[timestep] >= least > left[timestep + 4]
        noisy = x = math.sqrt(left[timestep]) * clean + math.sqrt(1 - left[timestep]) * added
        for t in range(timestep, -1, -4):
            alpha, sigma = math.sqrt(left[t]), math.sqrt(1 - left[t])
            below = left[t - 4] if t else 1.0
            seen, said = alpha * x - sigma * 0.2, alpha * 0.2 + sigma * x
            x = math.sqrt(below) * seen + math.sqrt(1 - below) * said
        grey = [((z + 1) * 127.5).round().clip(0, 255) for z in (noisy, x)]
        given = pictures.take(slice(None)).numpy().astype(float)
        decibels = [np.mean(10 * np.log10(255**2 / ((z - given) ** 2).mean((1, 2, 3)))) for z in grey]
        assert table.rows[row][:2] == (round(left[timestep], 3), timestep)
        assert table.rows[row][2:4] == pytest.approx(decibels, abs=0.02)
    assert list(figures.values()) == list(table.rows[1][2:]) and list(figures)[1:] == ["PSNR", "SSIM"]
    assert reconstruct(Knowing(noise), pictures, seed, 5, steps)[0] == figures  # however they are split
    assert "SSIM" not in reconstruct(Knowing(noise), toys(2, side=8), seed, 2, steps)[0]


def test_a_network_that_knows_the_picture_finds_it_in_any_noise() -> None:
    noise = Noise("cosine", 40, target="picture")
    pictures = replace(toys(3), pixels=np.full((3, SIDE, SIDE, 3), 153, np.uint8))
    figures, _ = reconstruct(Knowing(noise, (153 / 127.5 - 1,)), pictures, 0, 3)
    assert figures["PSNR"] == math.inf and figures["PSNR of the noisy picture"] < 15


@pytest.mark.parametrize("free", [True, False])
def test_bits_are_those_of_the_paper_where_they_can_be_written_down(free: bool) -> None:
    """A network that always sees one grey errs by what it was told, whatever the noise: equation 5 without chance."""
    noise, pictures = Noise("linear", 25, 1e-3, 0.4, target="picture"), toys(4, ("a", "b"))
    greys, names = (0.2, -0.4), ("b", "a")
    found = bits(Knowing(noise, greys, names, free), pictures, 0, 3)
    clean = pictures.take(slice(None)).double().numpy() / 127.5 - 1
    told = np.array([greys[names.index(("a", "b")[n % 2])] for n in range(4)])[:, None, None, None]
    beta = np.linspace(1e-3, 0.4, 25).astype(np.float32).astype(float)
    left = np.cumprod(1 - beta)
    before = np.append(1.0, left[:-1])
    small = beta * (1 - before) / (1 - left)  # both have this variance, so a step costs half the squared gap by it
    gap = (before[1:] ** 0.5 * beta[1:] / (1 - left[1:])) ** 2 / small[1:] / 2
    steps = gap.sum() * ((told - clean) ** 2).mean() / math.log(2)
    deviation = math.sqrt(small[1])
    cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
    upper = np.where(clean > 0.999, 1.0, cdf((clean + 1 / 255 - told) / deviation))
    lower = np.where(clean < -0.999, 0.0, cdf((clean - 1 / 255 - told) / deviation))
    decoder = -np.log2(np.maximum(upper - lower, 1e-12)).mean()
    prior = (0.5 * (left[-1] * clean**2 - left[-1] - np.log(1 - left[-1]))).mean() / math.log(2)
    assert found["bits/dim, steps"] == pytest.approx(steps, rel=1e-4)
    assert found["bits/dim, decoder"] == pytest.approx(decoder, rel=1e-3)  # float32's tail
    assert found["bits/dim, prior"] == pytest.approx(prior, abs=1e-4)
    assert found["bits/dim"] == pytest.approx(steps + decoder + prior, rel=1e-3)
    assert 0 < found["bits/dim, standard error"] < found["bits/dim"]
    assert "bits/dim, standard error" not in bits(Knowing(noise), toys(1), 0, 3)


def test_labels_are_told_by_their_names() -> None:
    noise, pictures = Noise(), toys(4, ("a", "b"))
    assert condition_labels(Knowing(noise), pictures) is None
    assert condition_labels(Knowing(noise, (0.1, 0.2), ("b", "a")), pictures).tolist() == [1, 0, 1, 0]
    assert condition_labels(Knowing(noise, (0.1, 0.2)), pictures).tolist() == [0, 1, 0, 1]
    assert condition_labels(Knowing(noise, (0.1, 0.2), ("b", "c")), pictures) is None
    with pytest.raises(UserError, match="is conditioned on classes, and those of toys"):
        condition_labels(Knowing(noise, (0.1, 0.2), ("b", "c"), free=False), pictures)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = ddpm.Config(
        size=SIDE, dim=8, multipliers=(1, 1), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4,
        noise=Noise("cosine", 20),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("ddpm")
    checkpoints.save(ddpm.build(config), None, path)
    return str(path)


def test_through_the_command_line(network: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    colours = {f"{n}.png": picture((n * 9 % 256, n * 31 % 256, n * 57 % 256), (14, 14)) for n in range(60)}
    words = ["evaluate", network, "--on", str(folder(tmp_path / "set", colours)), "--limit", "4"]
    told = {}
    for metric in ("reconstruction", "bits"):
        cli.main([*words, "--metric", metric, "--json"])
        told |= (given := json.loads(capsys.readouterr().out))
        assert "3 held-out pictures" in given["notes"][0] and "precision" not in given
    cli.main([*words, "--steps", "2", "--json"])
    every = json.loads(capsys.readouterr().out)
    assert {name: every[name] for name in told if name != "notes"} == {n: v for n, v in told.items() if n != "notes"}
    assert round(3 * every["precision"], 3) in (0, 1, 2, 3) and len(every["reconstruction"]) == len(generative.LEFT)
    assert told["PSNR"] > 0 and told["bits/dim"] > 0
    cli.main([*words, "--metric", "reconstruction"])
    assert "picture left in the noise" in capsys.readouterr().out
    for more, said in (
        (["--metric", "distance"], "no metric of a diffusion model 'distance'. Did you mean 'distances'?"),
        (["--beam", "2"], "--beam has no meaning here"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, *more])
        assert said in capsys.readouterr().err


def test_too_few_pictures_to_hold_any_out(network: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = str(folder(tmp_path / "few", {f"{n}.png": picture((n, 0, 9 * n), (12, 12)) for n in range(6)}))
    with pytest.raises(SystemExit):
        cli.main(["evaluate", network, "--on", few, "--metric", "bits"])
    assert "too few pictures" in capsys.readouterr().err
    cli.main(["evaluate", network, "--on", few, "--steps", "1", "--limit", "5"])
    assert "too few pictures" in capsys.readouterr().out


def test_the_standard_error_of_bits_is_that_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = torch.tensor([3.0, 5.0, 4.0, 8.0])
    known = generative.Bound(totals / 2, totals[:, None] / 4 * torch.ones(4, 2))
    monkeypatch.setattr(generative, "bound", lambda *_: known)
    found = generative.bits(Knowing(Noise("cosine", 2)), toys(4), 0, 4)
    # the mean is 5; deviations -2, 0, -1, 3; variance 14 / 3; divided by 4 pictures
    assert found["bits/dim"] == 5.0 and found["bits/dim, standard error"] == round(math.sqrt(14 / 3 / 4), 4)
