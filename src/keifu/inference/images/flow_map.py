"""Image generation by a flow map (MeanFlow): a few jumps from noise to a picture, one by default.

A seed belongs to a picture, as in `pixel_diffusion`.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch

from keifu.errors import UserError
from keifu.inference.images.pixel_diffusion import (
    BY_JUMPS,
    Bytes,
    ImageRequest,
    Pipeline,
    SeededNoise,
    changed_settings,
    check_label,
    class_number,
    to_pixels,
    trained_size,
)
from keifu.inference.images.samplers import SamplerStep, Watch

HEEDED = ("seed", "count", "size", "steps", "sampler", "label", "guidance")  # settings of `ImageRequest` that are used


class FlowMapPipeline(Pipeline):
    """Pipeline of a model of mean velocities. It reads no text."""

    usual_sampler = BY_JUMPS
    pixels = False

    def label(self, name: str) -> int:
        """Return the number of a class by its name or number. Raises `UserError` for an unknown one."""
        return class_number(self.model.config, name)

    def resolved(self, request: ImageRequest) -> ImageRequest:
        """Return the request with all defaults. Raises `UserError` for a setting of other models."""
        if request.text is not None:
            raise UserError(f"This model reads no text, so {request.text!r} means nothing to it: leave it out.")
        changed = changed_settings(request, HEEDED)
        if request.sampler not in (BY_JUMPS, ImageRequest().sampler):
            changed.append("sampler")
        if changed:
            raise UserError(
                f"This model jumps from noise to a picture and has no levels between, so {' and '.join(changed)} mean "
                "nothing to it: leave them out."
            )
        size = trained_size(self.model)
        if request.size not in (None, size):
            raise UserError(f"size is {request.size}, and this model's is always {size}: leave it out.")
        check_label(self.model, request.label, request.guidance)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return replace(request, sampler=BY_JUMPS, steps=request.steps or 1, size=size, seed=seed)

    @torch.inference_mode()
    def draw(self, request: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """Draw an image for each seed, in jumps of equal length. Return uint8 on the CPU. `watch` is called with the
        state after each jump."""
        model, device, steps = self.model, self.device, request.steps or 1
        shape = len(seeds), model.config.channels, *trained_size(model)
        x = SeededNoise(seeds)(torch.empty(shape, dtype=torch.float32, device=device))
        label = None if request.label is None else torch.full((len(seeds),), request.label, device=device)
        span = torch.full((len(seeds),), 1 / steps, device=device)
        for step in range(steps, 0, -1):
            velocity = model(x, step * span, span, label)
            picture = x - step / steps * velocity
            x = x - velocity / steps
            watch(SamplerStep(x, picture))
        return to_pixels(x)
