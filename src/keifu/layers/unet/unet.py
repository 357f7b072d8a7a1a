"""The U-Net (Ronneberger et al., 2015; Ho et al., 2020, appendix B): downsampling stages, upsampling stages, and skip
connections between them.

Its parts are passed in; the stages' attentions handle conditioning (on a text, for example).

Axes: batch, channels, height, width. `context` is passed to the attentions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.unet.conv import Downsample, Pixels, Resampled, Upsample

Time = Float[Tensor, "batch time_dim"]


class Stage(nn.Module):
    """Residual blocks at one resolution, optionally an attention after each, and optionally a change to the next
    resolution."""

    def __init__(
        self, residuals: Sequence[nn.Module], attentions: Sequence[nn.Module] = (), resample: nn.Module | None = None
    ):
        super().__init__()
        self.residuals, self.attentions = nn.ModuleList(residuals), nn.ModuleList(attentions)
        self.resample = resample

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks and the attentions."""
        return [*self.residuals, *self.attentions]

    def block(self, index: int, x: Pixels, time: Time | None, context: dict[str, Any]) -> Resampled:
        """Apply the residual block `index`, and the attention after it, if there is one."""
        x = self.residuals[index](x, time)
        return self.attentions[index](x, **context) if index < len(self.attentions) else x


class Down(Stage):
    """A downsampling stage. It returns all states that the upsampling stages will read; the last one is its result."""

    def forward(self, x: Pixels, time: Time, **context: Any) -> list[Tensor]:
        states = []
        for index in range(len(self.residuals)):
            x = self.block(index, x, time, context)
            states.append(x)
        return states if self.resample is None else [*states, self.resample(x, time)]


class Middle(Stage):
    """A stage without skip connections: the coarsest one, which has one residual block more than attentions, or any
    stage of a network without upsampling."""

    def forward(self, x: Pixels, time: Time | None = None, **context: Any) -> Resampled:
        for index in range(len(self.residuals)):
            x = self.block(index, x, time, context)
        return x if self.resample is None else self.resample(x)


class Up(Stage):
    """An upsampling stage. Each residual block also reads one of the `states`, the newest first. An `Upsample` at the
    end enlarges to the size of the next state."""

    def forward(self, x: Pixels, states: list[Tensor], time: Time, **context: Any) -> Resampled:
        for index in range(len(self.residuals)):
            x = self.block(index, torch.cat([x, states[-1 - index]], 1), time, context)
        if isinstance(self.resample, Upsample):
            return self.resample(x, states[-1 - len(self.residuals)].shape[2:])
        return x if self.resample is None else self.resample(x, time)


class UNet(nn.Module):
    """Network first → down stages → middle → up stages → last(swish(norm(·))).

    The sides of images must be multiples of `factor`, unless every stage supports odd sizes (`flexible`).
    """

    def __init__(
        self, first: nn.Module, down: list[Down], middle: Middle | None, up: list[Up], norm: nn.Module, last: nn.Module
    ):
        super().__init__()
        self.first, self.down, self.middle = first, nn.ModuleList(down), middle
        self.up, self.norm, self.last = nn.ModuleList(up), norm, last
        self.factor = 2 ** sum(stage.resample is not None for stage in down)
        leads = [stage.resample for stage in (*down, *up) if stage.resample is not None]
        self.flexible = all(
            isinstance(lead, Upsample) or (isinstance(lead, Downsample) and lead.around) for lead in leads
        )

    def forward(self, x: Pixels, time: Time, **context: Any) -> Float[Tensor, "batch out_channels height width"]:
        x = self.first(x).contiguous(memory_format=torch.channels_last)
        states = [x]
        for stage in self.down:
            states += stage(states[-1], time, **context)
        x = states[-1] if self.middle is None else self.middle(states[-1], time, **context)
        for stage in self.up:
            x = stage(x, states, time, **context)
            # not by del: activation checkpointing reads the original list again
            states = states[: -len(stage.residuals)]  # pyright: ignore[reportArgumentType]
        return self.last(F.silu(self.norm(x)))


def check_sides(height: int, width: int, factor: int) -> None:
    """Raise UserError, with the nearest size that fits, for images whose sides are not multiples of `factor`."""
    near = [max(1, round(side / factor)) * factor for side in (height, width)]
    if near != [height, width]:
        raise UserError(
            f"A size of {height} x {width} does not fit this network, whose sides are multiples of {factor}: the "
            f"nearest size that does is {near[0]} x {near[1]} (height x width)."
        )
