"""Stable Diffusion 1 as one file with CompVis's names: written here from a pipeline, read by diffusers and keifu."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import keifu
from keifu import checkpoints, cli
from keifu.data.tokenizers import bpe
from keifu.errors import UserError
from keifu.generation.images.latent_diffusion import LatentDiffusionPipeline
from keifu.generation.images.pixel_diffusion import ImageRequest
from keifu.models.diffusion import latent_diffusion

diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
Named = Iterator[tuple[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def weights(module: nn.Module, start: str, names: dict[str, str] | None = None) -> Named:
    for name, tensor in module.state_dict().items():
        part, _, leaf = name.rpartition(".")
        yield f"{start}{(names or {}).get(part, part)}.{leaf}", tensor


def unet_as_compvis(unet: Any) -> Named:
    """A walk through the network in the order in which CompVis numbers its blocks."""
    start, number = "model.diffusion_model.", 1
    yield from weights(unet.time_embedding, f"{start}time_embed.", {"linear_1": "0", "linear_2": "2"})
    yield from weights(nn.ModuleDict({"0": unet.conv_in}), f"{start}input_blocks.0.")
    for block in unet.down_blocks:
        for place, residual in enumerate(block.resnets):
            yield from weights(residual, f"{start}input_blocks.{number}.0.", RESIDUAL)
            if hasattr(block, "attentions"):
                yield from weights(block.attentions[place], f"{start}input_blocks.{number}.1.")
            number += 1
        if block.downsamplers:
            yield from weights(block.downsamplers[0], f"{start}input_blocks.{number}.0.", {"conv": "op"})
            number += 1
    first, last = unet.mid_block.resnets
    yield from weights(first, f"{start}middle_block.0.", RESIDUAL)
    yield from weights(unet.mid_block.attentions[0], f"{start}middle_block.1.")
    yield from weights(last, f"{start}middle_block.2.", RESIDUAL)
    number = 0
    for block in unet.up_blocks:
        for place, residual in enumerate(block.resnets):
            after = [*block.attentions[place : place + 1]] if hasattr(block, "attentions") else []
            after += block.upsamplers if block.upsamplers and place == len(block.resnets) - 1 else []
            yield from weights(residual, f"{start}output_blocks.{number}.0.", RESIDUAL)
            for one, module in enumerate(after, 1):
                yield from weights(module, f"{start}output_blocks.{number}.{one}.")
            number += 1
    yield from weights(nn.ModuleDict({"0": unet.conv_norm_out, "2": unet.conv_out}), f"{start}out.")


def coder_as_compvis(vae: Any) -> Named:
    start, short = "first_stage_model.", {"conv_shortcut": "nin_shortcut"}
    yield from weights(nn.ModuleDict({"quant_conv": vae.quant_conv, "post_quant_conv": vae.post_quant_conv}), start)
    for side, way, blocks in (("encoder", "down", vae.encoder.down_blocks), ("decoder", "up", vae.decoder.up_blocks)):
        coder = getattr(vae, side)
        ends = {"conv_in": coder.conv_in, "norm_out": coder.conv_norm_out, "conv_out": coder.conv_out}
        yield from weights(nn.ModuleDict(ends), f"{start}{side}.")
        for level, block in enumerate(blocks):
            there = f"{start}{side}.{way}.{level if way == 'down' else len(blocks) - 1 - level}."
            for place, residual in enumerate(block.resnets):
                yield from weights(residual, f"{there}block.{place}.", short)
            for module in getattr(block, f"{way}samplers") or []:
                yield from weights(module, f"{there}{way}sample.")
        for place, residual in enumerate(coder.mid_block.resnets, 1):
            yield from weights(residual, f"{start}{side}.mid.block_{place}.", short)
        for name, tensor in weights(coder.mid_block.attentions[0], f"{start}{side}.mid.attn_1.", ATTENTION):
            yield name, tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def file_of(pipeline: Any) -> dict[str, torch.Tensor]:
    named = dict(weights(pipeline.text_encoder, "cond_stage_model.transformer."))
    named |= dict(unet_as_compvis(pipeline.unet)) | dict(coder_as_compvis(pipeline.vae))
    kept = "text_model."  # which transformers' newest models have left out
    start = "cond_stage_model.transformer."
    named = {n if not n.startswith(start) or kept in n else f"{start}{kept}{n.removeprefix(start)}": t
             for n, t in named.items()}  # fmt: skip
    noise = latent_diffusion.NOISE
    return {name: tensor.contiguous().clone() for name, tensor in named.items()} | {
        "betas": noise.beta.clone(), "alphas_cumprod": noise.alpha_bar.float(), "global_step": torch.tensor(470_000),
        "model_ema.decay": torch.tensor(0.9999), "scale_factor": torch.tensor(0.18215),
        f"{start}text_model.embeddings.position_ids": torch.arange(77)[None],
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small pipeline with Stable Diffusion 1's numbers of heads, and its file with the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("single")
    tokenizer = bpe.learn(["a red heart", "a blue cat"] * 5, 520).with_max_length(77)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 64), layers_per_block=2, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=128,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=2,
        up_block_types=["UpDecoderBlock2D"] * 2, sample_size=512,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        vae,
        transformers.CLIPTextModel(text).eval(),
        tokens,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    for name, parameter in pipeline.unet.named_parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.ndim == 1 and "norm" not in name else None
    save_file(file_of(pipeline), folder / "sd.safetensors")
    return pipeline, folder / "sd.safetensors"


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
    with pytest.raises(UserError, match=r"holds no tokenizer, and none lies beside it .* 520 tokens are not CLIP's"):
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
        single_file._tokenizer(alone, whole)()
