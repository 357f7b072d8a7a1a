"""Autoregressive image generation (DALL-E): predicts the image tokens of a text one after another, then decodes them.

Axes: batch, text = tokens of every text, rows and columns of the grid of image tokens, codebook.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from keifu.errors import UserError
from keifu.inference.images.latent_diffusion import TextPipeline
from keifu.inference.images.pixel_diffusion import BY_TOKEN, Bytes, ImageRequest, changed_settings, to_pixels
from keifu.inference.images.samplers import SamplerStep, Watch
from keifu.inference.text.sampler import sample
from keifu.layers.attention.masks import real_tokens
from keifu.layers.counter_rng import uniform

Codes = Int[Tensor, "batch rows columns"]
# settings of `ImageRequest` that are used, see `resolved`
HEEDED = ("seed", "count", "text", "truncate", "size", "steps", "spacing")


@torch.inference_mode()
def sample_image_tokens(
    model: Any, tokens: Int[Tensor, "batch text"], real: Bool[Tensor, "batch text"], seeds: Sequence[int],
    watch: Callable[[Codes], object] = lambda codes: None,
) -> Codes:  # fmt: skip
    """Sample a grid of image tokens for each text, one token after another. The seed of a picture decides its random
    numbers.

    watch: called with the grid after each token; missing tokens are 0.
    """
    height, width = model.config.grid.height, model.config.grid.width
    codes = torch.zeros(len(tokens), height * width, dtype=torch.long, device=tokens.device)
    signed = torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], device=tokens.device)  # as int64
    logits, state = model.prefill(tokens, real)
    for position in range(height * width):
        codes[:, position] = sample(logits.float(), uniform(signed, torch.full_like(signed, position)))
        watch(codes.unflatten(1, (height, width)))
        if position + 1 < height * width:
            logits = model.decode(codes[:, position], position, state)
    return codes.unflatten(1, (height, width))


class AutoregressivePipeline(TextPipeline):
    """Pipeline of an autoregressive model of image tokens. It has no diffusion sampler and no guidance."""

    def resolved(self, request: ImageRequest) -> ImageRequest:
        """Return the request with all defaults. Raises `UserError` for a setting of diffusion."""
        if request.text is None:
            raise UserError("This model draws from a text, and there is none: say what to draw.")
        if changed := changed_settings(request, HEEDED):
            raise UserError(
                f"This model says a picture entry by entry and removes no noise, so {' and '.join(changed)} mean "
                "nothing to it: leave them out."
            )
        grid, size = self.model.config.grid, self.model.config.size
        for name, fixed in (("steps", grid.cells), ("size", size)):
            if vars(request)[name] not in (None, fixed):
                raise UserError(f"{name} is {vars(request)[name]}, and this model's is always {fixed}: leave it out.")
        self.tokens([request.text], request.truncate)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return replace(request, sampler=BY_TOKEN, steps=grid.cells, size=size, seed=seed)

    @torch.inference_mode()
    def draw(
        self, request: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None,
        texts: Sequence[str] | None = None,
    ) -> Bytes:  # fmt: skip
        """Draw like `LatentDiffusionPipeline.draw`; `watch` is called with the grid after each token."""
        tokens = self.tokens(texts or [request.text or ""] * len(seeds), request.truncate)
        text_inputs = tokens.to(self.device), real_tokens(tokens, self.tokenizer.eos_id).to(self.device)
        codes = sample_image_tokens(self.model, *text_inputs, seeds, lambda codes: watch(SamplerStep(codes, codes)))
        return to_pixels(self.model.to_pictures(codes))
