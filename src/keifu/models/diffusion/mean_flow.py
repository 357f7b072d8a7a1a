"""MeanFlow (Geng et al., 2025, "Mean Flows for One-step Generative Modeling"): a network predicts the mean velocity
between two times, so that one step leads from noise to a picture.

A flow's network knows the velocity at one time. The path from noise to a picture bends, because each velocity is the
mean over all pictures that could be meant, and a sampler needs many short steps to follow it. New was to learn the mean
velocity u over an interval: x at the earlier time is exactly x - span · u, so there is no path to follow. The network
has two times as input, the later one and the span, and is otherwise DiT's transformer over patches of pixels. The loss
that makes u a mean is in `training/objectives/mean_flow.py`.

Axes: batch, channels, height, width; dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.diffusion.image_model import ImageModel, Sample
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.initialisation import xavier_, zero_
from keifu.layers.linear import Linear
from keifu.layers.transformer.blocks import modulate
from keifu.layers.unet.timestep_embedding import TimeEmbedding, TimestepSinusoids
from keifu.models.diffusion import dit
from keifu.ranges import Count, Natural, check

Times = Float[Tensor, " batch"]
SCALE = 10.0  # factor of a time in front of the sinusoids; with DiT's 1000 their derivatives drown the target
FLOW = Noise("flow", target="flow")


@dataclass(frozen=True)
class Config:
    """Sizes of a model. The defaults are for handwritten digits."""

    size: Count = 28  # side of the pictures in pixels
    patch_size: Count = 4  # side of a patch in pixels
    channels: Count = 1
    n_heads: Count = 4
    head_dim: Count = 32  # numbers in a head; a patch has the heads times it
    n_layers: Count = 6
    n_classes: Natural = 0  # 0 without classes
    classes: tuple[str, ...] = ()  # names of the classes; empty if they have none

    def __post_init__(self) -> None:
        check(self)
        if self.size % self.patch_size:
            raise UserError(f"Patches of {self.patch_size} pixels do not fill a side of {self.size}: choose a divisor.")
        if self.classes and len(self.classes) != self.n_classes:
            raise UserError(f"There are {self.n_classes} classes and {len(self.classes)} names for them.")
        _ = self.transformer  # raises its error early

    @property
    def transformer(self) -> dit.TransformerConfig:
        """The sizes as DiT names them."""
        return dit.TransformerConfig(
            size=self.size, patch_size=self.patch_size, channels=self.channels, n_heads=self.n_heads,
            head_dim=self.head_dim, n_layers=self.n_layers, n_classes=self.n_classes,
        )  # fmt: skip

    @property
    def null_class(self) -> bool:
        """Whether there is a class that means none, for guidance."""
        return False

    @property
    def noise(self) -> Noise:
        """The straight line between a picture and noise."""
        return FLOW


class MeanFlow(ImageModel):
    """Transformer over patches with two times and a class as condition."""

    draws = "jumps"

    def __init__(self, config: Config):
        super().__init__()
        dim, patch = config.transformer.dim, config.patch_size
        self.config = config
        self.patches = nn.Conv2d(config.channels, dim, patch, patch)
        self.time, self.span = (
            TimeEmbedding(TimestepSinusoids(dit.FREQUENCIES, cosine_first=True), dit.FREQUENCIES, dim) for _ in range(2)
        )
        self.label = nn.Embedding(max(1, config.n_classes), dim)
        self.blocks = nn.ModuleList(dit.block(config.transformer) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim, dit.EPS, elementwise_affine=False)
        self.modulation, self.last = Linear(dim, 2 * dim), Linear(dim, patch * patch * config.channels)

    def forward(self, x: Sample, time: Times, span: Times, label: Int[Tensor, " batch"] | None = None) -> Sample:
        """Return the mean velocity between time - span and time, for x at `time`. Both are shares of the way from the
        picture (0) to the noise (1). label: classes; None in a model without."""
        dtype = self.last.weight.dtype
        hidden = self.patches(x.to(dtype))
        rows, columns = hidden.shape[2:]
        positions = dit.patch_positions(rows, columns, rows, hidden.shape[1], x.device)
        hidden = hidden.flatten(2).mT + positions.to(dtype)
        label = torch.zeros(len(x), dtype=torch.long, device=x.device) if label is None else label
        condition = self.time(SCALE * time) + self.span(SCALE * span) + self.label(label)
        for block in self.blocks:
            hidden = block(hidden, condition=condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        output = self.last(modulate(self.norm(hidden), shift, scale))
        return dit.from_patches(output, rows, columns, self.config.patch_size).to(x.dtype)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raise UserError for pictures of another shape than the model's."""
        here = self.config.channels, self.config.size, self.config.size
        if (channels, height, width) != here:
            raise UserError(
                f"The model draws pictures of {here[0]} x {here[1]} x {here[2]} (channels, height, width), not "
                f"{channels} x {height} x {width}."
            )


def build(config: Config) -> MeanFlow:
    """Build a model with DiT's initialisation."""
    model = MeanFlow(config)
    xavier_(model, embedding_std=0.02)
    zero_(model, "modulation", "last")
    return model


SIZES = {"mean-flow-digits": Config(n_classes=10)}
WEIGHT_NAMES = {  # there is no published format
    name: name
    for name in (
        *("patches", "label", "modulation", "last", "blocks.*.modulation"),
        *(f"{part}.linear{number}" for part in ("time", "span") for number in (1, 2)),
        *(f"blocks.*.attention.{part}" for part in ("qkv", "out")),
        *(f"blocks.*.feedforward.{part}" for part in ("up", "down")),
    )
}
WRITES_TEXT = False
