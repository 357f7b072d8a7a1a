"""The networks of `keifu train unclip` around a CLIP, and what that CLIP sees in pictures; knows no training.

Axes: picture, channels, height, width; embedding = numbers of CLIP's vectors.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.data.pictures import Pictures
from keifu.errors import UserError
from keifu.evaluation.shared_space import preprocessing
from keifu.layers.noise import Noise
from keifu.models import clip, clip_image, ddpm, unclip, unclip_conditions, unclip_decoder, unclip_prior

CHUNK = 64  # pictures that CLIP sees at a time


def configured(recipe: Any, towers: clip.Config) -> unclip.Config:
    """The whole model's Config around a CLIP's; as many groups of norms as divide every level, of 4 channels each."""
    text, image, widths = towers.text, cast(clip_image.Config, towers.image), recipe.widths
    if "patch_size" not in vars(image) or text.dim != text.embedding_dim:
        raise UserError(
            f"This CLIP has {text.dim} numbers a token and {text.embedding_dim} in its space, or is a ResNet: unCLIP "
            "needs one with a vision transformer whose text tower is as wide as its space."
        )
    if wrong := [level for level in recipe.attention if not 0 <= level < len(widths)]:
        raise UserError(f"attention names level {wrong[0]}, and there are levels 0 to {len(widths) - 1}.")
    decoder = unclip_decoder.Config(
        size=recipe.small, widths=widths, n_residual_blocks=recipe.residual_blocks, attention=recipe.attention,
        up_attention=recipe.attention, head_dim=math.gcd(32, *widths), context_dim=recipe.context_dim,
        norm_groups=_groups(widths),
    )  # fmt: skip
    upsampler = None if recipe.small == recipe.size else _upsampler(recipe)
    return unclip.Config(
        text=text,
        conditions=unclip_conditions.Config(4, text.embedding_dim, decoder.time_width, recipe.context_dim),
        decoder=decoder,
        prior=unclip_prior.Config(
            text.context_length, text.embedding_dim, n_layers=recipe.prior_layers, n_heads=recipe.prior_heads,
            head_dim=recipe.head_dim,
        ),
        image=image,
        pixels=towers.pixels,
        upsampler=upsampler,
        last_upsampler=upsampler,
        prior_noise=replace(unclip.PRIOR, steps=recipe.noise_steps),
        decoder_noise=replace(unclip.DECODER, steps=recipe.noise_steps, target=recipe.target),
    )  # fmt: skip


def _upsampler(recipe: Any) -> ddpm.Config:
    widths = recipe.upsampler_widths
    levels = tuple(range(len(widths)))
    return replace(
        ddpm.SIZES["karlo-upsampler"], size=recipe.size, dim=widths[0], n_residual_blocks=1,
        multipliers=tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        residual_down=levels[:-1], residual_up=levels[1:], norm_groups=_groups(widths), middle_groups=_groups(widths),
        noise=Noise("cosine", recipe.noise_steps, target=recipe.target, spacing="linspace"),
    )  # fmt: skip


def _groups(widths: tuple[int, ...]) -> int:
    return math.gcd(32, max(1, widths[0] // 4), *widths)


@torch.no_grad()
def embedded(towers: clip.Clip, pictures: Pictures) -> Float[Tensor, "picture embedding"]:
    """CLIP's embeddings of pictures, of any length: made once."""
    ready, device = preprocessing(towers), next(towers.parameters()).device
    firsts = range(0, len(pictures), CHUNK)
    batches = (pictures.take(slice(first, first + CHUNK)) for first in firsts)
    return torch.cat([towers.encode_image(ready.normalised(pixels.to(device))).cpu() for pixels in batches])
