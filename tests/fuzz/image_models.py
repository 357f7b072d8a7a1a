"""Small models that draw or see, in the files in which they are published; what reads each to its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.checkpoints.lora.diffusion import attach_lora, save_lora
from keifu.checkpoints.lora.peft import layers
from keifu.data.tokenizers import bpe
from keifu.layers.lora import LoraSettings, adapters, attach
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.dalle import dalle, discrete_vae
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, ddpm, latent_diffusion
from keifu.models.hf.image_processor import Pixels
from keifu.models.unclip import conditioning, decoder as unclip_decoder, prior as unclip_prior, unclip

UPSAMPLER = ddpm.Config(
    16, channels=6, out_channels=3, dim=8, multipliers=(1, 1), n_residual_blocks=1, attention=(), up_attention=(),
    norm_groups=4, middle_attention=False, residual_down=(0,), residual_up=(1,), pad_around=True, cosine_first=True,
    frequency_shift=0.0, noise=unclip.UPSAMPLER.noise,
)  # fmt: skip


def load_model(*inputs: torch.Tensor) -> Callable[[Path], None]:
    """Return a reader that loads a model, runs it on these inputs and uses its tokenizer."""

    def read(folder: Path) -> None:
        model, tokenizer = checkpoints.load(folder)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("a red heart"))
        with torch.no_grad():
            model(*inputs)

    return read


def _captions() -> Any:
    return bpe.learn(["a red heart", "a blue cat"] * 5, 520)


def clip_towers(kind: str | None = None) -> Callable[[Path], None]:
    """Return a maker of a CLIP, in that kind of file."""

    def make(folder: Path) -> None:
        tokenizer = _captions()
        text = clip_text.Config(tokenizer.vocab_size, 12, 12, 48, 1, 3, end_id=tokenizer.eos_id, embedding_dim=6)
        image = clip_image.Config(14, 7, 3, 12, 48, 1, 3, embedding_dim=6)
        model = clip.build(clip.Config(text, image, pixels=Pixels(14, 14)))
        checkpoints.save(model, tokenizer, folder, kind=kind)

    return make


def pixels(folder: Path) -> None:
    config = ddpm.Config(
        8, dim=8, multipliers=(1, 1), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4
    )
    checkpoints.save(ddpm.build(config), None, folder)


def latents(folder: Path) -> None:
    tokenizer = _captions().replace(max_length=12)
    text = clip_text.Config(tokenizer.vocab_size, 12, 16, 24, 1, 2, end_id=tokenizer.eos_id, projected=False)
    unet = conditioned_unet.Config(4, 2, 2, (8,), 1, (0,), (0,), 2, context_dim=16, norm_groups=4)
    autoencoder = autoencoder_kl.Config(8, 3, 2, (4, 8), 1, 4, scale=1.0)
    checkpoints.save(latent_diffusion.build(latent_diffusion.Config(text, unet, autoencoder)), tokenizer, folder)


def single_file(folder: Path) -> None:
    from compvis import single_file

    single_file(folder)


def unclip_parts(folder: Path) -> None:
    """Make every part that an unCLIP may have."""
    tokenizer = _captions().replace(max_length=12)
    text = clip_text.Config(tokenizer.vocab_size, 12, 14, 20, 1, 2, end_id=tokenizer.eos_id, embedding_dim=14)
    decoder = unclip_decoder.Config(
        8, 3, 6, widths=(12, 20), n_residual_blocks=1, attention=(1,), up_attention=(1,), head_dim=5, context_dim=11,
        norm_groups=4,
    )  # fmt: skip
    told = conditioning.Config(3, 14, decoder.time_width, 11)
    image = clip_image.Config(14, 7, 3, 12, 24, 1, 3, embedding_dim=14)
    config = unclip.Config(
        text, told, decoder, unclip_prior.Config(12, 14, n_layers=1, n_heads=3, head_dim=7), image, Pixels(),
        UPSAMPLER, UPSAMPLER,
    )  # fmt: skip
    checkpoints.save(unclip.build(config), tokenizer, folder)


def image_tokens(folder: Path) -> None:
    """Save a DALL-E."""
    tokenizer = _captions().replace(max_length=5)
    vae = discrete_vae.Config(12, 3, 9, (8, 12), 1, 5)
    config = dalle.Config(tokenizer.vocab_size, 5, 24, 40, 2, 3, kernel=3, vae=vae)
    checkpoints.save(dalle.build(config), tokenizer, folder)


def autoencoder(folder: Path) -> None:
    """Save a DALL-E's autoencoder alone."""
    checkpoints.save(discrete_vae.build(discrete_vae.Config(12, 3, 9, (8, 12), 1, 5)), None, folder)


def loras(folder: Path) -> None:
    """Make one LoRA in each of the three spellings."""
    latents(folder / "base")
    model, _ = checkpoints.load(folder / "base")
    known = [target for label, target in layers(model).items() if "attn" in label][:4]
    attach(model, dict.fromkeys(known, LoraSettings(2, 4.0)))
    for adapter in adapters(model):
        torch.nn.init.normal_(adapter.b)
    for style in ("peft", "diffusers", "kohya"):
        save_lora(model, folder / f"{style}.safetensors", style)


def read_loras(folder: Path) -> None:
    for style in ("peft", "diffusers", "kohya"):
        model, _ = checkpoints.load(folder / "base")
        attach_lora(model, folder / f"{style}.safetensors")


UNET = tuple(f"unet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors"))
PIPELINE = "model_index.json", "scheduler/scheduler_config.json", *UNET
LATENT = (
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
    "text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip
NETWORKS = tuple(
    f"{part}/{name}"
    for part in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
    for name in ("config.json", "diffusion_pytorch_model.safetensors")
)
ENCODERS = tuple(f"{part}/{name}" for part in ("text_encoder", "image_encoder")
                 for name in ("config.json", "model.safetensors"))  # fmt: skip
SCHEDULERS = tuple(f"{part}_scheduler/scheduler_config.json" for part in ("prior", "decoder", "super_res"))
UNCLIP = ("model_index.json", "feature_extractor/preprocessor_config.json", *NETWORKS, *ENCODERS, *SCHEDULERS)
