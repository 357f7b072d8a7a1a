"""Stable Diffusion 1 as one file with CompVis's names: written here from a pipeline, read by diffusers and keifu."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compvis import single_file
from safetensors.torch import load_file, save_file

import keifu
from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.inference.images.latent_diffusion import LatentDiffusionPipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.models.diffusion import latent_diffusion

diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return single_file(tmp_path_factory.mktemp("single"))


@torch.no_grad()
def test_it_draws_what_the_pipeline_draws(made, tmp_path) -> None:
    theirs, file = made
    model, tokenizer = keifu.load(file)
    painter = LatentDiffusionPipeline(model, tokenizer)
    wanted = painter.resolved(ImageRequest("plms", 3, 5, text="a red heart", guidance=3.0, size=(40, 24)))
    *_, last = painter.drawing(wanted, [5])
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 40, "width": 24, "output_type": "latent"}
    expected = theirs("a red heart", generator=torch.Generator().manual_seed(5), **settings).images
    assert (last.x - expected).abs().max() <= 1e-5 * expected.abs().max()
    drawn = painter.decoded(last.x, wanted)
    decoded = theirs.vae.decode(expected / theirs.vae.config.scaling_factor).sample
    assert (drawn - decoded).abs().max() <= 1e-5 * decoded.abs().max()

    checkpoints.save(model, tokenizer, tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        ours, original = (getattr(each, part).state_dict() for each in (again, theirs))
        assert all(torch.equal(ours[name], original[name]) for name in original), part


def test_diffusers_reads_the_file_as_keifu_does(made, tmp_path) -> None:
    """The names written here are CompVis's: diffusers finds the pipeline's weights by them."""
    theirs, file = made
    theirs.save_pretrained(tmp_path)
    try:
        again = diffusers.StableDiffusionPipeline.from_single_file(
            str(file), config=str(tmp_path), local_files_only=True, safety_checker=None
        )
    except OSError as error:
        pytest.skip(f"diffusers wants the hub: {error}")
    for part in ("unet", "vae"):
        found, original = (getattr(each, part).state_dict() for each in (again, theirs))
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], original[name]) for name in original), part


def changed(file: Path, out: Path, change: Any) -> Path:
    tensors = load_file(file)
    save_file(dict(filter(None, (change(name, tensor) for name, tensor in tensors.items()))), out)
    return out


def test_other_files_are_named(made, tmp_path, capsys) -> None:
    _, file = made
    start = "cond_stage_model."
    cases = {
        "lacks its autoencoder (first_stage_model.*)": lambda n, t: None if n.startswith("first_") else (n, t),
        "a Stable Diffusion 2": lambda n, t: (n.replace(f"{start}transformer.", f"{start}model."), t),
        "a Stable Diffusion XL": lambda n, t: (n.replace(start, "conditioner."), t),
        "a LoRA: give it with --lora": lambda n, t: (f"lora_{n}", t),
        "holds no Stable Diffusion": lambda n, t: (f"model.layers.{n}", t) if "." in n else None,
        "1 missing (unet.conv_out.bias)": lambda n, t: None if n.endswith("model.out.2.bias") else (n, t),
        "not part of the model (embedding_manager.x)": lambda n, t: (n, t) if "." in n else ("embedding_manager.x", t),
        "no Stable Diffusion 1 as keifu knows it": lambda n, t: (
            n.replace(".input_blocks.2.", f".input_blocks.{10**13}."),
            t,
        ),
    }
    for said, change in cases.items():
        with pytest.raises(UserError) as error:
            checkpoints.load_model(changed(file, tmp_path / "other.safetensors", change))
        assert said in str(error.value), said
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"old\.ckpt is pickled, .*from_single_file"):
        checkpoints.load_model(tmp_path / "old.ckpt")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated or corrupt"):
        checkpoints.load_model(tmp_path / "torn.safetensors")


def test_the_tokenizer_beside_it_or_clips_or_a_sentence(made, tmp_path, monkeypatch, capsys) -> None:
    _, file = made
    alone = tmp_path / "sd.safetensors"
    shutil.copy(file, alone)
    with pytest.raises(UserError, match=r"holds no tokenizer, and there is none .* 520 tokens are not CLIP's"):
        checkpoints.load(alone)
    monkeypatch.chdir(tmp_path)
    words = ["draw", str(file), "a cat", "--steps", "1", "--seed", "1", "--guidance", "1", "--size", "8", "-o", "a.png"]
    cli.main(words)
    cli.main(["draw", "--again", "a.png"])
    assert "bit for bit" in capsys.readouterr().err

    from keifu.checkpoints import loading
    from keifu.checkpoints.diffusers import single_file

    def none(_: str) -> Path:
        raise UserError("There is no network.")

    monkeypatch.setattr("keifu.data.catalogue.catalogue.fetch", none)
    source = loading.open_source(alone)
    whole = single_file.replace(source.config, text=single_file.clip_text.SIZES["stable-diffusion-text"],
                                unet=latent_diffusion.SIZES["stable-diffusion-1"].unet)  # fmt: skip
    with pytest.raises(UserError, match=r"keifu data get clip-bpe\): There is no network"):
        single_file._read_tokenizer(alone, whole)
