"""The diffusion Transformer (Peebles and Xie, 2022, "Scalable Diffusion Models with Transformers"): a Transformer over
patches replaces the U-Net, and the noise level and the class act through layer norms (AdaLN-zero).

It predicts the noise, as in the paper, or the flow (Lipman et al., 2022; Liu et al., 2022; Esser et al., 2024), in the
latents of an autoencoder or in pixels. The pipeline's folders are diffusers' `DiTPipeline`.

Axes: batch, channels, height, width of the network's input; new_height, new_width = without pixels that do not fill a
patch; length = patches, dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from keifu.errors import UserError, require_known
from keifu.layers.activations import gelu_tanh, quick_gelu
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import sinusoids
from keifu.layers.diffusion.image_model import ImageModel, Sample, Time
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.feedforward import GEGLU, FeedForward
from keifu.layers.initialisation import xavier_, zero_
from keifu.layers.linear import Linear
from keifu.layers.transformer.blocks import AdaptiveNormZero, modulate
from keifu.layers.unet.timestep_embedding import TimeEmbedding, TimestepSinusoids
from keifu.layers.unet.unet import check_sides
from keifu.models.diffusion import autoencoder_kl
from keifu.models.hf import config as hf
from keifu.models.hf.schedulers import read_scheduler, write_scheduler
from keifu.models.hf.unet import BLOCK, nested
from keifu.ranges import BelowOne, Count, Natural, Positive

Predicted = Float[Tensor, "batch out_channels new_height new_width"]
Labels = Int[Tensor, " batch"]

FREQUENCIES, EPS = 256, 1e-6  # numbers of the timestep's sinusoids; ε of the norms before attention and the last layer
FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {  # by diffusers' names
    "gelu-approximate": partial(FeedForward, activation=gelu_tanh),
    "gelu": partial(FeedForward, activation=F.gelu),
    "geglu": GEGLU,
    "geglu-approximate": partial(FeedForward, activation=quick_gelu),
    "swiglu": partial(GEGLU, activation=F.silu),
    "linear-silu": partial(FeedForward, activation=F.silu),
}


@dataclass(frozen=True)
class PatchSizes:
    """Sizes of a transformer of patches, and their checks. The defaults are DiT-XL/2's for 256 x 256 pixels.

    Attributes:
        size: the side of the network's input, which are latents or pixels.
        out_channels: None for as many as `channels`; twice as many if the variance is predicted too.
    """

    size: Count = 32
    patch_size: Count = 2
    channels: Count = 4
    out_channels: Count | None = None
    n_heads: Count = 16
    head_dim: Count = 72
    n_layers: Count = 28

    def __post_init__(self) -> None:
        if self.dim % 4:
            raise UserError(f"{self.dim} numbers a patch, which must be a multiple of 4 for sinusoids of both axes.")
        if self.patch_size > self.size:
            raise UserError(f"A patch of {self.patch_size} does not fit a side of {self.size}: choose another size.")

    @property
    def dim(self) -> int:
        """The numbers of a patch's hidden state."""
        return self.n_heads * self.head_dim

    @property
    def predicted_channels(self) -> int:
        """Channels of the output."""
        return self.out_channels or self.channels


@dataclass(frozen=True)
class TransformerConfig(PatchSizes):
    """The defaults are DiT-XL/2's for 256 x 256 pixels, except that DiT-XL/2 also predicts the variance.

    Attributes:
        n_classes: the classes without the null class, which is one more; 0 for an unconditional model.
        bias: whether the matrices of queries, keys and values have a bias.
        affine, norm_eps: whether the norm before the feed-forward network has weights, and its ε.
        feedforward: a name in `FEEDFORWARDS`.
    """

    n_classes: Natural = 1000
    bias: bool = True
    affine: bool = False
    norm_eps: Positive = 1e-5
    feedforward: str = "gelu-approximate"
    dropout: BelowOne = 0.0

    def __post_init__(self) -> None:
        require_known("feed-forward network", self.feedforward, FEEDFORWARDS)
        super().__post_init__()


@dataclass(frozen=True)
class Config:
    """Config of the transformer and the autoencoder.

    autoencoder: None for a model of pixels. classes: the names of the classes; empty if they have none. noise: the
    noise schedule and prediction target of the training.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    autoencoder: autoencoder_kl.Config | None = field(default_factory=autoencoder_kl.Config)
    classes: tuple[str, ...] = ()
    noise: Noise = Noise(clip=None)

    def __post_init__(self) -> None:
        if self.classes and len(self.classes) != self.n_classes:
            raise UserError(f"There are {self.n_classes} classes and {len(self.classes)} names for them.")
        if self.autoencoder is not None and self.autoencoder.latent_channels != self.channels:
            inner = self.autoencoder.latent_channels
            raise UserError(f"The transformer reads {self.channels} channels, and latents have {inner}.")

    @property
    def factor(self) -> int:
        """Pixels per number of the network's input, along a side."""
        return 1 if self.autoencoder is None else self.autoencoder.factor

    @property
    def size(self) -> int:
        """The side of the training images in pixels."""
        return self.transformer.size * self.factor

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return self.transformer.channels

    @property
    def n_classes(self) -> int:
        """The classes without the null class."""
        return self.transformer.n_classes

    @property
    def null_class(self) -> bool:
        """Whether there is a null class in addition to others, for classifier-free guidance."""
        return self.n_classes > 0


_SHAPES = {"s": (6, 64, 12), "b": (12, 64, 12), "l": (16, 64, 24), "xl": (16, 72, 28)}  # heads, head_dim, layers
_PUBLISHED = Config(autoencoder=autoencoder_kl.Config(size=256), noise=Noise(variance="learned_range", clip=None))
SIZES = {
    f"dit-{name}-2": replace(_PUBLISHED, transformer=TransformerConfig(32, 2, 4, 8, heads, head_dim, layers))
    for name, (heads, head_dim, layers) in _SHAPES.items()
}


class Condition(nn.Module):
    """Sum of the embeddings of the timestep and of the class."""

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.time = TimeEmbedding(TimestepSinusoids(FREQUENCIES, cosine_first=True), FREQUENCIES, dim)
        self.label = nn.Embedding(n_classes + 1, dim)

    def forward(self, timestep: Num[Tensor, " batch"], label: Labels) -> Float[Tensor, "batch dim"]:
        return self.time(timestep) + self.label(label)


class DiffusionTransformer(nn.Module):
    """Patches, blocks, and a last layer that makes patches of the prediction.

    Each block has a `Condition`, as in diffusers' files; the last layer uses the first block's.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim, patch = config.dim, config.patch_size
        self.config = config
        self.patches = nn.Conv2d(config.channels, dim, patch, patch)
        self.conditions = nn.ModuleList(Condition(dim, config.n_classes) for _ in range(config.n_layers))
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.modulation, self.last = Linear(dim, 2 * dim), Linear(dim, patch * patch * config.predicted_channels)

    def forward(self, x: Sample, timestep: Num[Tensor, " batch"], label: Labels) -> Predicted:
        """Return the prediction for noisy samples, in their dtype."""
        patch, dtype = self.config.patch_size, self.last.weight.dtype
        hidden = self.patches(x.to(dtype))
        rows, columns = hidden.shape[2:]
        hidden = hidden.flatten(2).mT
        hidden = hidden + patch_positions(rows, columns, self.config.size // patch, self.config.dim, x.device).to(dtype)
        conditions = [condition(timestep, label) for condition in self.conditions]
        for block, condition in zip(self.blocks, conditions, strict=True):
            hidden = block(hidden, condition=condition)
        shift, scale = self.modulation(F.silu(conditions[0]))[:, None].chunk(2, -1)
        output = self.last(modulate(self.norm(hidden), shift, scale))
        return from_patches(output, rows, columns, patch).to(x.dtype)


def from_patches(output: Float[Tensor, "batch length numbers"], rows: int, columns: int, patch: int) -> Predicted:
    """Join patches of patch · patch pixels, with their channels, to pictures."""
    output = output.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
    return output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_positions(
    rows: int, columns: int, trained: int, dim: int, device: torch.device
) -> Float[Tensor, "length dim"]:
    """Return sinusoids of each patch's column, then of its row. If a side has a number of patches other than `trained`,
    positions are rescaled to the trained range."""
    sides = (torch.arange(n, dtype=torch.float32, device=device) / (n / trained) for n in (rows, columns))
    axes = torch.meshgrid(*sides, indexing="ij")
    return torch.cat([sinusoids(axis.flatten(), dim // 2, interleaved=False) for axis in axes[::-1]], -1)


def block(config: TransformerConfig) -> AdaptiveNormZero:
    """Build a block of the transformer."""
    dim = config.dim
    norms = nn.LayerNorm(dim, EPS, elementwise_affine=False), nn.LayerNorm(dim, config.norm_eps, config.affine)
    return AdaptiveNormZero(
        Attention(dim, config.n_heads, head_dim=config.head_dim, bias=config.bias, out_bias=True),
        FEEDFORWARDS[config.feedforward](dim, 4 * dim, dropout=config.dropout), norms, Linear(dim, 6 * dim),
        config.dropout,
    )  # fmt: skip


class DiT(ImageModel):
    """The transformer, and the autoencoder in whose latents it works; None in a model of pixels."""

    draws = "pixels"

    def __init__(
        self, config: Config, transformer: DiffusionTransformer, autoencoder: autoencoder_kl.AutoencoderKL | None
    ):
        super().__init__()
        self.config, self.transformer, self.autoencoder = config, transformer, autoencoder

    def noise_of(self, size: tuple[int, int]) -> Noise:
        """Return the noise for pictures of this height and width in pixels, whose number of patches sets a dynamic
        shift."""
        rows, columns = (side // (self.factor * self.config.transformer.patch_size) for side in size)
        dynamic = self.noise.dynamic and replace(self.noise.dynamic, length=rows * columns)
        return replace(self.noise, dynamic=dynamic)

    @property
    def coder(self) -> autoencoder_kl.AutoencoderKL | None:
        """Return the autoencoder."""
        return self.autoencoder

    @property
    def factor(self) -> int:
        """Return the pixels per number of x, along a side."""
        return self.config.factor

    @property
    def colours(self) -> int:
        """Return the channels of the pictures."""
        return self.config.channels if self.autoencoder is None else self.autoencoder.config.channels

    def forward(self, x: Sample, timestep: Time, label: Labels | None = None) -> Predicted:
        """Return the prediction for noisy latents or pixels, in their dtype.

        label: a class (batch,); None for the null class. Numbers at the right and bottom that do not fill a patch are
        cut off, as in diffusers; `check_size` refuses such sides. Raises UserError for another number of channels.
        """
        check_channels(self.config.channels, x.shape[1])
        if label is None:
            label = torch.full((len(x),), self.config.n_classes, device=x.device)
        return self.transformer(x, timestep.reshape(-1).expand(len(x)), label)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for image sizes in pixels that do not fit the network; and for a
        network whose output channels do not fit its noise."""
        check_channels(self.colours, channels)
        check_sides(height, width, self.config.factor * self.config.transformer.patch_size)
        needed_channels = self.config.channels * (1 + (self.noise.variance == "learned_range"))
        if (predicted := self.config.transformer.predicted_channels) != needed_channels:
            raise UserError(
                f"The network predicts {predicted} channels, and {needed_channels} are needed to draw with it."
            )


def check_channels(expected: int, actual: int) -> None:
    """Raise UserError for another number of channels."""
    if actual != expected:
        raise UserError(f"The network reads {expected} channels, not {actual}.")


def build(config: Config) -> DiT:
    """Build a model with the paper's initialisation: Glorot's matrices, class embeddings with a deviation of 0.02, and
    zero for every modulation and for the last layer."""
    transformer = DiffusionTransformer(config.transformer)
    xavier_(transformer, embedding_std=0.02)
    zero_(transformer, "modulation", "last")
    return DiT(config, transformer, config.autoencoder and autoencoder_kl.build(config.autoencoder))


_NAMES = {
    "patches": "pos_embed.proj",
    "conditions.*.time.linear1": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1",
    "conditions.*.time.linear2": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2",
    "conditions.*.label": "transformer_blocks.*.norm1.emb.class_embedder.embedding_table",
    **nested("blocks.*", "transformer_blocks.*", BLOCK),
    "blocks.*.modulation": "transformer_blocks.*.norm1.linear",
    "blocks.*.feedforward.up": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.feedforward.up_gate": "transformer_blocks.*.ff.net.0.proj",
    "modulation": "proj_out_1",
    "last": "proj_out_2",
}
WEIGHT_NAMES = {
    **nested("transformer", "transformer", _NAMES), **nested("autoencoder", "vae", autoencoder_kl.WEIGHT_NAMES)
}  # fmt: skip
OLD_ENDINGS = autoencoder_kl.OLD_ENDINGS
MODEL_TYPES = {"DiTPipeline": "DiTPipeline"}
FILES = ("model_index.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
_NAMED = {
    "size": "sample_size", "patch_size": "patch_size", "channels": "in_channels", "out_channels": "out_channels",
    "n_heads": "num_attention_heads", "head_dim": "attention_head_dim", "n_layers": "num_layers",
    "n_classes": "num_embeds_ada_norm", "bias": "attention_bias", "affine": "norm_elementwise_affine",
    "norm_eps": "norm_eps", "feedforward": "activation_fn", "dropout": "dropout",
}  # fmt: skip
FIELDS: hf.Fields = {ours: hf.Field(theirs, vars(TransformerConfig())[ours]) for ours, theirs in _NAMED.items()}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config from the configs of a pipeline's parts, by their folders.

    A network whose output has twice the channels of its input predicts the variance, which schedulers' files do not
    mention.
    """
    hf.read_field(json["transformer"], hf.choice("norm_type", {"ada_norm_zero": "ada_norm_zero"}))
    transformer = TransformerConfig(**hf.read_fields(json["transformer"], FIELDS))
    noise = json.get("scheduler") or {}
    if transformer.predicted_channels // 2 == transformer.channels:
        noise = {**noise, "variance_type": "learned_range"}
    names = json.get("id2label") or {}
    classes = tuple(names[str(number)] for number in range(len(names)))
    autoencoder = json.get("vae") and autoencoder_kl.from_published(json["vae"])
    return Config(transformer, autoencoder, classes, read_scheduler(noise))


def to_published(config: Config) -> dict[str, Any]:
    """Return the configs of a pipeline's parts, as `from_published` reads them."""
    noise, names = config.noise, {str(number): name for number, name in enumerate(config.classes)}
    scheduler = write_scheduler(noise)
    if noise.variance == "learned_range":  # diffusers' pipeline removes the variance before it calls the scheduler
        scheduler |= {"_class_name": "DDIMScheduler", "set_alpha_to_one": noise.last_alpha_one}
        scheduler.pop("variance_type", None)
    return {
        "model_type": "DiTPipeline",
        "transformer": {"model_type": "DiTTransformer2DModel", **hf.write_fields(config.transformer, FIELDS)},
        "vae": config.autoencoder and autoencoder_kl.to_published(config.autoencoder),
        "scheduler": scheduler,
        **({"id2label": names} if names else {}),
    }
