"""Stable Diffusion 1's tensors under the names that CompVis gave them, from a pipeline of diffusers; knows no test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from keifu.data.tokenizers import bpe
from keifu.models.diffusion import latent_diffusion

RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
Named = Iterator[tuple[str, torch.Tensor]]


def weights(module: nn.Module, start: str, names: dict[str, str] | None = None) -> Named:
    for name, tensor in module.state_dict().items():
        part, _, leaf = name.rpartition(".")
        yield f"{start}{(names or {}).get(part, part)}.{leaf}", tensor


def unet_as_compvis(unet: Any) -> Named:
    """Yield the weights of the network in the order in which CompVis numbers its blocks."""
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


def single_file(folder: Path) -> tuple[Any, Path]:
    """Write a small pipeline with Stable Diffusion 1's numbers of heads. Return it, and the path of its single file."""
    import diffusers
    import transformers

    tokenizer = bpe.learn(["a red heart", "a blue cat"] * 5, 520).replace(max_length=77)
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
