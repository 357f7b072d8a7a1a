"""Building a U-Net from a Config. The attention layers are passed in, since they differ from model to model.

The Config has the fields of `ddpm.Config` that describe the stages. Levels count resolutions from 0, the finest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.activations import activation
from keifu.layers.unet.conv import AdaptiveResidualBlock, Downsample, ResidualBlock, Upsample
from keifu.layers.unet.timestep_embedding import TimeEmbedding, TimestepSinusoids
from keifu.layers.unet.unet import Down, Middle, UNet, Up
from keifu.models.hf.unet import up_levels


def assemble_unet(config: Any, attention: Callable[[int, int], nn.Module], middle_attention: nn.Module | None) -> UNet:
    """Build the network. attention: builds an attention from (level, width). middle_attention: of the middle stage.

    An upsampling level has one residual block more: each block reads a downsampling state, or the first convolution's.
    """
    widths, n_blocks, residual = config.widths, config.n_residual_blocks, _residual(config)

    def attentions(levels: tuple[int, ...], level: int, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        return [attention(level, widths[level]) for _ in blocks if level in levels]

    def shrink(level: int, width: int) -> nn.Module | None:
        if level == len(widths) - 1:
            return None
        if level in config.residual_down:
            return _residual(config, resample=nn.AvgPool2d(2))(width, width)
        return Downsample(width, config.pad_around)

    def grow(level: int, width: int) -> nn.Module | None:
        if level == 0:
            return None
        if level in config.residual_up:
            return _residual(config, resample=nn.Upsample(scale_factor=2.0))(width, width)
        return Upsample(width)

    down, up, states = [], [], [widths[0]]
    for level, width in enumerate(widths):
        blocks = [residual(channels, width) for channels in (states[-1], *[width] * (n_blocks - 1))]
        down.append(Down(blocks, attentions(config.attention, level, blocks), shrink(level, width)))
        states += [width] * (n_blocks + (down[-1].resample is not None))
    below = widths[-1]
    for level, width in reversed([*enumerate(widths)]):
        blocks = [residual(states.pop() + (width if index else below), width) for index in range(n_blocks + 1)]
        up.append(Up(blocks, attentions(up_levels(config), level, blocks), grow(level, width)))
        below = width
    first = nn.Conv2d(config.channels, widths[0], 3, padding=1)
    last = nn.Conv2d(widths[0], config.predicted_channels, 3, padding=1)
    norm = group_norm(config, config.norm_groups)(widths[0])
    return UNet(first, down, _middle(config, middle_attention), up, norm, last)


def time_embedding(config: Any, dim: int, table: nn.Module | None = None) -> TimeEmbedding:
    """Return the embedding of the noise level, or of another number. table: a learned table; None: sinusoids."""
    table = table or TimestepSinusoids(dim, config.frequency_shift, config.cosine_first)
    return TimeEmbedding(table, dim, config.time_width)


def _middle(config: Any, attention: nn.Module | None) -> Middle | None:
    if not config.middle:
        return None
    residual, width = _residual(config, scale=config.middle_scale), config.widths[-1]
    return Middle([residual(width, width) for _ in range(2)], [attention] if attention else [])


def group_norm(config: Any, groups: int) -> Callable[[int], nn.Module]:
    """Return a function that builds a group norm for a number of channels, which `groups` must divide."""
    return partial(nn.GroupNorm, groups, eps=config.norm_eps)


def _residual(config: Any, **changed: Any) -> Callable[[int, int], ResidualBlock]:
    block = AdaptiveResidualBlock if config.scale_shift else ResidualBlock
    shared = {"time_dim": config.time_width, "activation": activation(config.activation), "dropout": config.dropout}
    return partial(block, norm=group_norm(config, config.norm_groups), **shared, **changed)
