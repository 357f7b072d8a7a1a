"""Builds a U-Net from a Config; the attention layers are passed in, since they differ from model to model.

The Config has the fields of `ddpm.Config` that describe the stages. Levels count resolutions from 0, the finest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.activations import activation
from keifu.layers.unet.conv import AdaptiveResidualBlock, Downsample, ResidualBlock, Upsample
from keifu.layers.unet.timestep_embedding import TimeEmbedding, TimestepSinusoids
from keifu.layers.unet.unet import AtLevel, Middle, UNet, stages


def assemble_unet(config: Any, attention: AtLevel, middle_attention: nn.Module | None) -> UNet:
    """The network with such attentions at the levels that the Config names, and this one, or none, in the middle."""
    widths, down_levels = config.widths, config.attention
    up_levels = down_levels if config.up_attention is None else config.up_attention

    def attend(levels: tuple[int, ...], level: int, width: int) -> nn.Module | None:
        return attention(level, width) if level in levels else None

    def shrink(level: int, width: int) -> nn.Module:
        if level in config.residual_down:
            return _residual(config, resample=nn.AvgPool2d(2))(width, width)
        return Downsample(width, config.pad_around)

    def grow(level: int, width: int) -> nn.Module:
        if level in config.residual_up:
            return _residual(config, resample=nn.Upsample(scale_factor=2.0))(width, width)
        return Upsample(width)

    attentions = partial(attend, down_levels), partial(attend, up_levels)
    down, up = stages(widths, config.n_residual_blocks, _residual(config), attentions, (shrink, grow))
    first = nn.Conv2d(config.channels, widths[0], 3, padding=1)
    last = nn.Conv2d(widths[0], config.predicted_channels, 3, padding=1)
    norm = group_norm(config, config.norm_groups)(widths[0])
    return UNet(first, down, _middle(config, middle_attention), up, norm, last)


def time_embedding(config: Any, dim: int, table: nn.Module | None = None) -> TimeEmbedding:
    """The embedding of the noise level, or of another number, by a learned table or, without one, by sinusoids."""
    table = table or TimestepSinusoids(dim, config.frequency_shift, config.cosine_first)
    return TimeEmbedding(table, dim, config.time_width)


def _middle(config: Any, attention: nn.Module | None) -> Middle | None:
    if not config.middle:
        return None
    residual, width = _residual(config, scale=config.middle_scale), config.widths[-1]
    return Middle([residual(width, width) for _ in range(2)], [attention] if attention else [])


def group_norm(config: Any, groups: int) -> Callable[[int], nn.Module]:
    """A group norm for `channels` channels, which the number of groups must divide."""
    return partial(nn.GroupNorm, groups, eps=config.norm_eps)


def _residual(config: Any, **changed: Any) -> Callable[[int, int], ResidualBlock]:
    kind = AdaptiveResidualBlock if config.scale_shift else ResidualBlock
    shared = {"time_dim": config.time_width, "activation": activation(config.activation), "dropout": config.dropout}
    return partial(kind, norm=group_norm(config, config.norm_groups), **shared, **changed)
