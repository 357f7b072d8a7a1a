"""diffusers' config.json and weight names of a U-Net.

Levels count resolutions from 0, the finest; diffusers lists upsampling stages from the coarsest.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from keifu.errors import unknown
from keifu.models.hf.config import Field, FieldGroup, Fields, choice, read_field


class Way(NamedTuple):
    """The published names of the stages of one way (down or up) through a U-Net.

    blocks: name → whether the stage has attention, and whether a residual block changes its resolution (None: see
    *sample_type). silent: the stages of a config that does not list them.
    """

    blocks: dict[str, tuple[bool, bool | None]]
    silent: Sequence[str] = ()


Ways = tuple[Way, Way]  # down and up
RESAMPLING = choice("", {"conv": False, "resnet": True})
PADDING = choice("downsample_padding", {1: True, 0: False})
SHIFTS = choice("resnet_time_scale_shift", {"default": False, "scale_shift": True})
SIZE = Field("sample_size", None, lambda size: tuple(size) if isinstance(size, list) else size)
SIZE_FIELDS: Fields = {
    "size": SIZE,
    "n_residual_blocks": Field("layers_per_block", 2),
    "norm_groups": Field("norm_num_groups", 32),
    "norm_eps": Field("norm_eps", 1e-5, float),
    "dropout": Field("dropout", 0.0, float),
    "time_dim": Field("time_embedding_dim", None),
    "cosine_first": Field("flip_sin_to_cos", True),
    "frequency_shift": Field("freq_shift", 0.0, float),
}
WIDTHS = (320, 640, 1280, 1280)
CONDITIONED_FIELDS = SIZE_FIELDS | {  # fields of every UNet2DConditionModel
    "channels": Field("in_channels", 4),
    "predicted_channels": Field("out_channels", 4),
    "widths": Field("block_out_channels", WIDTHS, tuple, list),
    "context_dim": Field("cross_attention_dim", 1280),
}

RESIDUAL = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
RESIDUAL |= {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
BLOCK = {  # names in diffusers' transformers
    "attention_norm": "norm1",
    "attention.qkv": "attn1.to_[q,k,v]",
    "attention.out": "attn1.to_out.0",
    "feedforward_norm": "norm3",
    "feedforward.down": "ff.net.2",
}
TIME = {"time.linear1": "time_embedding.linear_1", "time.linear2": "time_embedding.linear_2"}
ENDS = {"first": "conv_in", "norm": "conv_norm_out", "last": "conv_out"}
ATTENTION = {"norm": "group_norm", "attention.qkv": "to_[q,k,v]", "attention.out": "to_out.0"}


def nested(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """Add the prefix `ours` to our names and `theirs` to the published names of a part's weights."""
    return {f"{ours}.{name}": f"{theirs}.{published}" for name, published in names.items()}


def stage_names(ours: str, theirs: str, attention: Mapping[str, str]) -> dict[str, str]:
    """Return the weight names of a stage except its change of resolution. attention: names of its attentions' parts."""
    residuals = nested(f"{ours}.residuals.*", f"{theirs}.resnets.*", RESIDUAL)
    return residuals | nested(f"{ours}.attentions.*", f"{theirs}.attentions.*", attention)


def unet_names(attention: Mapping[str, str]) -> dict[str, str]:
    """Return the weight names of a U-Net and its timestep embedding. attention: names of its attentions' parts."""
    names = TIME | {f"unet.{ours}": theirs for ours, theirs in ENDS.items()}
    for way in ("down", "up"):
        names |= stage_names(f"unet.{way}.*", f"{way}_blocks.*", attention)
        names |= nested(f"unet.{way}.*.resample", f"{way}_blocks.*.{way}samplers.0", RESIDUAL | {"conv": "conv"})
    return names | stage_names("unet.middle", "mid_block", attention)


OLD_ATTENTION = {  # diffusers' names of attention's parts before version 0.15
    f"{new}.{leaf}": f"{old}.{leaf}"
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items()
    for leaf in ("weight", "bias")
}


STAGES = ("attention", "up_attention", "residual_down", "residual_up")  # fields of a Config that are levels


def stages(ways: Ways, widths: Sequence[int] = WIDTHS, names: Sequence[str] = STAGES[:2]) -> FieldGroup:
    """Return the group of the stages' published names. widths: those of a config that does not list them. names: those
    of `STAGES` that are fields of the Config."""

    def read(json: Mapping[str, Any]) -> dict[str, Any]:
        levels = _read_stages(json, json.get("block_out_channels", widths), ways)
        return {name: levels[name] for name in names}

    return FieldGroup(read, partial(write_stages, ways=ways))


def _read_stages(json: Mapping[str, Any], widths: Sequence[int], ways: Ways) -> dict[str, tuple[int, ...]]:
    """Return all fields in `STAGES`: the levels with attention of downsampling and of upsampling stages, then those
    whose resolution a residual block changes, again for both."""
    down, up = _read_way(json, "down", ways[0]), _read_way(json, "up", ways[1])[::-1]
    if not len(widths) == len(down) == len(up):
        numbers = f"{len(widths)} widths, {len(down)} stages down and {len(up)} up"
        raise ValueError(f"it has {numbers}, which should be as many.")
    leading = [residual for _, residual in down[:-1]], [False, *(residual for _, residual in up[1:])]
    switches = [attends for attends, _ in down], [attends for attends, _ in up], *leading
    levels = [tuple(level for level, on in enumerate(switch) if on) for switch in switches]
    return dict(zip(STAGES, levels, strict=True))


def _read_way(json: Mapping[str, Any], name: str, way: Way) -> list[tuple[bool, bool]]:
    """Return for each stage whether it has attention, and whether a residual block changes its resolution."""
    residual_type = read_field(json, RESAMPLING._replace(name=f"{name}sample_type"))
    stages = []
    for stage in json.get(f"{name}_block_types", way.silent):
        if (plain := stage.removeprefix("UNetRes")) not in way.blocks:
            raise unknown(f"block of the way {name}", stage, way.blocks)
        attends, residual = way.blocks[plain]
        stages.append((attends, residual_type if residual is None else residual))
    return stages


def up_levels(config: Any) -> tuple[int, ...]:
    """Return the upsampling levels of a Config with attention; None: the same as the downsampling ones."""
    return config.attention if config.up_attention is None else config.up_attention


def write_stages(config: Any, ways: Ways) -> dict[str, list[str]]:
    """Return the published names of a Config's stages."""
    levels, up_attention = range(len(config.widths)), up_levels(config)
    down = [_name(way=ways[0], attends=n in config.attention, residual=n in config.residual_down) for n in levels]
    up = [_name(way=ways[1], attends=n in up_attention, residual=n in config.residual_up) for n in levels]
    return {"down_block_types": down, "up_block_types": up[::-1]}


def _name(way: Way, attends: bool, residual: bool) -> str:
    return next(name for name, means in way.blocks.items() if means in ((attends, None), (attends, residual)))
