"""A UnCLIPPipeline's directory both ways: every part, bit for bit; which parts may be missing, and which may not."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.errors import UserError
from keifu.models.clip import image as clip_image
from keifu.models.diffusion import ddpm
from keifu.models.hf.image_processor import Pixels
from keifu.models.hf.schedulers import read_scheduler
from keifu.models.unclip import unclip

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.pipelines.deprecated.unclip import text_proj  # noqa: E402

MODELS = "prior", "decoder", "text_proj", "text_encoder", "super_res_first", "super_res_last"
SCHEDULERS = "prior_scheduler", "decoder_scheduler", "super_res_scheduler"
SEES = clip_image.Config(16, 8, 3, 12, 20, 1, 2, embedding_dim=14)


def theirs(folder):
    """Return diffusers' parts of a directory, each read by its own class: from 0.34 on, no directory of a
    UnCLIPPipeline is read whole, not even one of its own, since the class of text_proj is no longer found by its
    name."""
    index, found = json.loads((folder / "model_index.json").read_text()), {}
    for part, (library, name) in ((part, value) for part, value in index.items() if part[0] != "_"):
        kind = getattr({"transformers": transformers, "unclip": text_proj}.get(library, diffusers), name)
        found[part] = kind.from_pretrained(folder, subfolder=part)
    return found


def same(ours: Any, original: Any) -> bool:
    ours, original = ours.state_dict(), original.state_dict()
    return ours.keys() == original.keys() and all(torch.equal(ours[name], original[name]) for name in original)


def test_a_pipeline_both_ways(unclip_pipeline, tmp_path) -> None:
    made, folder = unclip_pipeline
    model, tokenizer = checkpoints.load(folder)
    assert model.config.size == (16, 16) and model.config.small_size == (8, 8) and model.config.image is None
    assert model.config.prior_noise == unclip.PRIOR and model.config.decoder_noise == unclip.DECODER
    checkpoints.save(model, tokenizer, tmp_path)
    again = theirs(tmp_path)
    assert diffusers.UnCLIPPipeline(**again) and all(same(again[part], getattr(made, part)) for part in MODELS)
    for part in SCHEDULERS:
        own, other = dict(getattr(made, part).config), dict(again[part].config)
        assert {name: other[name] for name in own if name[0] != "_"} == {n: v for n, v in own.items() if n[0] != "_"}
    assert again["tokenizer"]("a red cat").input_ids == tokenizer.encode("a red cat", special=True)
    assert again["tokenizer"].model_max_length == 12 and checkpoints.load_model(tmp_path).config == model.config


def test_parts_that_may_be_missing(unclip_pipeline, tmp_path) -> None:
    """A model that sees pictures and enlarges none, and one that varies pictures alone."""
    model, tokenizer = checkpoints.load(unclip_pipeline[1])
    small = replace(model.config, upsampler=None, last_upsampler=None, image=SEES, pixels=Pixels(16, 16))
    torch.manual_seed(0)
    checkpoints.save(unclip.build(small), tokenizer, tmp_path / "small")
    again: Any = checkpoints.load_model(tmp_path / "small")
    assert again.config == small and again.config.size == (8, 8)
    seen = theirs(tmp_path / "small")["image_encoder"]
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = seen.eval()(pixels).image_embeds
        assert (again.encode_image(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
    index = json.loads((tmp_path / "small/model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]

    varying = replace(small, prior=None)
    checkpoints.save(unclip.build(varying), tokenizer, tmp_path / "varying")
    assert checkpoints.load_model(tmp_path / "varying").config == varying
    with pytest.raises(UserError, match="no image_encoder"):
        model.encode_image(pixels)


def test_a_noise_that_its_scheduler_has_no_words_for_is_kept_all_the_same(unclip_pipeline, tmp_path) -> None:
    model, tokenizer = checkpoints.load(unclip_pipeline[1])
    config = replace(model.config, decoder_noise=replace(unclip.DECODER, target="velocity"))
    checkpoints.save(unclip.build(config), tokenizer, tmp_path)
    assert checkpoints.load_model(tmp_path).config == config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "keifu_unclip"


def test_a_missing_or_foreign_part_is_named(unclip_pipeline, tmp_path) -> None:
    shutil.copytree(unclip_pipeline[1], tmp_path / "copy")
    file = tmp_path / "copy/decoder/config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="describes a UNet2DModel, and what is implemented as decoder"):
        checkpoints.load_model(tmp_path / "copy")
    file.write_text(json.dumps(content | {"cross_attention_dim": 12}))
    with pytest.raises(UserError, match=r"given \(48, 11\) numbers"):
        checkpoints.load_model(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/prior")
    with pytest.raises(UserError, match=r"a UnCLIPPipeline and lacks its prior \(prior/config.json\)"):
        checkpoints.load_model(tmp_path / "copy")


def test_configs_whose_parts_do_not_fit() -> None:
    config = unclip.Config()
    assert unclip.from_published(unclip.to_published(config)) == config  # Karlo's, in the published words
    with pytest.raises(ValueError, match="needs one upsampler for the last step"):
        replace(config, last_upsampler=None)
    with pytest.raises(ValueError, match="upsampler reads 3 channels"):
        replace(config, upsampler=ddpm.Config(), last_upsampler=ddpm.Config())
    with pytest.raises(ValueError, match="Embeddings have 768 numbers"):
        replace(config, image=SEES)
    with pytest.raises(ValueError, match="no projection into the space of CLIP's embeddings"):
        replace(config, text=replace(config.text, projected=False))


def test_a_scheduler_of_unclip_that_says_little() -> None:
    noise = read_scheduler({"_class_name": "UnCLIPScheduler"})
    assert noise == replace(unclip.PRIOR, target="noise", clip=1.0)
