"""Drawings of coloured shapes with names in two languages, and a small CLIP of them, for recipes that read captions."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from keifu import checkpoints
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models.clip import image as clip_image, text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, latent_diffusion
from keifu.recipes.images import clip
from keifu.training.settings import Settings

COLOURS = {"red": ("赤", (220, 30, 30)), "green": ("緑", (30, 200, 30)), "blue": ("青", (30, 30, 220))}
SHAPES = {"disc": "円", "bar": "棒"}
SIZES = {"small": ("小", 4), "large": ("大", 11), "medium": ("中", 7)}


def drawings(folder: Path) -> Path:
    """Return 18 pictures of 24 x 24 pixels with English and Japanese captions."""
    rows = []
    for colour, (colour_ja, rgb) in COLOURS.items():
        for shape, shape_ja in SHAPES.items():
            for size, (size_ja, radius) in SIZES.items():
                image = Image.new("RGB", (24, 24), "white")
                height = radius if shape == "disc" else 2
                box = (12 - radius, 12 - height, 12 + radius, 12 + height)
                draw = ImageDraw.Draw(image)
                (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=rgb)
                name = f"{size}-{colour}-{shape}.png"
                image.save(folder / name)
                texts = {"text_en": f"a {size} {colour} {shape}", "text_ja": f"{size_ja}{colour_ja}{shape_ja}"}
                rows.append({"file_name": name, **texts})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return folder


def small_clip(data: Path, **changes: object) -> clip.Recipe:
    """Return the recipe for CLIP at a size that learns in a second."""
    image = clip_image.Config(24, 6, 3, 24, 48, 1, 2, embedding_dim=16)
    text = clip_text.Config(600, 16, 24, 48, 1, 2, embedding_dim=16)
    settings = Settings(
        steps=30, batch_size=8, learning_rate=3e-3, warmup=3, evaluate_every=15, sample_every=15, save_every=10,
        precision="float32",
    )  # fmt: skip
    made = clip.Recipe(data=str(data), vocab_size=600, image=image, text=text, training=settings)
    return replace(made, **changes)


def small_pipeline(data: Path, folder: Path, noise: Noise = latent_diffusion.Config.noise, spread: float = 0.0) -> Path:
    """Save a latent diffusion of 16 x 16 pixels with random weights and a tokenizer of these captions; `spread` is the
    deviation of what each weight gets besides."""
    tokenizer = clip.prepare(small_clip(data)).tokenizer
    torch.manual_seed(3)
    text = clip_text.Config(tokenizer.vocab_size, 16, 24, 48, 1, 2, projected=False)
    unet = conditioned_unet.Config(
        size=8, channels=3, predicted_channels=3, widths=(8, 16), n_residual_blocks=1, attention=(0, 1),
        up_attention=(0, 1), n_heads=2, context_dim=24, norm_groups=4,
    )  # fmt: skip
    small = autoencoder_kl.Config(16, 3, 3, widths=(4, 8), n_residual_blocks=1, norm_groups=2, scale=0.7)
    made = latent_diffusion.build(latent_diffusion.Config(text, unet, small, noise))
    with torch.no_grad():
        for parameter in made.parameters() if spread else ():
            parameter.add_(spread * torch.randn(parameter.shape))
    checkpoints.save(made, tokenizer, folder)
    return folder
