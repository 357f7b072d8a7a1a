"""Pictures by way of an embedding, against diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline, and the command:
texts, variations of a picture, ways from one to another."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.inference.images.image_to_image import read_input_image
from keifu.inference.images.pipeline import is_text_to_image, text_to_image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest, SeededNoise, require_diffusion_model
from keifu.inference.images.unclip import UnclipPipeline, slerp
from keifu.models.clip import image as clip_image
from keifu.models.hf.image_processor import Pixels
from keifu.models.unclip import unclip

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
SEEDS, TEXTS = [3, 2**40], ["a red heart", "a blue cat"]
STEPS = {"prior_steps": 4, "steps": 5, "upsampling_steps": 3}
SEES = clip_image.Config(16, 8, 3, 12, 20, 1, 2, embedding_dim=14)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def painter(unclip_pipeline) -> UnclipPipeline:
    return UnclipPipeline(*checkpoints.load(unclip_pipeline[1]))


@pytest.fixture(scope="module")
def seeing(unclip_pipeline, tmp_path_factory) -> tuple[Any, Path]:
    """Return a model that also reads pictures and has no upsampler, and its directory."""
    model, tokenizer = checkpoints.load(unclip_pipeline[1])
    config = replace(model.config, upsampler=None, last_upsampler=None, image=SEES, pixels=Pixels(16, 16))
    torch.manual_seed(2)
    made, folder = unclip.build(config).eval(), tmp_path_factory.mktemp("seeing")
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if name.startswith("image") else 0.3)
    checkpoints.save(made, tokenizer, folder)
    return made, folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("prior", "guidance"), [(1.0, 1.0), (4.0, 6.0)])
def test_texts_are_drawn_as_diffusers_draws_them(unclip_pipeline, painter, prior: float, guidance: float) -> None:
    """Embedding, small picture and large one of two texts in a batch, from the same noise."""
    theirs = unclip_pipeline[0]
    theirs.set_progress_bar_config(disable=True)
    for scheduler in (theirs.prior_scheduler, theirs.decoder_scheduler, theirs.super_res_scheduler):
        scheduler.betas = 1 - scheduler.alphas  # at timestep 0 its float32 makes 0.99974 of β / (1 - ᾱ), which is 1
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = theirs(
        TEXTS, generator=generators, prior_guidance_scale=prior, decoder_guidance_scale=guidance, output_type="np",
        prior_num_inference_steps=4, decoder_num_inference_steps=5, super_res_num_inference_steps=3,
    ).images  # fmt: skip
    wanted = painter.resolved(ImageRequest("ddpm", guidance=guidance, prior_guidance=prior, text=TEXTS[0], **STEPS))
    assert wanted.size == (16, 16) and wanted.prior_steps == 4
    random = SeededNoise(SEEDS)
    states = [*painter.drawing(wanted, SEEDS, TEXTS, random)]
    assert len(states) == 5 and states[-1].x.shape == (2, 3, 8, 8)
    drawn = (painter.upsample(states[-1].x, wanted, random) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert drawn.shape == expected.shape == (2, 16, 16, 3) and expected.std() > 0.05
    # The first step divides by √ᾱ = 5e-5, what the cosine leaves of a picture: of 1e-7 the bound lets 1e-4 through.
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=3e-4)
    assert np.abs(drawn - expected).mean() < 2e-5


def test_a_picture_is_varied_as_diffusers_varies_it(seeing, picture) -> None:
    model, folder = seeing
    ours = UnclipPipeline(*checkpoints.load(folder))
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder").eval()
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder / "feature_extractor")(
        Image.open(picture), return_tensors="pt"
    ).pixel_values  # fmt: skip
    with torch.no_grad():
        expected = encoder(pixels).image_embeds
    got = ours.encode_image(read_input_image(picture), 2)
    torch.testing.assert_close(got[1:], expected, rtol=1e-5, atol=1e-5)
    wanted = ours.resolved(ImageRequest("ddim", 3, 1, guidance=3.0, init=read_input_image(picture)))
    assert wanted.size == (8, 8) and wanted.upsampling_steps is None and wanted.strength is None
    drawn = ours.draw(wanted, [1, 2])
    assert drawn.shape == (2, 3, 8, 8) and not torch.equal(drawn[0], drawn[1])
    with pytest.raises(UserError, match="draws no pictures"):
        require_diffusion_model(model)


def test_a_way_from_one_to_another(seeing, picture) -> None:
    ours = UnclipPipeline(*checkpoints.load(seeing[1]))
    settings = {"guidance": 2.0, "prior_steps": 3, "count": 3}
    wanted = ours.resolved(ImageRequest("ddim", 6, 5, text="a red heart", towards="a blue cat", **settings))
    seeds = [5, 6, 7]
    ends = [ours.sample_embeddings([text], wanted, SeededNoise([5])) for text in ("a red heart", "a blue cat")]
    found = ours.embeddings(wanted, seeds, ["a red heart"] * 3, SeededNoise([5] * 3))
    torch.testing.assert_close(found[[0, 2]], torch.cat(ends), rtol=1e-4, atol=1e-5)
    between = torch.nn.functional.cosine_similarity(found[1:2], torch.cat(ends))
    assert (between[0] - between[1]).abs() < 1e-4 and between[0] > torch.cosine_similarity(*ends)
    drawn = ours.draw(wanted, seeds)
    assert len({each.numpy().tobytes() for each in drawn}) == 3
    same = replace(wanted, towards="a red heart")  # nothing changes but the embedding
    assert len({each.numpy().tobytes() for each in ours.draw(same, seeds)}) == 1
    seen = ours.resolved(
        ImageRequest("ddim", 2, 5, init=read_input_image(picture), towards=read_input_image(picture), **settings)
    )
    assert ours.draw(seen, seeds).shape == (3, 3, 8, 8)


def test_an_arc_keeps_its_ends_and_its_lengths() -> None:
    a, b = torch.tensor([[2.0, 0.0]] * 3), torch.tensor([[0.0, 4.0]] * 3)
    way = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(way, torch.tensor([[2.0, 0.0], [3 * 0.5**0.5] * 2, [0.0, 4.0]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.0, 0.3, 1.0])), a)


def test_the_nearest_of_several_embeddings_is_taken(painter) -> None:
    few = painter.resolved(ImageRequest("ddpm", 2, 1, text="a red heart", prior_steps=3))
    random = SeededNoise([1])
    first, second = (painter.sample_embeddings(["a red heart"], few, random) for _ in range(2))
    best = painter.sample_embeddings(["a red heart"], replace(few, candidates=2), SeededNoise([1]))
    said = painter._caption(["a red heart"], False).embedding
    near = [float(torch.cosine_similarity(each, said)) for each in (first, second)]
    assert torch.equal(best, (first, second)[near[1] > near[0]]) and not torch.equal(first, second)


def draw(capsys: pytest.CaptureFixture, *words: object) -> list[str]:
    cli.main(["draw", *map(str, words)])
    return capsys.readouterr().out.split()


def test_the_command_draws_varies_and_draws_again(unclip_pipeline, seeing, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = "--steps", 2, "--seed", 4, "--prior-steps", 2
    assert draw(capsys, unclip_pipeline[1], "a red heart", *few, "--size", 24, "-o", "a.png") == ["a.png"]
    image: Any = Image.open("a.png")
    told = json.loads(image.text["keifu"])["drawing"]
    assert image.size == (24, 24) and told["prior_guidance"] == 4 and told["guidance"] == 8
    assert told["upsampling_steps"] == 7 and told["prior_steps"] == 2
    folder = seeing[1]
    draw(capsys, folder, "--init", picture, *few, "--precision", "bfloat16", "-o", "b.png")
    draw(capsys, folder, "--init", picture, "--towards", picture, "--count", 3, *few, "--batch-size", 2, "-o", "c.png")
    draw(capsys, folder, "a cat", "--towards", "a heart", "--count", 2, *few, "--strip", "s.png", "-o", "d.png")
    for path in ("a.png", "b.png", "c.png", "c-3.png", "d-2.png"):
        again = draw(capsys, "--again", path)[0]
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(again)))
    there = tmp_path / "there.png"
    there.write_bytes(picture.read_bytes())
    draw(capsys, folder, "--init", picture, "--towards", there, "--count", 2, *few, "-o", "e.png")
    there.rename(tmp_path / "moved.png")
    with pytest.raises(SystemExit):
        draw(capsys, "--again", "e.png")
    assert "with --towards" in capsys.readouterr().err
    draw(capsys, "--again", "e.png", "--towards", "moved.png")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "neither a text nor a picture"),
        (["--init", "P"], "no image_encoder"),
        (["a cat", "--label", "3"], "knows no classes"),
        (["a cat", "--tile", "64"], "leave --tile out"),
        (["a cat", "--towards", "a dog"], "give a --count"),
        (["a cat", "--towards", "a dog", "--init", "P", "--count", "2"], "There is no picture a dog"),
        (["a cat", "--negative", "a dog", "--guidance", "1"], "with a guidance of 1 there is none"),
        (["a cat", "--size", "18"], "nearest size that does is 8 x 8"),
        (["a cat", "--candidates", "0"], "--candidates must be a whole number from 1"),
        (["a cat", "--prior-steps", "0"], "--prior-steps must be a whole number from 1"),
        (["a red heart " * 9], "the model reads 12"),
    ],
)
def test_what_cannot_be_drawn_is_said(unclip_pipeline, picture, words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        draw(capsys, unclip_pipeline[1], *(str(picture) if word == "P" else word for word in words))
    assert said in capsys.readouterr().err


def test_models_of_other_kinds_refuse_what_is_of_embeddings(pipeline, unclip_pipeline, capsys) -> None:
    with pytest.raises(SystemExit):
        draw(capsys, pipeline[1], "a cat", "--prior-steps", 3)
    assert "--prior-steps is for a model that draws by way of an embedding" in capsys.readouterr().err
    model, tokenizer = checkpoints.load(unclip_pipeline[1])
    assert is_text_to_image(model) and text_to_image_pipeline(model, tokenizer).colours == 3
    varying = unclip.build(replace(model.config, prior=None))
    assert not is_text_to_image(varying)
    with pytest.raises(UserError, match="has no prior"):
        UnclipPipeline(varying, tokenizer).resolved(ImageRequest(text="a cat"))
