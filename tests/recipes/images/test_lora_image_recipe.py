"""The recipe for LoRAs of models that draw: what it leaves is what diffusers loads, and the model stays as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_captions
from PIL import Image
from safetensors.torch import load_file

from keifu import checkpoints, cli
from keifu.checkpoints.lora.diffusion import FILE, apply_lora
from keifu.errors import UserError
from keifu.inference.images.pipeline import image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.inference.images.png_metadata import read_record
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.lora import adapters
from keifu.models.diffusion import latent_diffusion
from keifu.recipes.images import lora_image as recipe
from keifu.recipes.running import run_jobs

QUICK = {"steps": 4, "batch_size": 3, "limit": 7, "rank": 3, "learning_rate": 0.03, "guidance": 2.0,
         "precision": "float32"}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


@pytest.fixture(autouse=True, scope="module")
def _few_steps(own_cache: pytest.MonkeyPatch) -> None:
    own_cache.setattr(recipe, "STEPS", 2)


@pytest.fixture(scope="module")
def model(own_cache, drawings, tmp_path_factory) -> Path:
    """Return a pipeline of 16 x 16 pixels with random weights, none zero, and a tokenizer of these captions."""
    noise = Noise("cosine", target="velocity", clip=None, spacing="trailing", steps_offset=1)
    return toy_captions.small_pipeline(drawings, tmp_path_factory.mktemp("pipeline"), noise, spread=0.05)


def wanted(drawings: Path, model: Path, **changes: object) -> recipe.Recipe:
    return recipe.Recipe(**{"model": str(model), "data": str(drawings), **QUICK, **changes})


@pytest.fixture(scope="module")
def learned(drawings, model, tmp_path_factory) -> Path:
    """Return a run whose large rate changes what the model draws."""
    run = tmp_path_factory.mktemp("learned")
    run_jobs(recipe.jobs(wanted(drawings, model, learning_rate=0.3)), run)
    return run


def test_diffusers_draws_with_what_was_learned(drawings, model, tmp_path, capsys) -> None:
    diffusers = pytest.importorskip("diffusers")
    before = {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()}
    made = wanted(drawings, model, text_rank=2, words="flat", targets=("to_q", "to_out.0"))
    summary = run_jobs(recipe.jobs(made), tmp_path)
    assert before == {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()}
    assert "Learning from 7 pictures" in capsys.readouterr().out
    names = load_file(tmp_path / FILE)
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"}
    assert not any("to_k" in name for name in names) and all(torch.isfinite(each).all() for each in names.values())

    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held = [line["validation_loss"] for line in losses if "validation_loss" in line]
    assert summary.figures["validation_loss"] == held[-1] < held[0]

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)

    def by_diffusers():
        seed = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": seed, "output_type": "pt"}
        return theirs("flat a red disc", **options).images

    plain = by_diffusers()
    theirs.load_lora_weights(tmp_path)
    changed, tokenizer = checkpoints.load(model)
    painter = image_pipeline(apply_lora(changed, tmp_path / FILE), lambda: tokenizer)
    drawn = painter.draw(painter.resolved(ImageRequest("ddim", 3, 1, text="flat a red disc", guidance=2.0)), [1])
    assert (drawn / 255 - by_diffusers()).abs().max() <= 1 / 255 + 1e-4
    assert (drawn / 255 - plain).abs().max() > 0.02


def test_a_run_is_a_lora_for_keifu_draw(learned, model, tmp_path) -> None:
    def draw(name: str, *more: str) -> None:
        cli.main(["draw", str(model), "a disc", "--steps", "1", "--seed", "1", "-o", str(tmp_path / name), *more])

    for name, lora in {"run": str(learned), "file": f"{learned / FILE}:1"}.items():
        draw(f"{name}.png", "--lora", lora)
    draw("without.png")
    folder, file, without = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("run", "file", "without"))
    assert folder == file != without
    assert read_record(tmp_path / "without.png").drawing.sampler == "dpm++-2m"  # the usual one for a text


def test_evaluate_measures_a_model_with_its_lora(drawings, learned, model, tmp_path, capsys) -> None:
    def told(*more: str) -> dict[str, float]:
        capsys.readouterr()
        cli.main(["evaluate", str(model), "--on", str(drawings), "--limit", "4", "--steps", "2", "--json", *more])
        return json.loads(capsys.readouterr().out)

    plain = told()
    assert told("--lora", f"{learned}:0") == plain
    assert told("--lora", str(learned)) != plain
    with pytest.raises(SystemExit):
        told("--lora", str(tmp_path / "nowhere"))
    assert "There is no LoRA" in capsys.readouterr().err


def test_pictures_without_captions_are_called_by_the_words(drawings, model, tmp_path) -> None:
    for path in drawings.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="have no captions: say what they show .--words."):
        recipe.prepare(wanted(tmp_path, model))
    task = recipe.prepare(wanted(tmp_path, model, words="a shape", limit=None))
    assert {*task.parts.train.texts()} == {"a shape"} and {*task.prompts} == {"a shape"}
    assert len({tuple(row) for row in task.data.batch(0)["tokens"].tolist()}) == 1


def test_captions_that_are_cut_can_be_the_prompts_of_the_samples(drawings, model, tmp_path) -> None:
    run_jobs(recipe.jobs(wanted(drawings, model, words="word " * 20, truncate=True, steps=1)), tmp_path)
    assert len([*(tmp_path / "samples").glob("*.png")]) == 2


def test_a_set_that_is_all_for_testing_is_split_for_the_lora(drawings, model, tmp_path) -> None:
    (tmp_path / "test").mkdir()
    for path in drawings.glob("*.png"):
        (tmp_path / "test" / path.name).write_bytes(path.read_bytes())
    parts = recipe.prepare(wanted(tmp_path, model, words="a shape")).parts
    assert len(parts.train) == 7 and len(parts.validation) and not {*parts.train.names} & {*parts.validation.names}


def test_alpha_scales_what_every_adapter_says(drawings, model) -> None:
    task = recipe.prepare(wanted(drawings, model, alpha=6.0, text_rank=2))
    assert {(each.low.rank, each.low.scale) for each in adapters(task.model)} == {(3, 2.0), (2, 3.0)}
    trained = {name.rpartition(".")[2] for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained == {"a", "b"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"targets": ("to_que",)}, "no layer 'to_que'.*to_q"),
        ({"targets": ("to_out",)}, "no layer 'to_out'.*to_out.0"),
        ({"text_rank": 2, "text_targets": ("q_prjo",)}, "no layer 'q_prjo'.*q_proj"),
        ({"size": 15}, "nearest size that does is 16 x 16"),
        ({"languages": ("fr",)}, "'fr'.*Known: en, ja"),
        ({"words": "word " * 20}, "tokens with its special tokens, but the model reads 16"),
        ({"dora": True, "style": "diffusers"}, "no word for DoRA's lengths"),
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"limit": 0}, "limit must be a whole number from 1 to"),
        ({"caption_dropout": 1.0}, "caption_dropout must be a number from 0 and below 1, not 1.0"),
    ],
)
def test_what_is_refused(changed, told, drawings, model, tmp_path) -> None:
    with pytest.raises(UserError, match=told):
        run_jobs(recipe.jobs(wanted(drawings, model, **changed)), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_model_that_fills_masks_is_refused(drawings, model, tmp_path) -> None:
    noise = Noise("cosine", clip=None)
    task = recipe.prepare(wanted(drawings, model, size=16))
    unet = replace(task.painter.model.config.unet, channels=7)
    filling = latent_diffusion.build(replace(task.painter.model.config, unet=unet, noise=noise))
    checkpoints.save(filling, task.painter.tokenizer, tmp_path)
    with pytest.raises(UserError, match="does not draw from a text alone"):
        recipe.prepare(wanted(drawings, tmp_path))
