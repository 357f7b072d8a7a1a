"""The recipe for DALL-E: three parts in one run, pictures drawn from it and ranked, and the same bits again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.evaluation.images.text_to_image import best, cosines
from keifu.recipes.images import dalle as recipe
from keifu.recipes.running import run_jobs

PROMPTS = ("a small red disc", "a large blue bar")
TINY = {
    "size": 24, "codebook_size": 11, "vae_widths": (8, 12, 16), "code_dim": 6, "dim": 16, "hidden_dim": 24,
    "n_layers": 3, "n_heads": 2, "kernel": 3, "vae_steps": 3, "clip_steps": 1, "steps": 3, "vae_batch": 4,
    "clip_batch": 4, "batch_size": 4, "prompts": PROMPTS, "precision": "float32",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


@pytest.fixture(scope="module")
def wanted(drawings, towers) -> recipe.Recipe:
    return recipe.Recipe(str(drawings), clip=str(towers), **TINY)


@pytest.fixture(scope="module")
def trained(wanted, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dalle"
    run_jobs(recipe.jobs(wanted), out)
    return out


def test_the_run_is_read_again(trained, towers) -> None:
    model, tokenizer = checkpoints.load(trained)
    assert model.config.vae.grid == 6 and model.config.context_length == 16
    assert [model.config.pattern(layer) for layer in (1, 2, 3)] == ["row", "column", "convolution"]
    assert json.loads((trained / "config.json").read_text())["model_type"] == "keifu_dalle"
    coder = checkpoints.load_model(trained / "dvae")
    assert all(map(torch.equal, coder.parameters(), model.vae.parameters()))
    assert tokenizer.fingerprint == checkpoints.load(towers)[1].fingerprint
    page = (trained / "report.html").read_text()
    assert "Autoencoder: loss" in page and "parameters of the decoder" in page and page.count("data:image/png") >= 3


def test_it_draws_ranks_and_draws_again(trained, towers, tmp_path, capsys) -> None:
    out = tmp_path / "hearts.png"
    words = ["draw", str(trained), PROMPTS[0], "--seed", "5", "--batch-size", "3"]
    cli.parse([*words, "--count", "7", "-o", str(tmp_path / "all.png")])()
    cli.parse([*words, "--count", "2", "--best-of", "7", "--clip", str(towers), "-o", str(out)])()
    every = torch.stack([_pixels(tmp_path / f"all-{n}.png") for n in range(1, 8)])
    order = best(cosines(*checkpoints.load(towers), every, [PROMPTS[0]] * 7), 2)
    for place, number in enumerate(order, 1):
        assert torch.equal(_pixels(tmp_path / f"hearts-{place}.png"), every[number])
    for name in ("hearts.png", "hearts-2.png"):
        cli.parse(["draw", "--again", str(tmp_path / name)])()
    assert "bit for bit" in capsys.readouterr().err


def test_what_is_no_clip_is_told_before_it_draws(trained, drawings, capsys) -> None:
    for words in (
        ["draw", str(trained), "a disc", "--best-of", "2"],
        ["evaluate", str(trained), "--on", str(drawings)],
    ):
        with pytest.raises(UserError, match="does not see pictures and texts in one space"):
            cli.parse([*words, "--clip", str(trained)])()
    assert "Drawing" not in capsys.readouterr().err


def _pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_the_command_evaluates_it(trained, towers, drawings, capsys) -> None:
    words = ["evaluate", str(trained), "--on", str(drawings), "--clip", str(towers), "--metric", "clip-score"]
    cli.parse([*words, "--limit", "3", "--json"])()
    assert "CLIP score, captions shuffled" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--sampler", "euler", "--eta", "1"], "removes no noise, so sampler and eta mean nothing"),
        (["--guidance", "3"], "guidance mean nothing"),
        (["--size", "32"], r"size is \(32, 32\), and this model's is always \(24, 24\)"),
        (["--steps", "5"], "steps is 5, and this model's is always 36"),
        (["--label", "heart"], "knows no classes"),
        (["--best-of", "4"], "--best-of needs a CLIP"),
        (["--count", "3", "--best-of", "2", "--clip", "x"], "best of 2 pictures cannot be 3"),
        (["--clip", "x"], "--clip ranks pictures for --best-of"),
    ],
)
def test_what_cannot_be_drawn(more, told, trained) -> None:
    with pytest.raises(UserError, match=told):
        cli.parse(["draw", str(trained), "a disc", *more])()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"size": 22}, "nearest size that does is 24 x 24|nearest size that does is 20 x 20"),
        ({"n_heads": 3}, "dim 16 does not part into 3 heads"),
        ({"text_weight": 1.5}, "text_weight must be a number from 0 to 1"),
        ({"prompts": ()}, "no prompt for the samples"),
    ],
)
def test_what_cannot_be_learned(changed, told, wanted, tmp_path) -> None:
    with pytest.raises(UserError, match=told):
        run_jobs(recipe.jobs(replace(wanted, **changed)), tmp_path)
    assert not [*tmp_path.iterdir()]
