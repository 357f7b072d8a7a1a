"""The U-Net of latent diffusion (Rombach et al., 2022, section 3.3): DDPM's U-Net with a transformer after each
residual block. Its self-attention is between pixels, and its cross-attention to a context, such as an encoded text.

Axes: batch, channels, height, width; seen = tokens of the context. The stages are those of `layers/unet/unet.py`.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention, CrossAttention
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.diffusion.image_model import Predicted, Sample, Time
from keifu.layers.feedforward import GEGLU
from keifu.layers.initialisation import zero_
from keifu.layers.transformer.blocks import CrossPreNorm
from keifu.layers.unet.spatial_transformer import Memories, PixelLinear, SpatialTransformer, memories
from keifu.layers.unet.unet import UNet, check_sides
from keifu.models.diffusion.unet_builder import assemble_unet, time_embedding
from keifu.models.hf import config as hf
from keifu.models.hf.unet import BLOCK, CONDITIONED_FIELDS, PADDING, Way, nested, stages, unet_names

Context = Float[Tensor, "batch seen context_dim"]


@dataclass(frozen=True)
class UNetConfig:
    """Fields of the Configs of conditional U-Nets. Levels count resolutions from 0, the finest.

    Attributes:
        size: the side of the training samples, or their height and width; None if unknown.
        channels, predicted_channels: channels of the input and of the output. For inpainting the input has more; if the
            variance is predicted too, the output has twice as many.
        widths: channels of each level; each but the last halves the sides.
        n_residual_blocks: blocks of each downsampling level; an upsampling level has one more.
        attention, up_attention: the downsampling and upsampling levels with attention.
        middle: whether there is a middle stage.
        time_dim: dimension of the embedding of the noise level; None for four times the first width.
        cosine_first, frequency_shift: settings of the noise level's sinusoids, see `TimestepSinusoids`.
    """

    activation: ClassVar[str] = "silu"
    middle_scale: ClassVar[float] = 1.0

    size: int | tuple[int, int] | None = 64
    channels: int = 4
    predicted_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    n_residual_blocks: int = 2
    attention: tuple[int, ...] = (0, 1, 2)
    up_attention: tuple[int, ...] = (0, 1, 2)
    _: KW_ONLY
    middle: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    time_dim: int | None = None
    cosine_first: bool = True
    frequency_shift: float = 0.0

    @property
    def time_width(self) -> int:
        """The numbers in the embedding of the noise level."""
        return self.time_dim or 4 * self.widths[0]


@dataclass(frozen=True)
class Config(UNetConfig):
    """The defaults are Stable Diffusion 1's.

    Attributes:
        n_heads: attention heads of every level, or a tuple with a number for each level.
        n_layers: blocks of each transformer.
        context_dim: numbers of a token of the context.
        linear: whether a transformer's input and output projections are linear layers (Stable Diffusion 2) or 1×1
            convolutions.
        pad_around: whether downsampling convolutions pad all sides, instead of only the bottom and the right.
    """

    scale_shift: ClassVar[bool] = False
    residual_down: ClassVar[tuple[int, ...]] = ()
    residual_up: ClassVar[tuple[int, ...]] = ()

    n_heads: int | tuple[int, ...] = 8
    n_layers: int = 1
    context_dim: int = 768
    linear: bool = False
    pad_around: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.n_heads, tuple) and len(self.n_heads) != len(self.widths):
            raise UserError(f"n_heads has {len(self.n_heads)} numbers for {len(self.widths)} levels.")


_SECOND = partial(Config, n_heads=(5, 10, 20, 20), context_dim=1024, linear=True)
# The papers' numbers of parameters in sizes.json were counted in the released weights.
SIZES = {
    "stable-diffusion-1-unet": Config(),
    "stable-diffusion-1-inpainting-unet": Config(channels=9),
    "stable-diffusion-2-unet": _SECOND(size=96),
    "stable-diffusion-2-base-unet": _SECOND(),
}


class ConditionedUNet(nn.Module):
    """The U-Net and its timestep embedding."""

    def __init__(self, config: Any, time: nn.Module, unet: UNet):
        super().__init__()
        self.config, self.time, self.unet = config, time, unet

    @property
    def factor(self) -> int:
        """Number that sides must be multiples of; 1 for the published networks, which support any side."""
        return 1 if self.unet.flexible else self.unet.factor

    def project(self, context: Context) -> Memories:
        """Return the keys and values of a context for every transformer. Compute them once per image, for all steps."""
        return memories(self.unet, context.to(next(self.parameters()).dtype))

    def predict(
        self, x: Sample, timestep: Time, projected: Memories, mask: PaddingMask, condition: Tensor | None = None
    ) -> Predicted:
        """Return the prediction for noisy samples, in their dtype. condition (batch, time_dim): added to the embedding
        of the timestep."""
        self.check_size(*x.shape[1:])
        time = self.time(timestep.reshape(-1).expand(len(x)))
        time = time if condition is None else time + condition
        return self.unet(x.to(time.dtype), F.silu(time), memories=projected, memory_mask=mask).to(x.dtype)

    def forward(
        self, x: Sample, timestep: Time, context: Context, mask: Bool[Tensor, "batch seen"] | None = None
    ) -> Predicted:
        """Return `predict` for a context. mask: True on its real tokens; None attends to all, including padding, as
        Stable Diffusion does. Raises UserError, with the nearest size, for an unsupported size."""
        return self.predict(x, timestep, self.project(context), PaddingMask(mask))

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for samples that do not fit the network."""
        if channels != self.config.channels:
            raise UserError(f"The network reads {self.config.channels} channels, not {channels}.")
        check_sides(height, width, self.factor)


def build(config: Config) -> ConditionedUNet:
    """Build a network with PyTorch's default initialisation. The last layer of each block, of each transformer and of
    the network is zero, as in the released code."""
    time = time_embedding(config, config.widths[0])
    middle = _transformer(config, len(config.widths) - 1, config.widths[-1]) if config.middle else None
    model = ConditionedUNet(config, time, assemble_unet(config, partial(_transformer, config), middle))
    zero_(model, ".conv2", ".last")
    return model


def _transformer(config: Config, level: int, width: int) -> SpatialTransformer:
    """Build the transformer that replaces the attention of DDPM's U-Net at a level."""
    heads = config.n_heads if isinstance(config.n_heads, int) else config.n_heads[level]
    matrix = PixelLinear if config.linear else partial(nn.Conv2d, kernel_size=1)
    blocks = [
        CrossPreNorm(
            Attention(width, heads, bias=False, out_bias=True),
            CrossAttention(width, heads, config.context_dim, bias=False, out_bias=True),
            GEGLU(width, 4 * width),
            (nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)),
        )
        for _ in range(config.n_layers)
    ]
    norm = nn.GroupNorm(config.norm_groups, width, 1e-6)
    return SpatialTransformer(norm, matrix(width, width), blocks, matrix(width, width))


_CROSS_BLOCK = BLOCK | {
    "cross_attention_norm": "norm2",
    "cross_attention.q": "attn2.to_q",
    "cross_attention.kv": "attn2.to_[k,v]",
    "cross_attention.out": "attn2.to_out.0",
    "feedforward.up_gate": "ff.net.0.proj",
}
_TRANSFORMER = {"norm": "norm", "first": "proj_in", "last": "proj_out"}
WEIGHT_NAMES = unet_names(_TRANSFORMER | nested("blocks.*", "transformer_blocks.*", _CROSS_BLOCK))
MODEL_TYPES = {"UNet2DConditionModel": "UNet2DConditionModel"}
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
UNSUPPORTED: dict[str, Any] = {
    "center_input_sample": False, "only_cross_attention": False, "mid_block_scale_factor": 1,
    "dual_cross_attention": False, "class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "downsample_type": "conv",
    "reverse_transformer_layers_per_block": None, "act_fn": "silu",
}  # fmt: skip
_PLAIN, _CROSS = (False, False), (True, False)
WAYS = (
    Way({"DownBlock2D": _PLAIN, "CrossAttnDownBlock2D": _CROSS}, (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")),
    Way({"UpBlock2D": _PLAIN, "CrossAttnUpBlock2D": _CROSS}, ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)),
)


def _read_heads(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read the number of heads, which is named `attention_head_dim`: diffusers keeps this mistake for old files."""
    heads = json.get("num_attention_heads") or json.get("attention_head_dim", 8)
    return {"n_heads": tuple(heads) if isinstance(heads, list | tuple) else heads}


def _write_heads(config: Config) -> dict[str, Any]:
    return {"attention_head_dim": [*config.n_heads] if isinstance(config.n_heads, tuple) else config.n_heads}


FIELDS = CONDITIONED_FIELDS | {
    "n_layers": hf.Field("transformer_layers_per_block", 1),
    "linear": hf.Field("use_linear_projection", False),
    "middle": hf.choice("mid_block_type", {"UNetMidBlock2DCrossAttn": True, None: False}),
    "pad_around": PADDING,
    "stages": stages(WAYS),
    "n_heads": hf.FieldGroup(_read_heads, _write_heads),
}
# `upcast_attention` is ignored: here matrix multiplications always accumulate in float32
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)
