"""The recipe for latent diffusion: three parts in one run, a pipeline that diffusers reads, and the same bits again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stopping import stopped_and_whole

from keifu import checkpoints
from keifu.checkpoints.loading import load_model
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split
from keifu.errors import UserError
from keifu.inference.images.pipeline import image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.recipes.images import latent_diffusion as recipe
from keifu.recipes.running import run_jobs
from keifu.training.objectives.diffusion import draw_noise

PROMPTS = ("a small red disc", "a large blue bar")
TINY = {
    "size": 24, "autoencoder_widths": (4, 8), "latent_channels": 3, "widths": (8, 16), "attention": (1,), "heads": 2,
    "autoencoder_steps": 3, "clip_steps": 1, "steps": 3, "autoencoder_batch": 4, "clip_batch": 4, "batch_size": 4,
    "prompts": PROMPTS, "precision": "float32",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


@pytest.fixture(autouse=True, scope="module")
def _few_steps(own_cache: pytest.MonkeyPatch) -> None:
    own_cache.setattr(recipe, "STEPS", 2)


@pytest.fixture(scope="module")
def trained(drawings, towers, tmp_path_factory) -> Path:
    """Train a whole run with a given CLIP and return it."""
    out = tmp_path_factory.mktemp("runs") / "latent"
    run_jobs(recipe.jobs(recipe.Recipe(str(drawings), clip=str(towers), **TINY)), out)
    return out


def test_a_run_starts_from_a_trained_model_and_trains_its_u_net_alone(trained, drawings, tmp_path) -> None:
    before, _ = checkpoints.load(trained)
    started = recipe.Recipe(str(drawings), **TINY | {"start_from": str(trained), "size": 99, "widths": (8,)})
    assert started.resolved().learning_rate == pytest.approx(1e-4)
    run_jobs(recipe.jobs(started), tmp_path)
    after, _ = checkpoints.load(tmp_path)
    assert after.config == before.config and not (tmp_path / "autoencoder").exists()
    now = after.state_dict()
    changed = {name.partition(".")[0] for name, a in before.state_dict().items() if not a.equal(now[name])}
    assert changed <= {"unet"}
    assert json.loads((tmp_path / "recipe.json").read_text())["settings"]["keep_best"]


def test_a_run_holds_out_what_the_model_did_that_it_starts_from(trained, drawings, tmp_path) -> None:
    record = json.loads((trained / "recipe.json").read_text())
    assert record["held_out"] == {"whole_families": True}
    older = shutil.copytree(trained, tmp_path / "older")
    (older / "recipe.json").write_text(json.dumps({**record, "held_out": {"whole_families": False}}))
    started = recipe.Recipe(str(drawings), **TINY | {"start_from": str(older), "steps": 2})
    run_jobs(recipe.jobs(started), tmp_path / "later")
    assert json.loads((tmp_path / "later" / "recipe.json").read_text())["held_out"] == {"whole_families": False}


def test_a_run_may_end_with_its_last_weights(trained, drawings, tmp_path) -> None:
    started = recipe.Recipe(str(drawings), **TINY | {"start_from": str(trained), "keep_best": False, "steps": 2})
    run_jobs(recipe.jobs(started), tmp_path)
    assert not json.loads((tmp_path / "recipe.json").read_text())["settings"]["keep_best"]


def test_the_run_is_a_pipeline_of_diffusers_and_draws(trained) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(trained)
    model, tokenizer = checkpoints.load(trained)
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    assert theirs.vae.config.scaling_factor == model.config.autoencoder.scale != 1
    painter = image_pipeline(model, lambda: tokenizer)
    for text in (*PROMPTS, "小赤円"):
        ids = theirs.tokenizer(text, padding="max_length").input_ids
        assert ids == painter.tokens([text])[0].tolist() and len(ids) == model.config.context_length
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    assert theirs.scheduler.config.timestep_spacing == "trailing"
    drawn = theirs(PROMPTS[0], num_inference_steps=3, guidance_scale=2.0, generator=noise, output_type="pt").images
    wanted = painter.resolved(ImageRequest("ddim", 3, 1, text=PROMPTS[0], guidance=2.0))
    ours = painter.draw(wanted, [1])
    assert (ours / 255 - drawn).abs().max() <= 1 / 255 + 1e-4


def test_one_report_shows_all_parts(trained, towers) -> None:
    page = (trained / "report.html").read_text()
    assert "Autoencoder: loss" in page and "CLIP: loss" not in page  # which was given
    assert page.count("data:image/png") >= 3 and "parameters of the U-Net" in page
    facts = json.loads((trained / "recipe.json").read_text())
    assert facts["finished"] and any(name.startswith("autoencoder/") for name in facts["hashes"])


def test_latents_have_a_variance_of_one(trained, drawings) -> None:
    pictures = split(read_images(drawings, 24)).train
    model = recipe.set_scale(load_model(trained / "autoencoder", torch.float32), pictures)
    seen = recipe.encode_dataset(model, model.config.scale, pictures)
    batch = {"indices": torch.arange(len(pictures)).repeat(50), "draws": draw_noise(0, 0, 50 * len(pictures))}
    assert abs(float(seen.batch(batch)["pictures"].std()) - 1) < 0.01
    noisy = seen.batch(batch)["pictures"].unflatten(0, (50, -1))
    assert torch.allclose(noisy.mean(0), seen.mean, atol=0.02 + 0.7 * float(seen.deviation.max()))
    assert abs(float((noisy - seen.mean).std() / seen.deviation.square().mean().sqrt()) - 1) < 0.02
    part = seen.batch({name: tensor[3:] for name, tensor in batch.items()})["pictures"]
    assert torch.equal(part, seen.batch(batch)["pictures"][3:])  # however a batch is split


@pytest.mark.slow  # a run of three parts in language, tests/recipes/assistant/test_instruct.py, is resumed in make test
@pytest.mark.parametrize("stopped", ["autoencoder", "parts"])
def test_a_resumed_run_has_the_same_bits(stopped, trained, drawings, towers, tmp_path, monkeypatch) -> None:
    """Stopped inside a part, and gone on with."""
    wanted = recipe.Recipe(str(drawings), clip=str(towers), **TINY)
    ours, theirs = stopped_and_whole(recipe, wanted, stopped, 2, tmp_path, monkeypatch)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_found_again(trained, drawings, towers) -> None:
    before = (trained / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    wanted = recipe.Recipe(str(drawings), clip=str(towers), **TINY)
    assert run_jobs(recipe.jobs(wanted), trained, True).steps == 3
    assert (trained / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="these differ: "):
        run_jobs(recipe.jobs(replace(wanted, kl_weight=0.5)), trained, True)
    with pytest.raises(UserError, match="already holds a run.*the same call of keifu.train"):
        run_jobs(recipe.jobs(wanted), trained)


def test_in_pixels_with_its_own_clip(drawings, tmp_path) -> None:
    summary = run_jobs(recipe.jobs(recipe.Recipe(str(drawings), space="pixels", **TINY)), tmp_path)
    assert summary.figures["validation_loss"] > 0
    model, tokenizer = checkpoints.load(tmp_path)
    assert model.config.autoencoder is None and model.config.noise.clip == 1.0
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "keifu_latent_diffusion"
    painter = image_pipeline(model, lambda: tokenizer)
    drawn = painter.draw(painter.resolved(ImageRequest("ddim", 2, 1, text="a red disc", guidance=2.0)), [1, 2])
    assert drawn.shape == (2, 3, 24, 24)
    page = (tmp_path / "report.html").read_text()
    assert "CLIP: loss" in page and "Autoencoder: loss" not in page


def test_a_prompt_that_is_too_long_is_cut_where_captions_are(drawings, towers, tmp_path) -> None:
    wanted = recipe.Recipe(str(drawings), clip=str(towers), space="pixels", **TINY | {"prompts": ("a disc " * 40,)})
    with pytest.raises(UserError, match="leave out its end .--truncate"):
        run_jobs(recipe.jobs(wanted), tmp_path)
    run_jobs(recipe.jobs(replace(wanted, truncate=True)), tmp_path)
    assert [*(tmp_path / "samples").glob("*.png")]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"size": 23}, "nearest size that does is 24 x 24|nearest size that does is 22"),
        ({"attention": (2,)}, "attention names level 2, but the levels are 0 to 1"),
        ({"heads": 3}, "16 channels do not part into 3 heads"),
        ({"languages": ("en", "fr")}, "'fr'.*Known: en, ja"),
        ({"clip": "no-such-run"}, "no model 'no-such-run'"),
        ({"caption_dropout": 1.0}, "caption_dropout must be a number from 0 and below 1, not 1.0"),
        ({"prompts": ()}, "no prompt for the samples"),
    ],
)
def test_what_is_refused_before_anything_is_trained(changed, told, drawings, towers, tmp_path) -> None:
    with pytest.raises(UserError, match=told):
        run_jobs(recipe.jobs(recipe.Recipe(str(drawings), **{"clip": str(towers), **TINY, **changed})), tmp_path)
    assert not [*tmp_path.iterdir()]
