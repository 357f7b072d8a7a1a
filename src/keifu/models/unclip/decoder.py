"""The decoder of unCLIP (Ramesh et al., 2022, section 2.1; DALL-E 2): improved DDPM's U-Net, conditioned on CLIP's
image embedding. Its attention is over a context and the pixels jointly, as in GLIDE.

Axes: batch, channels, height, width; seen = tokens of the context. The stages are those of `layers/unet/unet.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.diffusion.image_model import Predicted, Sample, Time
from keifu.layers.initialisation import zero_
from keifu.layers.linear import Linear
from keifu.layers.unet.spatial_transformer import JointAttention, Memories
from keifu.models.diffusion.conditioned_unet import UNSUPPORTED as OF_CONDITIONED, ConditionedUNet, Context, UNetConfig
from keifu.models.diffusion.unet_builder import assemble_unet, time_embedding
from keifu.models.hf import config as hf
from keifu.models.hf.unet import CONDITIONED_FIELDS, SHIFTS, Way, stages, unet_names


@dataclass(frozen=True)
class Config(UNetConfig):
    """The defaults are those of Karlo, whose weights are public; OpenAI's are not. A residual block changes the
    resolution between levels.

    Attributes:
        head_dim: numbers in a head of attention, which must divide the channels of every level with attention.
        context_dim: numbers of a token of the context.
        label: second condition, after the timestep: "vector" of `time_width` numbers; "projected": `label_dim` numbers,
            multiplied by a matrix; "class": one of `label_dim` classes.
        scale_shift: whether the timestep embedding scales and shifts the norm's output, or is added to it.
    """

    pad_around: ClassVar[bool] = True

    channels: int = 3
    predicted_channels: int = 6
    widths: tuple[int, ...] = (320, 640, 960, 1280)
    n_residual_blocks: int = 3
    attention: tuple[int, ...] = (1, 2, 3)
    up_attention: tuple[int, ...] = (1, 2, 3)
    head_dim: int = 64
    context_dim: int = 1536
    label: Literal["vector", "projected", "class"] = "vector"
    label_dim: int | None = None
    scale_shift: bool = True

    def __post_init__(self) -> None:
        if (self.label == "vector") != (self.label_dim is None):
            raise UserError(f"The label {self.label!r} does not go with label_dim {self.label_dim}.")

    @property
    def residual_down(self) -> tuple[int, ...]:
        """The downsampling levels whose resolution a residual block changes: all but the coarsest."""
        return tuple(range(len(self.widths) - 1))

    @property
    def residual_up(self) -> tuple[int, ...]:
        """The upsampling levels whose resolution a residual block changes: all but the finest."""
        return tuple(range(1, len(self.widths)))


# Its authors rounded the number of parameters; DALL-E 2's decoder has 3.5 B.
SIZES = {"karlo-decoder": Config()}


class Decoder(nn.Module):
    """The U-Net with its timestep embedding and conditioning."""

    def __init__(self, config: Config, label: nn.Module, network: ConditionedUNet):
        super().__init__()
        self.config, self.label, self.network = config, label, network

    def project(self, context: Context) -> Memories:
        """Return the keys and values of a context for every attention. Compute them once per image, for all steps."""
        return self.network.project(context)

    def predict(self, x: Sample, timestep: Time, label: Tensor, projected: Memories, mask: PaddingMask) -> Predicted:
        """Return the prediction for noisy samples, in their dtype."""
        return self.network.predict(x, timestep, projected, mask, self.label(label))

    def forward(
        self, x: Sample, timestep: Time, label: Tensor, context: Context, mask: Bool[Tensor, "batch seen"] | None = None
    ) -> Predicted:
        """Return `predict` for a context. label (batch, ...): a vector, or a class. mask: True on real tokens of the
        context; None attends to all."""
        return self.predict(x, timestep, label, self.project(context), PaddingMask(mask))


def build(config: Config) -> Decoder:
    """Build a network with PyTorch's default initialisation, but zero for the last layer of each block, of each
    attention and of the network, as in improved DDPM's code."""
    time = time_embedding(config, config.widths[0])
    norm = partial(nn.GroupNorm, config.norm_groups, eps=1e-5)
    look = partial(JointAttention, head_dim=config.head_dim, context_dim=config.context_dim, norm=norm)
    middle = look(config.widths[-1]) if config.middle else None
    unet = assemble_unet(config, lambda level, width: look(width), middle)
    model = Decoder(config, _label(config), ConditionedUNet(config, time, unet))
    zero_(model, ".conv2", ".out", "unet.last")
    return model


def _label(config: Config) -> nn.Module:
    if config.label_dim is None:
        return nn.Identity()
    layer = Linear if config.label == "projected" else nn.Embedding
    return layer(config.label_dim, config.time_width)


_ATTENTION = {"norm": "group_norm", "qkv": "to_[q,k,v]", "kv": "add_[k,v]_proj", "out": "to_out.0"}
WEIGHT_NAMES = {
    "label": "class_embedding",
    **{f"network.{ours}": theirs for ours, theirs in unet_names(_ATTENTION).items()},
}
MODEL_TYPES = {"UNet2DConditionModel/simple": "UNet2DConditionModel"}  # diffusers has one class for two networks
KEIFU_TYPE = "keifu_unclip_decoder"
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
UNSUPPORTED: dict[str, Any] = {
    name: only
    for name, only in OF_CONDITIONED.items()
    if name not in ("class_embed_type", "num_class_embeds", "resnet_time_scale_shift")
}
WAYS = (  # a residual block changes the resolution between levels
    Way({"ResnetDownsampleBlock2D": (False, None), "SimpleCrossAttnDownBlock2D": (True, None)}),
    Way({"ResnetUpsampleBlock2D": (False, None), "SimpleCrossAttnUpBlock2D": (True, None)}),
)
FIELDS = CONDITIONED_FIELDS | {
    "head_dim": hf.Field("attention_head_dim", 8),
    "label": hf.choice("class_embed_type", {None: "class", "identity": "vector", "simple_projection": "projected"}),
    "middle": hf.choice("mid_block_type", {None: False, "UNetMidBlock2DSimpleCrossAttn": True}),
    "scale_shift": SHIFTS,
    "stages": stages(WAYS),
}
_LABEL_DIMS = {"projected": "projection_class_embeddings_input_dim", "class": "num_class_embeds"}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of diffusers' config.json of a UNet2DConditionModel whose blocks are the simple ones.

    Its `attention_head_dim` is the size of a head, unlike in other UNet2DConditionModels.
    """
    fields = hf.read_fields(json, FIELDS)
    label_dim = json.get(_LABEL_DIMS.get(fields["label"], ""))
    if fields["label"] == "class" and label_dim is None:
        raise UserError("its class_embed_type is None, and no num_class_embeds says how many rows a table would have.")
    return Config(**fields, label_dim=label_dim)


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    return {
        "model_type": next(iter(MODEL_TYPES)),
        **hf.write_fields(config, FIELDS),
        **{name: config.label_dim if label == config.label else None for label, name in _LABEL_DIMS.items()},
    }
