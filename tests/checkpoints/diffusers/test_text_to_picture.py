"""From a text to pictures, against diffusers' StableDiffusionPipeline: the latents of every step, and the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from keifu import checkpoints, cli
from keifu.data.tokenizers import bpe
from keifu.errors import UserError
from keifu.inference.images.latent_diffusion import LatentDiffusionPipeline
from keifu.inference.images.pixel_diffusion import ImageRequest

diffusers = pytest.importorskip("diffusers")
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "plms": ("PNDMScheduler", {}),
    "dpm++-2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}),
}
SEEDS, TEXTS, LONG = [3, 2**40], ["a red heart", "a blue cat"], "a red heart " * 40


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def painter(pipeline) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(*checkpoints.load(pipeline[1]))


@pytest.fixture
def reference(pipeline, monkeypatch: pytest.MonkeyPatch):
    """Draw with diffusers: the latents after every step, and the pictures from 0 to 1."""
    theirs = pipeline[0]
    theirs.set_progress_bar_config(disable=True)

    def draw(sampler: str, texts: list[str], **settings: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        kind, changed = SCHEDULERS[sampler]
        scheduler = getattr(diffusers, kind).from_config(theirs.scheduler.config, **changed)
        monkeypatch.setattr(theirs, "scheduler", scheduler)
        steps: list[torch.Tensor] = []

        def watch(pipeline: Any, step: int, timestep: Any, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            steps.append(found["latents"].clone())
            return found

        made = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(texts)]]
        drawn = theirs(texts, generator=made, output_type="pt", callback_on_step_end=watch, **settings)
        return steps, drawn.images

    return draw


@pytest.mark.parametrize(
    ("guidance", "sampler"),
    [*((6.5, name) for name in SCHEDULERS), (1.0, "ddim"),
     *(pytest.param(1.0, name, marks=pytest.mark.slow) for name in SCHEDULERS if name != "ddim")],
)  # fmt: skip
def test_each_step_and_the_pictures_are_diffusers(painter, reference, sampler: str, guidance: float) -> None:
    """Two texts in a batch, at a size that was not trained."""
    negative = "a cat" if guidance > 1 else ""
    steps, expected = reference(
        sampler, TEXTS, negative_prompt=[negative] * 2, guidance_scale=guidance, num_inference_steps=6, height=24,
        width=40,
    )  # fmt: skip
    wanted = ImageRequest(sampler, 6, size=(24, 40), guidance=guidance, text=TEXTS[0], negative=negative)
    states = [*painter.drawing(painter.resolved(wanted), SEEDS, TEXTS)]
    if sampler == "plms":  # whose first step diffusers counts as two
        steps = steps[1:]
    for state, latents in zip(states, steps, strict=True):
        assert (state.x - latents).abs().max() <= 1e-5 * latents.abs().max()
    drawn = (painter.decoded(states[-1].x, wanted) / 2 + 0.5).clamp(0, 1)
    assert drawn.shape == expected.shape == (2, 3, 24, 40) and expected.std() > 0.01
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", pytest.param("dpm++-2m", marks=pytest.mark.slow)])
def test_rescaled_guidance_is_that_of_diffusers_and_of_each_picture_alone(painter, reference, sampler: str) -> None:
    steps, expected = reference(
        sampler, TEXTS, guidance_scale=7.5, guidance_rescale=0.7, num_inference_steps=5, height=32, width=32
    )
    wanted = ImageRequest(sampler, 5, size=(32, 32), guidance=7.5, guidance_rescale=0.7, text=TEXTS[0])
    resolved = painter.resolved(wanted)
    states = [*painter.drawing(resolved, SEEDS, TEXTS)]
    for state, latents in zip(states, steps, strict=True):
        assert (state.x - latents).abs().max() <= 1e-5 * latents.abs().max()
    drawn = (painter.decoded(states[-1].x, wanted) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    for number in range(2):
        *_, alone = painter.drawing(resolved, SEEDS[number : number + 1], TEXTS[number : number + 1])
        together = states[-1].x[number]
        assert (alone.x[0] - together).abs().max() <= 1e-5 * together.abs().max()


def test_the_text_and_what_is_led_away_from_decide_the_picture(painter) -> None:
    wanted = painter.resolved(ImageRequest("ddim", 3, text="a red heart", guidance=5.0))
    others = [{"text": "a blue cat"}, {"negative": "a blue cat"}, {"guidance": 1.0}, {"guidance_rescale": 0.7}]
    drawn = [[*painter.drawing(ImageRequest(**vars(wanted) | each), [1])][-1].x for each in [{}, {}, *others]]
    assert torch.equal(drawn[0], drawn[1])
    assert all((drawn[0] - each).abs().max() > 1e-4 for each in drawn[2:])


def test_the_text_is_seen_once_a_picture_and_guidance_is_one_batch(painter, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    for name in ("encode_text", "project", "forward"):
        own = getattr(painter.model, name)
        monkeypatch.setattr(
            painter.model, name, lambda x, *more, own=own, name=name: seen.append((name, len(x))) or own(x, *more)
        )
    wanted = painter.resolved(ImageRequest("ddim", 3, text="a red heart", guidance=5.0))
    assert len([*painter.drawing(wanted, [1, 2])]) == 3
    assert seen == [("encode_text", 2), ("project", 4), *[("forward", 4)] * 3]


def test_a_text_that_is_too_long_is_refused_or_cut_as_diffusers_does(pipeline, painter, reference) -> None:
    length = len(painter.tokenizer.encode(LONG, special=True))
    with pytest.raises(UserError, match=f"has {length} tokens .* reads 77.*truncate"):
        painter.resolved(ImageRequest(text=LONG))
    with pytest.raises(UserError, match=f"has {length} tokens"):
        painter.resolved(ImageRequest(text="a red heart", negative=LONG, guidance=2.0))
    rows = pipeline[0].tokenizer([LONG, "a cat"], padding="max_length", max_length=77, truncation=True)
    assert painter.tokens([LONG, "a cat"], truncate=True).tolist() == rows.input_ids
    steps, _ = reference("ddim", [LONG], guidance_scale=3.0, num_inference_steps=2)
    wanted = painter.resolved(ImageRequest("ddim", 2, text=LONG, guidance=3.0, truncate=True))
    *_, last = painter.drawing(wanted, SEEDS[:1])
    assert (last.x - steps[-1]).abs().max() <= 1e-5 * steps[-1].abs().max()


def draw(capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    cli.main(["draw", *words])
    return capsys.readouterr().out.split()


def test_the_command_draws_and_draws_again(pipeline, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--steps", "2", "--seed", "4", "--size", "24x16", "--negative", "a cat", "-o", "a.png"]
    assert draw(capsys, str(pipeline[1]), "a red heart", *words) == ["a.png"]
    image: Any = Image.open("a.png")
    told = json.loads(image.text["keifu"])["drawing"]
    assert image.size == (24, 16) and "from 'a red heart'" in image.text["Description"]
    assert told["text"] == "a red heart" and told["negative"] == "a cat" and told["guidance"] == 7.5
    assert draw(capsys, "--again", "a.png") == ["a-again.png"]
    again: Any = Image.open("a-again.png")
    assert np.array_equal(np.asarray(image), np.asarray(again)) and again.text == image.text
    written = draw(capsys, str(pipeline[1]), "a red heart", "--steps", "2", "--count", "3", "--batch-size", "2",
                   "--guidance", "3", "--precision", "bfloat16", "-o", "many.png")  # fmt: skip
    assert len({np.asarray(Image.open(path)).tobytes() for path in written}) == 4
    assert draw(capsys, "--again", "many-3.png") == ["many-3-again.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is none: say what to draw"),
        (["a cat", "--label", "3"], "knows no classes"),
        (["a cat", "--negative", "a dog", "--guidance", "1"], "with a guidance of 1 there is none"),
        (["a cat", "--size", "17"], "nearest size that does is 16 x 16"),
        (["a cat", "--strip", "s.png"], "steps are latents"),
        ([LONG], "the model reads 77"),
    ],
)
def test_what_cannot_be_drawn_is_said(pipeline, words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        draw(capsys, str(pipeline[1]), *words)
    assert said in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(pipeline, tmp_path: Path, capsys) -> None:
    shutil.copytree(pipeline[1], tmp_path / "copy")
    words = ["one heart is as good as another", "two blue cats sleep under the table"] * 3
    bpe.learn(words, 540).save(tmp_path / "copy/tokenizer")
    with pytest.raises(SystemExit):
        draw(capsys, str(tmp_path / "copy"), "a cat")
    assert "The tokenizer has 540 tokens" in capsys.readouterr().err


def test_a_picture_of_an_older_keifu_is_still_drawn_again(tmp_path: Path) -> None:
    from keifu.inference.images.png_metadata import ImageRecord, read_record

    record = ImageRecord("runs/ddpm", "0", ImageRequest("ddim", 4, 5, size=(8, 8), spacing="leading"))
    told = json.loads(record.texts()["keifu"])
    for name in ("text", "negative", "truncate"):
        del told["drawing"][name]
    facts = PngInfo()
    facts.add_itxt("keifu", json.dumps(told))
    Image.new("RGB", (8, 8)).save(tmp_path / "old.png", pnginfo=facts)
    assert read_record(tmp_path / "old.png") == record
