"""The recipe for DDPM: pictures from folders to a pipeline that diffusers reads, and what it refuses."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from keifu import checkpoints
from keifu.errors import UserError
from keifu.inference.images.pixel_diffusion import PixelPipeline
from keifu.recipes.images import ddpm
from keifu.recipes.running import run_jobs
from keifu.training.objectives.diffusion import dequantize, draw_noise
from keifu.training.run import metrics

TINY = {"size": 8, "dim": 8, "multipliers": (1, 2), "attention": (1,), "batch_size": 4, "precision": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return two classes of 12 pictures each, red or blue in different strengths."""
    root = tmp_path_factory.mktemp("pictures")
    for place, name in enumerate(("red", "blue")):
        (root / name).mkdir()
        for number in range(12):
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[..., 2 * place] = 120 + 10 * number
            pixels[number % 8] = 255
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


@pytest.mark.parametrize("more", [{}, {"classes": True, "dequantise": True, "variance": "learned_range"}])
def test_from_pictures_to_a_pipeline(more, folders, own_cache, tmp_path, capsys):
    torch.set_num_threads(1)
    out = tmp_path / "run"
    recipe = ddpm.Recipe(str(folders), noise_steps=10, steps=3, **TINY, **more)
    summary = run_jobs(ddpm.jobs(recipe), out)
    assert summary.steps == 3 and summary.figures["validation_loss"] > 0
    samples = sorted(path.name for path in (out / "samples").glob("*.png"))
    assert samples[-1] == "step-00000003.png"
    model, _ = checkpoints.load(out)
    assert model.config.classes == (("blue", "red") if more else ()) and model.config.size == 8
    assert model.noise.schedule == "cosine" and model.noise.target == "velocity"
    assert ("add --classes to draw them by name" in capsys.readouterr().out) is not bool(more)
    if not more:
        with pytest.raises(UserError, match="learned no classes, so it has no 'red': train it with --classes"):
            PixelPipeline(model).label("red")
    diffusers = pytest.importorskip("diffusers")
    assert diffusers.DDPMPipeline.from_pretrained(out).scheduler.config.prediction_type == "v_prediction"
    again = run_jobs(ddpm.jobs(recipe), out, True)  # nothing is left to do, and everything is found again
    assert again.steps == 3
    assert torch.equal(checkpoints.load(out)[0].unet.first.weight, model.unet.first.weight)


def test_a_run_starts_from_a_trained_model_at_a_tenth_of_the_rate(folders, own_cache, tmp_path):
    torch.set_num_threads(1)
    recipe = ddpm.Recipe(str(folders), noise_steps=10, steps=6, classes=True, **TINY)
    run_jobs(ddpm.jobs(recipe), tmp_path / "first")
    first, _ = checkpoints.load(tmp_path / "first")
    later = replace(recipe, start_from=str(tmp_path / "first"), dim=64, size=None, steps=3)
    assert later.resolved().learning_rate == pytest.approx(1e-4) and ddpm.settings(later.resolved(), 3).keep_best
    task = ddpm.prepare(later.resolved())
    assert task.model.config == first.config  # its sizes, whatever the options say
    assert torch.equal(task.model.unet.first.weight, first.unet.first.weight)
    summary = run_jobs(ddpm.jobs(later), tmp_path / "later")
    losses = [line["validation_loss"] for line in metrics.read(tmp_path / "later") if "validation_loss" in line]
    assert summary.figures["validation_loss"] == min(losses) <= losses[0]
    with pytest.raises(UserError, match="knows the classes blue, red, and the pictures of .* have blue: take"):
        ddpm.prepare(replace(later, data=str(blue(tmp_path, folders))).resolved())


def blue(out, folders):
    """Return a folder with only one of the two classes."""
    shutil.copytree(folders / "blue", out / "one" / "blue")
    return out / "one"


def test_whose_settings():
    paper = ddpm.Recipe("emoji", recipe_of="paper").resolved()
    config = ddpm.network(paper, 3, ())
    published = ddpm.ddpm.SIZES["ddpm-cifar10"]
    assert replace(config, norm_eps=published.norm_eps) == published and paper.steps == 800_000
    chosen = ddpm.settings(paper, 800_000)
    assert (chosen.warmup, chosen.weight_decay, chosen.ema, chosen.schedule) == (5000, 0.0, 0.9999, "constant")
    digits = ddpm.Recipe("mnist").resolved()
    assert (digits.size, digits.flip, digits.minutes, digits.steps) == (28, False, 9.0, None)
    assert ddpm.Recipe("mnist", steps=7).resolved().minutes is None
    assert ddpm.Recipe("emoji").resolved().flip and ddpm.Recipe("mnist", recipe_of="paper").resolved().size == 32
    odd = ddpm.network(ddpm.Recipe("mnist", dim=24, multipliers=(1, 3)).resolved(), 1, ())
    assert odd.norm_groups == 2 and odd.attention == (1,) and ddpm.ddpm.build(odd)


def test_what_is_refused(folders, own_cache):
    for changed, told in (
        ({"size": 9}, "nearest size that does is 8 x 8"),
        ({"attention": (2,)}, "attention names level 2, but the levels are 0 to 1"),
    ):
        with pytest.raises(ValueError, match=told):
            ddpm.prepare(ddpm.Recipe(str(folders), **TINY | changed).resolved())
    with pytest.raises(UserError, match="--steps 3 and --minutes 2 are two budgets"):
        ddpm.Recipe(steps=3, minutes=2.0)
    flat = folders / "red"
    with pytest.raises(UserError, match="--classes needs labels"):
        ddpm.prepare(ddpm.Recipe(str(flat), classes=True, **TINY).resolved())


def test_grey_values_are_spread_over_their_own_256th():
    pictures = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).repeat(3, 50).view(3, 1, 10, 20)
    batch = {"pictures": pictures, "draws": draw_noise(1, 5, 3)}
    spread = (dequantize(batch)["pictures"] + 1) * 128 - pictures
    assert spread.min() > -1e-4 and spread.max() < 1 + 1e-4 and abs(float(spread.mean()) - 0.5) < 0.05
    part = dequantize({name: tensor[1:] for name, tensor in batch.items()})
    assert torch.equal(part["pictures"], dequantize(batch)["pictures"][1:])  # however a batch is split
