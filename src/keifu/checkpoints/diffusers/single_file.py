"""Single-file checkpoints of Stable Diffusion 1 (CompVis's tensor names, .safetensors), read as a diffusers pipeline.

The tensors get diffusers' names, and the Config is inferred from their shapes, since the file has no config. Values
that shapes do not show are the same in every Stable Diffusion 1: 8 heads in the U-Net, a head dimension of 64 in the
text encoder, and the autoencoder's scale.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keifu.checkpoints.diffusers.pipeline import LATENT, TOKENIZER, tower_names
from keifu.checkpoints.hf.read import open_weights, stored_of
from keifu.checkpoints.plan import Source, StoredTensor
from keifu.checkpoints.registry import FAMILIES
from keifu.errors import UserError
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, latent_diffusion

Shapes = Mapping[str, tuple[int, ...]]
UNET, CODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
PARTS = {"U-Net": UNET, "autoencoder": CODER, "text encoder": TEXT}
OTHERS = {  # prefixes of tensors in files of other models
    "conditioner.": "a Stable Diffusion XL",
    "cond_stage_model.model.": "a Stable Diffusion 2, whose pipeline folder keifu reads",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3",
    "double_blocks.": "a FLUX",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA: give it with --lora, and the model that it changes",
    "unet.": "a LoRA, or part of a pipeline: give it with --lora, or the pipeline's folder",
    "down_blocks.": "a part of a diffusers pipeline: give the pipeline's folder",
}
LEFT_OUT = ("model_ema.", "first_stage_model.loss.")  # the moving average of the training, and the loss's network
COUNTS = 8, 64  # number of heads of the U-Net; head dimension of the text encoder
UNET_NAMES = {  # a part of a name between dots → diffusers' name
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
CODER_NAMES = {  # regular expressions for names of the encoder and the decoder
    r"mid\.block_1\.": "mid_block.resnets.0.",
    r"mid\.block_2\.": "mid_block.resnets.1.",
    r"mid\.attn_1\.norm": "mid_block.attentions.0.group_norm",
    r"mid\.attn_1\.([qkv])\b": r"mid_block.attentions.0.to_\1",
    r"mid\.attn_1\.proj_out": "mid_block.attentions.0.to_out.0",
    r"norm_out": "conv_norm_out",
    r"nin_shortcut": "conv_shortcut",
    r"\.down\.(\d+)\.": r".down_blocks.\1.",
    r"\.(down|up)sample\.": r".\1samplers.0.",
    r"\.block\.": ".resnets.",
}


def open_single_file(path: Path) -> Source:
    """Open a file of Stable Diffusion 1. Its weights are memory-mapped and not yet read.

    Raises UserError that says which, for a file of another kind or one that lacks a part.
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
    file_tensors = {name: stored_of(file.get_slice(name)) for name in names if name not in gone}
    shapes = {name: tensor.shape for name, tensor in file_tensors.items()}
    try:
        config = config_of(shapes, {name: file.get_tensor(name) for name in ("betas", "scale_factor") if name in gone})
        sources = {rename_weights(name, config): name for name in file_tensors}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is no Stable Diffusion 1 as keifu knows it: {error} cannot be read.") from error
    stored = {new: _flat(new, file_tensors[old]) for new, old in sources.items()}
    notes = (f"Left out, as not part of the model: {len(gone)} tensors of the training.",) if gone else ()
    family = FAMILIES[LATENT]

    def read(name: str) -> Tensor:
        return file.get_tensor(sources[name]).reshape(stored[name].shape)

    return Source(
        path, "CompVis's file", family, config, stored, read, partial(_read_tokenizer, path, config),
        tower_names(family, stored), notes=notes,
    )  # fmt: skip


def _check(path: Path, names: Sequence[str]) -> None:
    for start, what in OTHERS.items():
        if any(name.startswith(start) for name in names):
            raise UserError(f"{path} is {what}; keifu reads single files of Stable Diffusion 1 only.")
    missing_parts = [what for what, start in PARTS.items() if not any(name.startswith(start) for name in names)]
    if len(missing_parts) == len(PARTS):
        raise UserError(f"{path} holds no Stable Diffusion; of another model, give the folder with its config.json.")
    if missing_parts:
        raise UserError(f"{path} lacks its {' and its '.join(missing_parts)} ({PARTS[missing_parts[0]]}*).")


def config_of(shapes: Shapes, extra: Mapping[str, Tensor]) -> latent_diffusion.Config:
    """Infer the Config from the tensors' shapes. extra: the file's betas and scale_factor, if it has them."""
    noise = latent_diffusion.NOISE
    if "betas" in extra and not torch.allclose(extra["betas"].float(), noise.beta, rtol=1e-4, atol=0):
        noise = replace(noise, betas=tuple(extra["betas"].tolist()), steps=len(extra["betas"]))
    coder = _autoencoder(shapes)
    if "scale_factor" in extra:
        coder = replace(coder, scale=float(extra["scale_factor"]))
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
    changes = [int(match[1]) for name in inner if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
    blocks = min(changes) - 1  # per level: the blocks before the first change of resolution
    ends = range(0, _count(inner, r"input_blocks\.(\d+)\."), blocks + 1)
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
    return 1 + max(int(match[1]) for name in names if (match := re.match(pattern, name)))


def rename_weights(name: str, config: latent_diffusion.Config) -> str:
    """Return diffusers' name of one tensor, with the prefix of its part of the pipeline."""
    if name.startswith(TEXT):
        return f"text_encoder.{name.removeprefix(TEXT)}"
    if name.startswith(CODER):
        assert config.autoencoder is not None
        return f"vae.{_autoencoder_name(name.removeprefix(CODER), len(config.autoencoder.widths))}"
    return f"unet.{_unet_name(name.removeprefix(UNET), config.unet)}" if name.startswith(UNET) else name


def _unet_name(name: str, config: conditioned_unet.Config) -> str:
    new = f".{name}"
    for old, part in UNET_NAMES.items():
        new = new.replace(f".{old}.", f".{part}.")
    match = re.fullmatch(r"\.(in|out)put_blocks\.(\d+)\.(\d+)\.(op\.|conv\.)?(.+)", new)
    if not match:
        if new == f".{name}":
            raise ValueError(f"the tensor {name}")
        return new[1:]
    way, first = ("down", 1) if match[1] == "in" else ("up", 0)
    level, block = divmod(int(match[2]) - first, config.n_residual_blocks + 1)
    part = f"{way}samplers.0.conv" if match[4] else f"{'attentions' if int(match[3]) else 'resnets'}.{block}"
    return f"{way}_blocks.{level}.{part}.{match[5]}"


def _autoencoder_name(name: str, levels: int) -> str:
    for pattern, new in CODER_NAMES.items():
        name = re.sub(pattern, new, name)
    return re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)


def _flat(name: str, stored: StoredTensor) -> StoredTensor:
    """Return the shape of an attention weight of the autoencoder as a matrix; here it is a 1×1 convolution."""
    is_attention = name.startswith("vae.") and ".attentions." in name
    return stored._replace(shape=stored.shape[:2]) if is_attention and len(stored.shape) == 4 else stored


def _read_tokenizer(path: Path, config: latent_diffusion.Config) -> Any:
    """Return the tokenizer in the file's folder, or CLIP's from the catalogue if there is none: every Stable Diffusion
    1 uses CLIP's."""
    from keifu.data.catalogue.catalogue import fetch
    from keifu.data.tokenizers.formats import READERS
    from keifu.data.tokenizers.load import load_tokenizer

    for folder in (path.parent / TOKENIZER, path.parent):
        if any((folder / name).exists() for name in READERS):
            return load_tokenizer(folder)
    want = f"{path} holds no tokenizer, and there is none next to it (in {path.parent / TOKENIZER})"
    if config.vocab_size != clip_text.Config().vocab_size:
        raise UserError(f"{want}: its {config.vocab_size:,} tokens are not CLIP's. Put the right one there.")
    try:
        return load_tokenizer(fetch("clip-bpe"))
    except (UserError, OSError) as error:
        raise UserError(f"{want}; CLIP's could not be had either (keifu data get clip-bpe): {error}") from error
