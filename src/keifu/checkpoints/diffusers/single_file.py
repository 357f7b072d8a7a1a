"""Single-file checkpoints of Stable Diffusion 1 (CompVis's tensor names, .safetensors), read as a diffusers pipeline.

The tensors get diffusers' names, and the Config is inferred from their shapes, for the file holds nothing else. What
shapes do not show is the same in every Stable Diffusion 1: 8 heads in the U-Net, a head dimension of 64 in the text
encoder, and the autoencoder's scale.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keifu.checkpoints.diffusers.pipeline import LATENT, TOKENIZER, tower_names
from keifu.checkpoints.hf.read import open_weights, stored_of
from keifu.checkpoints.plan import Source, Stored
from keifu.checkpoints.registry import FAMILIES
from keifu.errors import UserError
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, latent_diffusion

Shapes = Mapping[str, tuple[int, ...]]
UNET, CODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
PARTS = {"U-Net": UNET, "autoencoder": CODER, "text encoder": TEXT}
OTHERS = {  # how the tensors of what is not Stable Diffusion 1 begin
    "conditioner.": "a Stable Diffusion XL",
    "cond_stage_model.model.": "a Stable Diffusion 2, whose pipeline folder keifu reads",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3",
    "double_blocks.": "a FLUX",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA: give it with --lora, beside the model that it changes",
    "unet.": "a LoRA, or part of a pipeline: give it with --lora, or the pipeline's folder",
    "down_blocks.": "a part of a diffusers pipeline: give the pipeline's folder",
}
LEFT_OUT = ("model_ema.", "first_stage_model.loss.")  # a copy that training kept, and what it was judged by
COUNTS = 8, 64  # the U-Net's heads, and the numbers in a head of the text's encoder
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
CODER_PARTS = (  # of either side; a level's number follows
    (r"mid\.block_([12])\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}."),
    (r"mid\.attn_1\.norm", lambda m: "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.([qkv])\b", lambda m: f"mid_block.attentions.0.to_{m[1]}"),
    (r"mid\.attn_1\.proj_out", lambda m: "mid_block.attentions.0.to_out.0"),
    (r"norm_out", lambda m: "conv_norm_out"),
    (r"nin_shortcut", lambda m: "conv_shortcut"),
)


def open_single_file(path: Path) -> Source:
    """The model in a file of Stable Diffusion 1, its weights memory-mapped and not yet read.

    A file of another kind, or one that lacks a part, is a `UserError` that says which.
    """
    if path.suffix == ".ckpt":
        raise UserError(
            f"{path} is pickled, and keifu never unpickles, since that can run any program; if you trust its makers, "
            "let diffusers convert it: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(OUT)."
        )
    file = open_weights(path)
    names = [*file.keys()]
    _check(path, names)
    gone = [name for name in names if "." not in name or name.startswith(LEFT_OUT)]
    kept = {name: stored_of(file.get_slice(name)) for name in names if name not in gone}
    shapes = {name: each.shape for name, each in kept.items()}
    try:
        config = config_of(shapes, {name: file.get_tensor(name) for name in ("betas", "scale_factor") if name in gone})
        told = {rename_weights(name, shapes): name for name in kept}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is no Stable Diffusion 1 as keifu knows it: {error} cannot be read.") from error
    stored = {new: _flat(new, kept[old]) for new, old in told.items()}
    notes = (f"Left out, as not part of the model: {len(gone)} tensors of the training.",) if gone else ()
    family = FAMILIES[LATENT]

    def read(name: str) -> Tensor:
        return file.get_tensor(told[name]).reshape(stored[name].shape)

    return Source(
        path, "CompVis's file", family, config, stored, read, partial(_read_tokenizer, path, config),
        tower_names(family, stored), notes=notes,
    )  # fmt: skip


def _check(path: Path, names: Iterable[str]) -> None:
    names = [*names]
    for start, what in OTHERS.items():
        if any(name.startswith(start) for name in names):
            raise UserError(f"{path} is {what}; of single files keifu reads Stable Diffusion 1 alone.")
    missing = [what for what, start in PARTS.items() if not any(name.startswith(start) for name in names)]
    if len(missing) == len(PARTS):
        raise UserError(f"{path} holds no Stable Diffusion; of another model, give the folder with its config.json.")
    if missing:
        raise UserError(f"{path} lacks its {' and its '.join(missing)} ({PARTS[missing[0]]}*).")


def config_of(shapes: Shapes, beside: Mapping[str, Tensor]) -> latent_diffusion.Config:
    """The Config that the tensors' shapes tell. `beside`: the file's betas and scale_factor, where it has them."""
    noise = latent_diffusion.NOISE
    if "betas" in beside and not torch.allclose(beside["betas"].float(), noise.beta, rtol=1e-4, atol=0):
        noise = replace(noise, betas=tuple(beside["betas"].tolist()), steps=len(beside["betas"]))
    coder = _autoencoder(shapes)
    if "scale_factor" in beside:
        coder = replace(coder, scale=float(beside["scale_factor"]))
    return latent_diffusion.Config(_text(shapes), _unet(shapes), coder, noise)


def _text(shapes: Shapes) -> clip_text.Config:
    inner = "text_model." if f"{TEXT}text_model.final_layer_norm.weight" in shapes else ""
    start = f"{TEXT}{inner}"
    vocabulary, dim = shapes[f"{start}embeddings.token_embedding.weight"]
    return replace(
        clip_text.SIZES["stable-diffusion-text"],
        vocab_size=vocabulary,
        context_length=shapes[f"{start}embeddings.position_embedding.weight"][0],
        dim=dim,
        hidden_dim=shapes[f"{start}encoder.layers.0.mlp.fc1.weight"][0],
        n_layers=_count(shapes, rf"{re.escape(start)}encoder\.layers\.(\d+)\."),
        n_heads=dim // COUNTS[1],
    )


def _unet(shapes: Shapes) -> conditioned_unet.Config:
    inner = {name.removeprefix(UNET): shape for name, shape in shapes.items() if name.startswith(UNET)}
    blocks = _blocks(inner)
    ends = [*range(0, _count(inner, r"input_blocks\.(\d+)\."), blocks + 1)]
    widths = tuple(inner[f"input_blocks.{end + 1}.0.in_layers.2.weight"][0] for end in ends)
    levels = range(len(widths))
    up = [len(widths) - 1 - u for u in levels if f"output_blocks.{u * (blocks + 1)}.1.norm.weight" in inner]
    attention = tuple(level for level in levels if f"input_blocks.{ends[level] + 1}.1.norm.weight" in inner)
    first = f"input_blocks.{ends[attention[0]] + 1}.1."
    return conditioned_unet.Config(
        channels=inner["input_blocks.0.0.weight"][1],
        predicted_channels=inner["out.2.weight"][0],
        widths=widths,
        n_residual_blocks=blocks,
        attention=attention,
        up_attention=tuple(sorted(up)),
        n_heads=COUNTS[0],
        n_layers=_count(inner, rf"{re.escape(first)}transformer_blocks\.(\d+)\."),
        context_dim=inner[f"{first}transformer_blocks.0.attn2.to_k.weight"][1],
        linear=len(inner[f"{first}proj_in.weight"]) == 2,
        middle="middle_block.1.norm.weight" in inner,
    )


def _autoencoder(shapes: Shapes) -> autoencoder_kl.Config:
    start = f"{CODER}encoder."
    levels = _count(shapes, rf"{re.escape(start)}down\.(\d+)\.")
    return autoencoder_kl.Config(
        channels=shapes[f"{start}conv_in.weight"][1],
        latent_channels=shapes[f"{CODER}post_quant_conv.weight"][0],
        widths=tuple(shapes[f"{start}down.{level}.block.0.conv1.weight"][0] for level in range(levels)),
        n_residual_blocks=_count(shapes, rf"{re.escape(start)}down\.0\.block\.(\d+)\."),
    )


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in names if (found := re.match(pattern, name)))


def _blocks(names: Iterable[str]) -> int:
    """Residual blocks of each level of the U-Net: what stands before the first change of resolution."""
    return min(int(found[1]) for name in names if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))) - 1


def rename_weights(name: str, shapes: Shapes) -> str:
    """diffusers' name of one tensor, after the part of the pipeline that it belongs to."""
    if name.startswith(TEXT):
        return f"text_encoder.{name.removeprefix(TEXT)}"
    if name.startswith(CODER):
        return f"vae.{_autoencoder_name(name.removeprefix(CODER), shapes)}"
    return f"unet.{_unet_name(name.removeprefix(UNET), shapes)}" if name.startswith(UNET) else name


def _unet_name(name: str, shapes: Shapes) -> str:
    for old, new in UNET_ENDS.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    side, number, place, rest = _unet_blocks(name)
    if side == "middle_block":
        return "mid_block." + (f"attentions.0.{rest}" if number == 1 else f"resnets.{number // 2}.{_residual(rest)}")
    blocks = _blocks(each.removeprefix(UNET) for each in shapes)
    level, block = divmod(number - (side == "input_blocks"), blocks + 1)
    stage = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}."
    if rest.startswith("op."):
        return f"{stage}downsamplers.0.conv{rest.removeprefix('op')}"
    if place and rest.startswith("conv."):
        return f"{stage}upsamplers.0.{rest}"
    return stage + (f"attentions.{block}.{rest}" if place else f"resnets.{block}.{_residual(rest)}")


def _unet_blocks(name: str) -> tuple[str, int, int, str]:
    """The side of the U-Net, the number there, the place in it, and the rest of a name."""
    found = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)", name)
    if found:
        return found[1], int(found[2]), int(found[3]), found[4]
    middle = re.fullmatch(r"(middle_block)\.(\d+)\.(.+)", name)
    if not middle:
        raise ValueError(f"the tensor {name}")
    return middle[1], int(middle[2]), 0, middle[3]


def _residual(rest: str) -> str:
    old = next((old for old in RESIDUAL if rest.startswith(f"{old}.")), None)
    return rest if old is None else RESIDUAL[old] + rest.removeprefix(old)


def _autoencoder_name(name: str, shapes: Shapes) -> str:
    for pattern, new in CODER_PARTS:
        name = re.sub(pattern, new, name)
    last = _count(shapes, rf"{re.escape(CODER)}encoder\.down\.(\d+)\.") - 1
    for way in ("down", "up"):

        def level(found: re.Match[str], way: str = way) -> str:
            number = int(found[1]) if way == "down" else last - int(found[1])
            return f".{way}_blocks.{number}."

        name = re.sub(rf"\.{way}\.(\d+)\.", level, name)
        name = name.replace(f".{way}sample.", f".{way}samplers.0.")
    return name.replace(".block.", ".resnets.")


def _flat(name: str, stored: Stored) -> Stored:
    """The matrices of the autoencoder's attention, which are 1×1 convolutions here, as matrices."""
    is_attention = name.startswith("vae.") and ".attentions." in name
    return stored._replace(shape=stored.shape[:2]) if is_attention and len(stored.shape) == 4 else stored


def _read_tokenizer(path: Path, config: latent_diffusion.Config) -> Any:
    """The tokenizer that lies beside the file, which holds none; else CLIP's own from the catalogue, which every
    Stable Diffusion 1 reads with."""
    from keifu.data.catalogue.catalogue import fetch
    from keifu.data.tokenizers.formats import READERS
    from keifu.data.tokenizers.load import load_tokenizer

    for folder in (path.parent / TOKENIZER, path.parent):
        if any((folder / name).exists() for name in READERS):
            return load_tokenizer(folder)
    want = f"{path} holds no tokenizer, and none lies beside it (in {path.parent / TOKENIZER})"
    if config.vocab_size != clip_text.Config().vocab_size:
        raise UserError(f"{want}: its {config.vocab_size:,} tokens are not CLIP's. Put the right one there.")
    try:
        return load_tokenizer(fetch("clip-bpe"))
    except (UserError, OSError) as error:
        raise UserError(f"{want}; CLIP's could not be had either (keifu data get clip-bpe): {error}") from error
