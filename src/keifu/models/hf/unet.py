"""The config.json and the weight names that diffusers has for a U-Net.

Levels count resolutions from 0, the finest; diffusers lists the way up from the coarsest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from keifu.errors import unknown
from keifu.models.hf.config import Field, Fields, choice, read_field

# theirs -> whether the stage has attention; whether it changes the resolution in a residual block (None: see *_type)
Blocks = dict[str, tuple[bool, bool | None]]
DOWN: Blocks = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
}
UP: Blocks = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}
Layout = tuple[Sequence[int], Sequence[int]]
RESAMPLING = choice("", {"conv": False, "resnet": True})
PADDING = choice("downsample_padding", {1: True, 0: False})
SHIFTS = choice("resnet_time_scale_shift", {"default": False, "scale_shift": True})
SIZE_FIELDS: Fields = {
    "size": Field("sample_size", None, lambda size: tuple(size) if isinstance(size, list) else size),
    "n_residual_blocks": Field("layers_per_block", 2),
    "norm_groups": Field("norm_num_groups", 32),
    "norm_eps": Field("norm_eps", 1e-5, float),
    "dropout": Field("dropout", 0.0, float),
    "time_dim": Field("time_embedding_dim", None),
    "cosine_first": Field("flip_sin_to_cos", True),
    "frequency_shift": Field("freq_shift", 0.0, float),
}
CONDITIONED_FIELDS = SIZE_FIELDS | {  # of every UNet2DConditionModel
    "channels": Field("in_channels", 4),
    "predicted_channels": Field("out_channels", 4),
    "widths": Field("block_out_channels", (320, 640, 1280, 1280), tuple, list),
    "context_dim": Field("cross_attention_dim", 1280),
}

RESIDUAL = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
RESIDUAL |= {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "attention.qkv": "to_[q,k,v]", "attention.out": "to_out.0"}


def unet_names(attention: Mapping[str, str]) -> dict[str, str]:
    """The names of a U-Net's weights, whose attentions have parts of these names."""
    stages = {
        "down.*.residuals.*": ("down_blocks.*.resnets.*", RESIDUAL),
        "down.*.attentions.*": ("down_blocks.*.attentions.*", attention),
        "down.*.resample": ("down_blocks.*.downsamplers.0", RESIDUAL | {"conv": "conv"}),
        "middle.residuals.*": ("mid_block.resnets.*", RESIDUAL),
        "middle.attentions.*": ("mid_block.attentions.*", attention),
        "up.*.residuals.*": ("up_blocks.*.resnets.*", RESIDUAL),
        "up.*.attentions.*": ("up_blocks.*.attentions.*", attention),
        "up.*.resample": ("up_blocks.*.upsamplers.0", RESIDUAL | {"conv": "conv"}),
    }
    inner = {f"{ours}.{part}": f"{theirs}.{name}" for ours, (theirs, parts) in stages.items()
             for part, name in parts.items()}  # fmt: skip
    return {"first": "conv_in", "norm": "conv_norm_out", "last": "conv_out"} | inner


UNET_NAMES = unet_names(ATTENTION)
OLD_ATTENTION = {  # diffusers before 0.15 called the parts of attention so
    f"{new}.{kind}": f"{old}.{kind}"
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items()
    for kind in ("weight", "bias")
}


def read_layout(json: dict[str, Any]) -> dict[str, Any]:
    """The Config's fields of widths, attention and changes of resolution."""
    widths = json.get("block_out_channels", (224, 448, 672, 896))
    plain, attending = ["DownBlock2D", *["AttnDownBlock2D"] * 3], [*["AttnUpBlock2D"] * 3, "UpBlock2D"]
    down, up = read_sides(json, widths, (plain, DOWN), (attending, UP))
    levels = len(widths)
    return {
        "dim": widths[0],
        "multipliers": tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        "attention": levels_of(attends for attends, _ in down),
        "up_attention": levels_of(attends for attends, _ in up),
        "residual_down": tuple(level for level, (_, residual) in enumerate(down) if residual and level < levels - 1),
        "residual_up": tuple(level for level, (_, residual) in enumerate(up) if residual and level),
    }


Read = list[tuple[bool, bool]]
Silent = tuple[list[str], Blocks]  # the default blocks, and the known ones


def read_sides(json: dict[str, Any], widths: Sequence[int], down: Silent, up: Silent) -> tuple[Read, Read]:
    """Of each level on the way down and up, whether it has attention, and whether a residual block leads out of it."""
    sides = _read_side(json, "down", *down), _read_side(json, "up", *up)[::-1]
    if not len(widths) == len(sides[0]) == len(sides[1]):
        numbers = f"{len(widths)} widths, {len(sides[0])} stages down and {len(sides[1])} up"
        raise ValueError(f"it has {numbers}, which should be as many.")
    return sides


def _read_side(json: dict[str, Any], side: str, silent: list[str], known: Blocks) -> Read:
    residual_type = read_field(json, RESAMPLING._replace(name=f"{side}sample_type"))
    stages = []
    for name in json.get(f"{side}_block_types", silent):
        if (plain := name.removeprefix("UNetRes")) not in known:
            raise unknown(f"block of the way {side}", name, known)
        attends, residual = known[plain]
        stages.append((attends, residual_type if residual is None else residual))
    return stages


def levels_of(switches: Any) -> tuple[int, ...]:
    """The levels at which a switch is on."""
    return tuple(level for level, on in enumerate(switches) if on)


def write_layout(widths: Sequence[int], down: Layout, up: Layout) -> dict[str, Any]:
    """The published fields of a layout: down and up, the levels with attention, and those that a residual block leads
    out of. One that the words cannot say, where that differs between levels with attention, comes out as another.
    """
    levels = range(len(widths))
    return {
        "block_out_channels": [*widths],
        "down_block_types": [_name(level, down, DOWN) for level in levels],
        "up_block_types": [_name(level, up, UP) for level in reversed(levels)],
        "downsample_type": RESAMPLING.write(bool({*down[0]} & {*down[1]})),
        "upsample_type": RESAMPLING.write(bool({*up[0]} & {*up[1]})),
    }


def _name(level: int, way: Layout, known: Blocks) -> str:
    wanted = (True, None) if level in way[0] else (False, level in way[1])
    return next(name for name, means in known.items() if means == wanted)
