"""The recipe for unCLIP, on drawings of coloured shapes: losses fall, it resumes bit for bit, what it leaves draws."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_captions

from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.layers.attention.masks import real_tokens
from keifu.models.clip import text as clip_text
from keifu.recipes.images import clip, unclip
from keifu.recipes.running import run_jobs
from keifu.training.objectives.unclip import blur_images, embedding_moments, random_crops

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


@pytest.fixture(autouse=True, scope="module")
def _few_steps(own_cache: pytest.MonkeyPatch) -> None:
    own_cache.setattr(unclip, "STEPS", 2)


@pytest.fixture(scope="module")
def towers(own_cache, drawings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a CLIP whose text tower is as wide as its embeddings, and return its run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("clip")
    made = toy_captions.small_clip(drawings)
    text, image = clip_text.Config(600, 16, 16, 32, 1, 2, embedding_dim=16), replace(made.image, embedding_dim=16)
    run_jobs(clip.jobs(replace(made, text=text, image=image, training=replace(made.training, steps=5))), out)
    return out


def small(drawings: Path, towers: Path, **changes: Any) -> unclip.Recipe:
    made = unclip.Recipe(
        data=str(drawings), clip=str(towers), size=16, small=8, crop=8, prior_layers=1, prior_heads=2, head_dim=8,
        widths=(8, 16), attention=(1,), context_dim=16, upsampler_widths=(8, 16), noise_steps=50, steps=4, batch_size=6,
        prompts=("a red disc", "a blue bar"), precision="float32", learning_rate=3e-3,
    )  # fmt: skip
    return replace(made, **changes)


def test_it_learns_and_what_is_saved_draws(drawings, towers, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "run"
    run_jobs(unclip.jobs(small(drawings, towers, steps=12)), out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, since in {"prior": 1, "decoder": 0, "upsampler": 0}.items():  # a prior's first step leads away from 0
        found = [line[f"validation_{name}"] for line in lines if f"validation_{name}" in line]
        assert 0 < found[-1] < found[since]
    model, tokenizer = checkpoints.load(out)
    own = checkpoints.load_model(towers).state_dict()
    assert all(torch.equal(own[f"text.{name}"], tensor) for name, tensor in model.text.state_dict().items())
    pairs = zip(model.upsampler.parameters(), model.last_upsampler.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and not torch.equal(model.prior.std, torch.ones(1, 16))
    monkeypatch.chdir(tmp_path)
    picture = str(next(drawings.glob("*.png")))
    for words in (["a red disc"], ["--init", picture]):
        cli.main(["draw", str(out), *words, "--steps", "3", "--prior-steps", "3", "-o", "a.png"])
    diffusers = pytest.importorskip("diffusers")
    assert diffusers.PriorTransformer.from_pretrained(out, subfolder="prior").config.num_embeddings == 16
    assert diffusers.UNet2DModel.from_pretrained(out, subfolder="super_res_last").config.in_channels == 6
    assert len(sorted((out / "samples").glob("*.png"))) > 1 and tokenizer.vocab_size <= 600


def test_nothing_is_enlarged_where_the_sizes_are_the_same(drawings, towers, tmp_path) -> None:
    run_jobs(unclip.jobs(small(drawings, towers, small=16, steps=2)), tmp_path)
    config = checkpoints.load_model(tmp_path).config
    assert config.upsampler is None and config.size == (16, 16)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"attention": (3,)}, "attention names level 3"),
        ({"small": 9}, "9 x 9 does not fit this network"),
        ({"crop": 7}, "A size of 7 x 7 does not fit"),
        ({"prompts": ("a red disc " * 40,)}, "but the model reads 32"),
    ],
)
def test_what_is_refused_before_its_clip_is_trained(changed, told, drawings, towers, tmp_path) -> None:
    with pytest.raises(UserError, match=told):
        run_jobs(unclip.jobs(replace(small(drawings, towers, **changed), clip=None)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_refused(drawings, towers, tmp_path) -> None:
    with pytest.raises(UserError, match="text_dropout must be a number from 0 and below 1"):
        small(drawings, towers, text_dropout=1.0)
    with pytest.raises(UserError, match="must fit into --size 16"):
        small(drawings, towers, crop=17)
    with pytest.raises(UserError, match="attention names level 2"):
        run_jobs(unclip.jobs(small(drawings, towers, attention=(2,))), tmp_path)
    narrow = toy_captions.small_clip(drawings)
    run_jobs(clip.jobs(replace(narrow, training=replace(narrow.training, steps=4))), tmp_path / "clip")
    with pytest.raises(UserError, match="24 numbers per token and 16 in its space"):
        run_jobs(unclip.jobs(small(drawings, tmp_path / "clip")), tmp_path)


def test_what_the_losses_see() -> None:
    x = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6)
    cut = random_crops(x, torch.tensor([0, 2]), torch.tensor([3, 1]), 3)
    assert torch.equal(cut[0], x[0, :, 0:3, 3:6]) and torch.equal(cut[1], x[1, :, 2:5, 1:4])
    soft = blur_images(x, torch.tensor([0.0, 0.6]))
    assert torch.equal(soft[0], x[0]) and not torch.equal(soft[1], x[1])
    torch.testing.assert_close(blur_images(torch.ones(1, 1, 4, 4), torch.tensor([0.5])), torch.ones(1, 1, 4, 4))
    tokens = torch.tensor([[7, 3, 9, 9], [7, 1, 2, 9]])
    assert real_tokens(tokens, 9).tolist() == [[True, True, True, False], [True] * 4]
    mean, deviation = embedding_moments(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert mean.tolist() == [[2.0, 2.0]] and deviation[0, 0] == 2**0.5 and deviation[0, 1] > 0
