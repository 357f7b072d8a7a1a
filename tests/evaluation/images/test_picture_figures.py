"""The evaluation of a model that draws, on a tiny network and tiny pictures, through the command line."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from keifu import checkpoints, cli
from keifu.data.images.dataset import ImageDataset
from keifu.errors import UserError
from keifu.evaluation.images import generative as module
from keifu.evaluation.images.features import extractor
from keifu.evaluation.images.generative import compare_images, evaluate, side_by_side
from keifu.evaluation.registry import EvalRequest
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models.diffusion import ddpm

sys.path.insert(0, str(Path(__file__).parents[2] / "data"))
from pictures_toys import folder, picture  # noqa: E402

SIZE = 8


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def toys(count: int, seed: int) -> ImageDataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    names = tuple(f"{seed}-{place}" for place in range(count))
    rows, none = np.arange(count), np.full(count, -1)
    return ImageDataset("toys", pixels, rows, names, {}, none, (), rows, rows, ("",) * count, "f")


def test_copies_are_found_out() -> None:
    real, held = toys(60, 0), toys(20, 1)
    copies = real.take(np.arange(30))
    near, figures = compare_images(extractor(), copies, real, held)
    assert near.by_pixels.tolist() == near.by_features.tolist() == list(range(30)) and near.differences.max() == 0
    assert figures["share nearer than 99% of held-out pictures"] == 1
    assert figures["median difference to the nearest real picture"] == 0
    assert figures["precision"] == 1 and figures["median difference of held-out pictures"] > 50
    _, figures = compare_images(extractor(), toys(30, 2).take(slice(None)), real, held)
    assert figures["share nearer than 99% of held-out pictures"] <= 0.1


def test_worse_pictures_have_larger_distances() -> None:
    real = toys(60, 0)
    noise = toys(40, 3).take(slice(None))
    _, good = compare_images(extractor(), noise, real, None)
    _, flat = compare_images(extractor(), torch.full_like(noise, 90), real, None)
    for name in ("Fréchet distance", "kernel distance x 1000"):
        assert flat[name] > 3 * abs(good[name])
    assert flat["precision"] == 0 and not [name for name in flat if "held-out" in name]


def test_the_sheet_shows_each_beside_its_nearest() -> None:
    real = toys(10, 0)
    drawn = real.take([7, 2])
    near, _ = compare_images(extractor(), torch.cat([drawn, drawn]), real, None)
    image = np.asarray(Image.open(io.BytesIO(side_by_side(drawn, real, near, 5))))
    scale = 9  # 72 / 8: small pictures with captions are enlarged
    cells = [image[4:76:scale, 4 + place * 76 : 76 + place * 76 : scale] for place in range(6)]
    for place, cell in enumerate(cells):
        assert np.array_equal(cell, drawn[place // 3].permute(1, 2, 0).numpy())


class Remembering(ImageModel):
    """A network that knows one picture for each class, and says so at every noise level."""

    draws = "pixels"

    def __init__(self, pictures: Tensor, free: bool):
        super().__init__()
        self.pictures = nn.Parameter(pictures)
        noise, n_classes = Noise(target="picture"), len(pictures)
        sizes = {"size": SIZE, "channels": 3, "n_classes": n_classes, "null_class": free, "classes": ()}
        self.config = SimpleNamespace(**sizes, noise=noise)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        return self.pictures[0].expand_as(x) if label is None else self.pictures[label]

    def check_size(self, channels: int, height: int, width: int) -> None:
        assert (channels, height, width) == (3, SIZE, SIZE)


@pytest.mark.parametrize("free", [True, False])
def test_a_model_that_must_be_told_a_class_draws_them_in_turn(free: bool, monkeypatch) -> None:
    real = toys(40, 0)
    monkeypatch.setattr(module, "read_images", lambda source, size, channels: real)
    known = real.take([4, 9]).float() / 127.5 - 1
    found = evaluate(Remembering(known, free), None, EvalRequest("mnist", limit=6, steps=3, batch_size=2, seed=11))
    assert [row[0] for row in found.items.rows] == list(range(11, 17))
    nearest = [row[1] for row in found.items.rows]
    assert len(set(nearest)) == (1 if free else 2) and nearest[0] == nearest[2] != (None if free else nearest[1])
    assert "6 pictures by ddim in 3 steps, seeds 11 and on, next to" in found.notes[0]
    assert "no FID and KID as papers print them" in found.notes[2]


class Brightness(nn.Module):
    """A classifier that calls dark rows "dark" and all others "bright"; `classes` in an order of its own."""

    config = SimpleNamespace(dim=3 * SIZE * SIZE)
    classes = ("bright", "dark")

    def predict_proba(self, x: Tensor) -> Tensor:
        bright = x.mean(1)
        return torch.stack([bright, 1 - bright], 1)


@pytest.mark.parametrize(("greys", "share"), [((-0.9, 0.9), 1.0), ((0.9, 0.9), 0.4), ((0.9, -0.9), 0.0)])
@pytest.mark.parametrize("free", [True, False])
def test_a_classifier_tells_what_was_drawn_of_a_class(greys: tuple, share: float, free: bool, monkeypatch) -> None:
    model = Remembering(torch.tensor(greys)[:, None, None, None].expand(-1, 3, SIZE, SIZE).clone(), free)
    model.config.classes = ("dark", "bright")
    wanted = EvalRequest("mnist", limit=5, steps=2, batch_size=2, metric="classes", judge=Brightness())
    monkeypatch.setattr(module, "read_images", lambda source, size, channels: toys(40, 0))
    found = evaluate(model, None, wanted)
    assert (found.figures["asked class seen"], found.figures["pictures"]) == (share, 5)
    assert {"asked class seen, 95% interval", "kernel distance x 1000", "precision", "recall"} <= found.figures.keys()
    assert [row[:2] for row in found.items.rows] == list(enumerate(["dark", "bright", "dark", "bright", "dark"]))
    assert sum(row[1] == row[2] for row in found.items.rows) == round(5 * share)
    assert "5 pictures by ddim in 2 steps, guidance 1, seeds 0" in found.notes[0]
    for other in (replace(wanted, judge=None), replace(wanted, judge=nn.Linear(1, 1))):
        with pytest.raises(UserError, match="--judge"):
            evaluate(model, None, other)
    for other in (replace(wanted, metric=None), EvalRequest("mnist", metric="distances", guidance=2.0)):
        with pytest.raises(UserError, match="are for the metric classes alone"):
            evaluate(model, None, other)
    model.config.classes = ("dark", "grey")
    with pytest.raises(UserError, match="of the classes bright, dark"):
        evaluate(model, None, wanted)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    noise = Noise(steps=60)  # the bound is a sum over all of them
    sizes = {"size": SIZE, "dim": 8, "multipliers": (1, 1), "n_residual_blocks": 1, "attention": ()}
    config = ddpm.Config(**sizes, norm_groups=4, middle_groups=4, noise=noise)
    path = tmp_path_factory.mktemp("ddpm")
    checkpoints.save(ddpm.build(config), None, path)
    return str(path)


def test_through_the_command_line(network: str, tmp_path: Path, capsys) -> None:
    colours = {f"{n}.png": picture((n * 9 % 256, n * 31 % 256, n * 57 % 256), (10, 10)) for n in range(40)}
    source = str(folder(tmp_path / "set", colours))
    words = ["evaluate", network, "--on", source, "--limit", "6", "--steps", "2", "--json"]
    cli.main([*words, "--output", str(tmp_path / "sheet.png")])
    told = json.loads(capsys.readouterr().out)
    asked = EvalRequest(source, limit=6, steps=2)
    figures = evaluate(checkpoints.load(network)[0], None, asked).figures
    assert figures and {name: told[name] for name in figures} == pytest.approx(figures)
    assert Image.open(tmp_path / "sheet.png").width > 500
    cli.main([*words, "--output", str(tmp_path / "rows.tsv")])
    header, *rows = (tmp_path / "rows.tsv").read_text().splitlines()
    assert header.split("\t") == ["seed", "nearest by pixels", "difference", "nearest by features"] and len(rows) == 6
    assert json.loads(capsys.readouterr().out) == told  # the same seeds, the same pictures
    cli.main([*words, "--metric", "bits", "--output", str(tmp_path / "bits.tsv")])
    assert "bits.tsv: this has no items" in json.loads(capsys.readouterr().out)["notes"][-1]


def test_what_a_run_held_out_is_not_what_its_drawings_are_compared_with(network: str, tmp_path: Path, capsys) -> None:
    colours = {f"{n}.png": picture((n * 9 % 256, n * 31 % 256, n * 57 % 256), (10, 10)) for n in range(40)}
    source, run = str(folder(tmp_path / "set", colours)), shutil.copytree(network, tmp_path / "run")
    words = ["evaluate", str(run), "--on", source, "--metric", "distances", "--limit", "6", "--steps", "2", "--json"]
    for share, learned in ((0.05, 36), (0.25, 20)):
        (run / "recipe.json").write_text(json.dumps({"held_out": {"share": share, "distinct": False}}))
        cli.main(words)
        assert f"next to {learned} of" in json.loads(capsys.readouterr().out)["notes"][0]


def test_refusals(network: str, tmp_path: Path) -> None:
    from keifu.checkpoints import load

    model, _ = load(network)
    with pytest.raises(UserError, match="There is no folder of pictures"):
        evaluate(model, None, EvalRequest("nowhere"))
    with pytest.raises(UserError, match="sampler"):
        evaluate(model, None, EvalRequest(str(folder(tmp_path / "s", {"a.png": picture("red")})), sampler="ddin"))
