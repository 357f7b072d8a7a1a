"""DDPM (Ho et al., 2020, "Denoising Diffusion Probabilistic Models"): a diffusion model that generates images from
noise by removing a little noise at each step. A U-Net predicts the noise, conditioned on the timestep. Improved DDPM
(Nichol and Dhariwal, 2021) also learns the variance of each step.

Axes: batch, channels, height, width. The stages are those of `layers/unet/unet.py`.
"""

from dataclasses import dataclass, replace
from functools import partial
from operator import not_
from typing import Any, Literal

import torch
from jaxtyping import Num
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.diffusion.image_model import ImageModel, Predicted, Sample, Time
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.initialisation import xavier_, zero_
from keifu.layers.unet.conv import SpatialAttention
from keifu.layers.unet.timestep_embedding import TimeEmbedding
from keifu.layers.unet.unet import UNet, check_sides
from keifu.models.diffusion.unet_builder import assemble_unet, group_norm, time_embedding
from keifu.models.hf import config as hf, unet as published
from keifu.models.hf.schedulers import read_scheduler, write_scheduler

LARGE = Noise(variance="fixed_large")  # the paper's σ² = β for CIFAR-10


@dataclass(frozen=True)
class Config:
    """The defaults are the paper's network for CIFAR-10. Levels count resolutions from 0, the finest.

    Attributes:
        size: the side of an image in pixels, or its height and width; None if unknown.
        out_channels: None for as many as `channels`, or twice as many if the variance is learned.
        dim, multipliers: a level has `dim` times its multiplier channels.
        n_residual_blocks: blocks of each downsampling level; an upsampling level has one more.
        attention, up_attention: the downsampling and upsampling levels with attention; None for the same ones.
        n_heads, head_dim: heads of attention, and their size; with `head_dim`, a level has as many heads as fit.
        middle, middle_attention: whether there is a middle stage, and whether it has attention.
        middle_groups: groups of the norm before the middle's attention; None for no norm.
        middle_scale: divisor of the residual sums in the middle.
        residual_down, residual_up: levels whose resolution is changed by a residual block, not by a convolution.
        pad_around: whether downsampling convolutions pad all sides, instead of only the bottom and the right.
        scale_shift: whether the timestep embedding scales and shifts the norm's output (improved DDPM), or is added.
        time_dim: dimension of the timestep embedding; None for 4 · dim.
        cosine_first, frequency_shift: settings of the timestep's sinusoids, see `TimestepSinusoids`.
        learned_times: rows of a learned table, used instead of sinusoids.
        centered: whether pixels are between -1 and 1; otherwise they are between 0 and 1 and are converted first.
        label: the condition: one of `n_classes` classes, a number, or a vector of `time_dim` numbers.
        n_classes: 0 for an unconditional model.
        null_class: whether there is a null class, number n_classes, for classifier-free guidance.
        classes: the names of the classes; empty if they have none.
        noise: the noise schedule and prediction target of the training.
    """

    size: int | tuple[int, int] | None = 32
    channels: int = 3
    out_channels: int | None = None
    dim: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 2, 2)
    n_residual_blocks: int = 2
    attention: tuple[int, ...] = (1,)
    up_attention: tuple[int, ...] | None = None
    n_heads: int = 1
    head_dim: int | None = None
    middle: bool = True
    middle_attention: bool = True
    middle_groups: int | None = 32
    middle_scale: float = 1.0
    residual_down: tuple[int, ...] = ()
    residual_up: tuple[int, ...] = ()
    pad_around: bool = False
    scale_shift: bool = False
    norm_groups: int = 32
    norm_eps: float = 1e-6
    activation: str = "silu"
    dropout: float = 0.1
    time_dim: int | None = None
    cosine_first: bool = False
    frequency_shift: float = 1.0
    learned_times: int | None = None
    centered: bool = True
    label: Literal["class", "number", "vector"] = "class"
    n_classes: int = 0
    null_class: bool = False
    classes: tuple[str, ...] = ()
    noise: Noise = LARGE

    def __post_init__(self) -> None:
        levels = len(self.multipliers)
        for name in ("attention", "up_attention", "residual_down", "residual_up"):
            wrong = [level for level in vars(self)[name] or () if not 0 <= level < levels]
            if wrong:
                raise UserError(f"{name} names level {wrong[0]}, but the levels are 0 to {levels - 1}.")
        if self.classes and len(self.classes) != self.n_classes:
            raise UserError(f"There are {self.n_classes} classes and {len(self.classes)} names for them.")
        if self.label == "number" and self.learned_times:
            raise UserError("A number besides the picture is given by sinusoids, and this model has learned times.")
        if self.noise.flows and self.learned_times:
            raise UserError("A flow has times between whole ones, and this model has learned whole times alone.")
        if self.null_class and not self.n_classes:
            raise UserError("A null class needs other classes: give n_classes too.")

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.dim * multiplier) for multiplier in self.multipliers)

    @property
    def time_width(self) -> int:
        """The numbers in the embedding of the noise level."""
        return self.time_dim or 4 * self.dim

    @property
    def predicted_channels(self) -> int:
        """Channels of the output: twice `channels` if the variance is predicted too."""
        return self.out_channels or self.channels * (1 + (self.noise.variance == "learned_range"))


_IMPROVED = Config(
    n_residual_blocks=3, attention=(1, 2), n_heads=4, pad_around=True, scale_shift=True, norm_eps=1e-5, dropout=0.3,
    cosine_first=True, frequency_shift=0.0, noise=Noise(schedule="cosine", steps=4000, variance="learned_range"),
)  # fmt: skip
_KARLO = Config(  # an upsampler: its input is noise and the resized small image
    size=256, channels=6, out_channels=3, dim=320, multipliers=(1, 2, 3, 4), n_residual_blocks=3, attention=(),
    up_attention=(), middle_attention=False, residual_down=(0, 1, 2), residual_up=(1, 2, 3), pad_around=True,
    norm_eps=1e-5, dropout=0.0, head_dim=8, cosine_first=True, frequency_shift=0.0,
    noise=Noise(schedule="cosine", spacing="linspace"),
)  # fmt: skip
SIZES = {
    "ddpm-cifar10": Config(),
    "ddpm-256": Config(size=256, multipliers=(1, 1, 2, 2, 4, 4), attention=(4,), dropout=0.0, noise=Noise()),
    "improved-ddpm-cifar10": _IMPROVED,
    "improved-ddpm-imagenet64": replace(_IMPROVED, size=64, multipliers=(1, 2, 3, 4), attention=(2, 3), dropout=0.0),
    "karlo-upsampler": _KARLO,
}


class DDPM(ImageModel):
    """The U-Net with its timestep embedding and, in a conditional model, its class embedding."""

    draws = "pixels"

    def __init__(self, config: Config, time: TimeEmbedding, label: nn.Module | None, unet: UNet):
        super().__init__()
        self.config, self.time, self.label, self.unet = config, time, label, unet
        self.activation = activation(config.activation)

    def forward(self, x: Sample, timestep: Time, label: Num[Tensor, "batch *vector"] | None = None) -> Predicted:
        """Return the prediction for noisy images, in their dtype.

        label: a class (batch,), or if the Config says so a number (batch,) or vector (batch, time_dim); None is the
        null class if there is one. Raises UserError for an unsupported size or number of channels.
        """
        self.check_size(*x.shape[1:])
        time = self.time(timestep.reshape(-1).expand(x.shape[0]))  # len would fix the batch of an exported graph
        if self.label is not None:
            time = time + self.label(self._labels(x.shape[0], x.device) if label is None else label).to(time.dtype)
        elif label is not None:
            raise UserError("This model draws no classes, and it was given a label: leave it out.")
        centered = (x if self.config.centered else 2 * x - 1).to(time.dtype)
        return self.unet(centered, self.activation(time)).to(x.dtype)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for images that do not fit the network."""
        if channels != self.config.channels:
            raise UserError(f"The network reads {self.config.channels} channels, and these pictures have {channels}.")
        check_sides(height, width, self.unet.factor)

    def _labels(self, count: int, device: torch.device) -> Tensor:
        if not self.config.null_class:
            raise UserError("This model draws one class or another: give a label.")
        return torch.full((count,), self.config.n_classes, device=device)


def build(config: Config) -> DDPM:
    """Build a network with the released code's initialisation: Glorot's, and zero for the last layer of each block and
    of the network."""
    learned = nn.Embedding(config.learned_times, config.dim) if config.learned_times else None
    model = DDPM(config, time_embedding(config, config.dim, learned), _label(config), _unet(config))
    xavier_(model, embedding_std=1.0)
    zero_(model, ".conv2", ".attention.out", "unet.last")
    return model


def _label(config: Config) -> nn.Module | None:
    if config.label == "number":
        return time_embedding(config, config.dim)
    if config.label == "vector":
        return nn.Identity()
    return nn.Embedding(config.n_classes + config.null_class, config.time_width) if config.n_classes else None


def _unet(config: Config) -> UNet:
    """Build the paper's U-Net, with self-attention between pixels."""
    look = partial(SpatialAttention, n_heads=config.n_heads, head_dim=config.head_dim)
    norm = group_norm(config, config.norm_groups)
    middle_norm = group_norm(config, config.middle_groups) if config.middle_groups else None
    middle = look(config.widths[-1], middle_norm, scale=config.middle_scale) if config.middle_attention else None
    return assemble_unet(config, lambda level, width: look(width, norm), middle)


WEIGHT_NAMES = {
    "time.table": "time_proj",
    "label": "class_embedding",
    "label.linear1": "class_embedding.linear_1",
    "label.linear2": "class_embedding.linear_2",
    **published.unet_names(published.ATTENTION),
}
FILES = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors")  # files of a pipeline
OLD_ENDINGS = published.OLD_ATTENTION
MODEL_TYPES = {"UNet2DModel": "DDPMPipeline"}
WRITES_TEXT = False
WAYS = (
    published.Way(
        {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)},
        ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    ),
    published.Way(
        {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)},
        (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    ),
)
WIDTHS = (224, 448, 672, 896)  # of a published config that does not list them
_TIMES = hf.choice("time_embedding_type", {"positional": False, "learned": True})
FIELDS = published.SIZE_FIELDS | {
    "channels": hf.Field("in_channels", 3),
    "out_channels": hf.Field("out_channels", 3),
    "head_dim": hf.Field("attention_head_dim", 8),
    "middle": hf.choice("mid_block_type", {"UNetMidBlock2D": True, None: False}),
    "middle_attention": hf.Field("add_attention", True),
    "middle_scale": hf.Field("mid_block_scale_factor", 1.0, float),
    "pad_around": published.PADDING,
    "scale_shift": published.SHIFTS,
    "activation": hf.choice("act_fn", {name: name for name in ("silu", "swish", "mish", "gelu", "relu")}),
    "centered": hf.Field("center_input_sample", False, not_, not_),
    "stages": published.stages(WAYS, WIDTHS, published.STAGES),
    "label": hf.choice("class_embed_type", {None: "class", "timestep": "number", "identity": "vector"}),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of diffusers' config.json of a UNet2DModel, with the scheduler's file as its "scheduler".

    Names that begin with "_" are keifu's: diffusers ignores them.
    """
    fields, null_class = hf.read_fields(json, FIELDS), json.get("_null_class", False)
    widths = json.get("block_out_channels", WIDTHS)
    return Config(
        **fields,
        dim=widths[0],
        multipliers=tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        middle_groups=json.get("attn_norm_num_groups") or (None if fields["scale_shift"] else fields["norm_groups"]),
        learned_times=json["num_train_timesteps"] if hf.read_field(json, _TIMES) else None,
        n_classes=(json.get("num_class_embeds") or 0) - null_class,
        null_class=null_class,
        classes=tuple(json.get("_classes", ())),
        noise=read_scheduler(json.get("scheduler") or {}),
    )


def to_published(config: Config) -> dict[str, Any]:
    """Return the files that `from_published` and diffusers read. Without `scale_shift`, diffusers always has a norm
    before the middle's attention; the config of a model without this norm is written in keifu's form."""
    if config.middle and config.middle_attention and config.middle_groups is None and not config.scale_shift:
        return hf.write_native("keifu_ddpm", config)
    extra = {"_null_class": config.null_class, "_classes": [*config.classes]}
    return {
        "model_type": "UNet2DModel",
        "attention_head_dim": None,  # the Config may have none
        **hf.write_fields(config, FIELDS),
        "out_channels": config.predicted_channels,
        "block_out_channels": [*config.widths],
        # if levels with attention differ in this, the config cannot express it, and another Config is read back
        "downsample_type": published.RESAMPLING.write(bool({*config.attention} & {*config.residual_down})),
        "upsample_type": published.RESAMPLING.write(bool({*published.up_levels(config)} & {*config.residual_up})),
        "time_embedding_type": _TIMES.write(bool(config.learned_times)),
        "num_train_timesteps": config.learned_times,
        "attn_norm_num_groups": config.middle_groups,
        "num_class_embeds": config.n_classes + config.null_class or None,
        **{name: value for name, value in extra.items() if value},
        "scheduler": write_scheduler(config.noise),
    }
