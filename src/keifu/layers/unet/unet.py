"""The U-Net (Ronneberger et al., 2015; Ho et al., 2020, appendix B): downsampling stages, upsampling stages, and skip
connections between them.

Its parts are passed in, so that conditioning (on a text, for example) is left to the stages' attentions.

Axes: batch, channels, height, width. `context` goes to the attentions.
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
    """Residual blocks at one resolution, an attention after each if there are any, and the way to the next resolution,
    if one follows.
    """

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
        """Apply the residual block of that number, and the attention that follows it, if there is one."""
        x = self.residuals[index](x, time)
        return self.attentions[index](x, **context) if index < len(self.attentions) else x


class Down(Stage):
    """A stage of the way down: gives every state that the way up will see again, the last of them its result."""

    def forward(self, x: Pixels, time: Time, **context: Any) -> list[Tensor]:
        states = []
        for index in range(len(self.residuals)):
            x = self.block(index, x, time, context)
            states.append(x)
        return states if self.resample is None else [*states, self.resample(x, time)]


class Middle(Stage):
    """A stage whose states nothing reads again: the coarsest one, with a residual block more than there are attentions,
    or any of a network that goes one way."""

    def forward(self, x: Pixels, time: Time | None = None, **context: Any) -> Resampled:
        for index in range(len(self.residuals)):
            x = self.block(index, x, time, context)
        return x if self.resample is None else self.resample(x)


class Up(Stage):
    """A stage of the way up: each residual block reads one of the `states` too, the newest first. An `Upsample` that
    leads out of it is given the size of the next one."""

    def forward(self, x: Pixels, states: list[Tensor], time: Time, **context: Any) -> Resampled:
        for index in range(len(self.residuals)):
            x = self.block(index, torch.cat([x, states[-1 - index]], 1), time, context)
        if isinstance(self.resample, Upsample):
            return self.resample(x, states[-1 - len(self.residuals)].shape[2:])
        return x if self.resample is None else self.resample(x, time)


class UNet(nn.Module):
    """first → down stages → middle → up stages → last(swish(norm(·))); sides must be multiples of `factor`, or of 1
    where every stage can take half a pixel for a whole one (`flexible`)."""

    def __init__(
        self,
        first: nn.Module,
        down: Sequence[Down],
        middle: Middle | None,
        up: Sequence[Up],
        norm: nn.Module,
        last: nn.Module,
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
            # not by del: a checkpoint reads the list that it was given once more
            states = states[: -len(stage.residuals)]  # pyright: ignore[reportArgumentType]
        return self.last(F.silu(self.norm(x)))


def check_sides(height: int, width: int, factor: int) -> None:
    """Refuse images whose sides are not multiples of `factor`, with the nearest size that fits, in a `UserError`."""
    near = [max(1, round(side / factor)) * factor for side in (height, width)]
    if near != [height, width]:
        raise UserError(
            f"A size of {height} x {width} does not fit this network, whose sides are multiples of {factor}: the "
            f"nearest size that does is {near[0]} x {near[1]} (height x width)."
        )
