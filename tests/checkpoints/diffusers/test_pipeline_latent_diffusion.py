"""A StableDiffusionPipeline's directory both ways: every part, bit for bit, and a missing or foreign part is named."""

import json
import shutil

import pytest
import torch

from keifu import checkpoints
from keifu.errors import UserError
from keifu.inference.images.pixel_diffusion import require_diffusion_model

diffusers = pytest.importorskip("diffusers")


@torch.no_grad()
def test_a_pipeline_both_ways(pipeline, tmp_path) -> None:
    theirs, folder = pipeline
    model, tokenizer = checkpoints.load(folder)
    ids = torch.tensor([tokenizer.encode("a red cat", special=True)])
    expected = theirs.text_encoder(ids).last_hidden_state
    assert (model.encode_text(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    latents, timestep = torch.randn(1, 4, 8, 4), torch.tensor([30])
    predicted = theirs.unet(latents, timestep, expected).sample
    got = model(latents, timestep, model.project(model.encode_text(ids)))
    assert (got - predicted).abs().max() <= 1e-5 * predicted.abs().max()

    checkpoints.save(model, tokenizer, tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        ours, original = getattr(again, part).state_dict(), getattr(theirs, part).state_dict()
        assert ours.keys() == original.keys() and all(torch.equal(ours[name], original[name]) for name in original)
    assert again.tokenizer("a red cat").input_ids == ids[0].tolist() and again.tokenizer.model_max_length == 77
    assert checkpoints.load_model(tmp_path).config == model.config


def test_it_is_not_taken_for_a_model_that_draws_by_itself(pipeline) -> None:
    with pytest.raises(UserError, match="draws no pictures"):
        require_diffusion_model(checkpoints.load_model(pipeline[1]))


def test_a_missing_or_foreign_part_is_named(pipeline, tmp_path) -> None:
    shutil.copytree(pipeline[1], tmp_path / "copy")
    file = tmp_path / "copy/vae/config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"_class_name": "VQModel"}))
    with pytest.raises(UserError, match="describes a VQModel, and what is implemented as vae is AutoencoderKL"):
        checkpoints.load_model(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/tokenizer")
    with pytest.raises(UserError, match=r"a StableDiffusionPipeline and lacks its tokenizer"):
        checkpoints.load_model(tmp_path / "copy")
