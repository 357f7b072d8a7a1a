"""Position encodings: learned embeddings, sinusoids, and rotary embeddings of queries and keys.

Axes: batch, length = tokens, heads, head_dim; pairs = head_dim / 2.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from keifu.errors import UserError, require_known
from keifu.layers.wide import wide
from keifu.ranges import Count, Positive

Lengths = Int[Tensor, "*batch length"] | None


class LearnedPositions(nn.Embedding):
    """One learned vector per position, added to the token's embedding (Gehring et al., 2017; GPT, BERT): a table with
    as many positions as the context."""


def sinusoids(positions: Num[Tensor, "*batch"], dim: int, interleaved: bool = True) -> Float[Tensor, "*batch dim"]:
    """Return sin and cos of position / 10000^(2i/dim) (Vaswani et al., 2017, section 3.5): float32, computed in
    float64.

    The paper interleaves sin and cos; tensor2tensor and Marian put all sines first (`interleaved=False`).
    """
    device, positions = positions.device, wide(positions)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions[..., None].double() * 10_000.0**-exponents
    both = torch.stack([angles.sin(), angles.cos()], -1 if interleaved else -2)
    return both.flatten(-2)[..., :dim].float().to(device)


class SinusoidalPositions(nn.Module):
    """`sinusoids` of the positions of a text of at most `context_length` tokens. They are neither learned nor saved.

    They are computed at first use, so that a model built without memory has them too.
    """

    def __init__(self, context_length: int, dim: int, interleaved: bool = True):
        super().__init__()
        self.context_length, self.dim, self.interleaved = context_length, dim, interleaved
        self._table: Tensor | None = None

    def forward(self, start: int, length: int, like: Tensor) -> Float[Tensor, "length dim"]:
        """Return the sinusoids of `length` positions from `start` on, with the dtype and device of `like`."""
        end = start + length
        if end > self.context_length:
            raise UserError(f"{end} tokens do not fit the {self.context_length} that this model takes; shorten them.")
        table = self._table
        if table is None or (table.dtype, table.device) != (like.dtype, like.device):
            with torch.inference_mode(False):  # it may be computed during generation, but training needs it too
                positions = torch.arange(self.context_length, device=like.device)
                table = self._table = sinusoids(positions, self.dim, self.interleaved).to(like.dtype)
        return table[start:end]


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for sequences beyond the trained length, by `kind`.

    linear: all frequencies / factor (Chen et al., 2023). dynamic: the base grows with the sequence ("NTK-aware").
    llama3: long waves / factor, short ones unchanged, smooth between (Llama 3.1). yarn: the same idea with limits in
    rotations, plus a temperature on the attention (Peng et al., 2023). longrope: an optimised divisor for each pair,
    for sequences up to the trained length and for longer ones (Ding et al., 2024).
    """

    kind: str  # linear, dynamic, llama3, yarn or longrope
    factor: Positive  # new length / trained length
    original_context_length: Count  # trained length in tokens
    low_freq_factor: Positive = 1.0  # rotations over the trained length; a frequency with fewer is divided (llama3)
    high_freq_factor: Positive = 4.0  # rotations; a frequency with more is unchanged (llama3)
    beta_fast: Positive = 32.0  # rotations over the trained length; a frequency with more is unchanged (yarn)
    beta_slow: Positive = 1.0  # rotations; a frequency with fewer is divided by the factor (yarn)
    attention_factor: Positive | None = None  # factor of cosines and sines; None: computed from the other fields
    mscale: Positive | None = None  # growth of that factor with the length (yarn)
    mscale_all_dim: Positive | None = None  # growth of the factor of queries and keys (DeepSeek-V2)
    truncate: bool = True  # whether the limits between unchanged and divided pairs are rounded to whole pairs (yarn)
    short_divisors: tuple[Positive, ...] | None = None  # divisors up to the trained length (longrope)
    long_divisors: tuple[Positive, ...] | None = None  # divisors of longer sequences (longrope)

    def __post_init__(self) -> None:
        require_known("rotary scaling", self.kind, ("dynamic", "linear", "llama3", "longrope", "yarn"))

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")

    def magnitude(self) -> float:
        """Return the factor on cos and sin (yarn, section 3.4; longrope); 1 for the other kinds."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.original_context_length))
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def all_dim_magnitude(self) -> float:
        """Return the factor of all dimensions of queries and keys that `mscale_all_dim` sets (DeepSeek-V2)."""
        return self._mscale(self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def _mscale(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def apply(self, frequencies: Float[Tensor, " pairs"], theta: float) -> Float[Tensor, " pairs"]:
        """Scale the frequencies. Kinds that depend on the sequence's length are left unchanged (see `of_lengths`)."""
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            return self._llama3(frequencies)
        return self._yarn(frequencies, theta) if self.kind == "yarn" else frequencies

    def of_lengths(
        self, lengths: Int[Tensor, "*batch 1"], theta: float, exponents: Float[Tensor, " pairs"]
    ) -> Float[Tensor, "*batch pairs"]:
        """Return the frequencies in sequences of these lengths, for the kinds dynamic and longrope."""
        trained = self.original_context_length
        if self.kind == "longrope":
            short, long = (torch.tensor(x).to(exponents) for x in (self.short_divisors, self.long_divisors))
            return 1.0 / (torch.where(lengths > trained, long, short) * theta**exponents)
        pairs = len(exponents)
        growth = self.factor * lengths.clamp(min=trained) / trained - (self.factor - 1)
        return 1.0 / (theta * growth ** (pairs / (pairs - 1))) ** exponents

    def _llama3(self, frequencies: Tensor) -> Tensor:
        rotations = self.original_context_length * frequencies / (2 * math.pi)
        keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequencies / self.factor, frequencies, keep.clamp(0, 1))

    def _yarn(self, frequencies: Tensor, theta: float) -> Tensor:
        dim = 2 * len(frequencies)

        def pair_that_rotates(times: float) -> float:
            return dim * math.log(self.original_context_length / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_rotates(self.beta_fast), pair_that_rotates(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
        divide = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, divide)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of some positions; `apply` rotates any heads at these positions."""

    cos: Float[Tensor, "... length pairs"]
    sin: Float[Tensor, "... length pairs"]
    interleaved: bool
    _cast: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)

    def apply(self, x: Float[Tensor, "batch length heads head_dim"]) -> Float[Tensor, "batch length heads head_dim"]:
        """Rotate every pair of numbers by its angle. Pairs are (0, 1), (2, 3), ... if interleaved, or (0, half), (1,
        half + 1), ...

        Numbers after the last pair are unchanged (partial rotary positions: GPT-J, 2021).
        """
        if (turning := 2 * self.cos.shape[-1]) < x.shape[-1]:
            return torch.cat([self.apply(x[..., :turning]), x[..., turning:]], -1)
        cos, sin = self._of_type(x.dtype)
        if self.interleaved:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        if x.device.type != "cpu":  # three kernels instead of seven
            return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def turn(self, x: Float[Tensor, "batch length heads head_dim"]) -> None:
        """Rotate every pair in place, without gradients."""
        if self.interleaved or 2 * self.cos.shape[-1] < x.shape[-1] or x.device.type == "cpu":
            x.copy_(self.apply(x))
            return
        cos, sin = self._of_type(x.dtype)
        swapped = torch.cat([*reversed(x.chunk(2, -1))], -1)
        x.mul_(cos).addcmul_(swapped, sin)

    def _of_type(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for all heads, cast once for all layers.

        On a GPU, if pairs are (0, half), they are as wide as a head, and the sines of the first half are negated.
        """
        if dtype not in self._cast:
            cos, sin = self.cos.unsqueeze(-2).to(dtype), self.sin.unsqueeze(-2).to(dtype)
            if cos.device.type != "cpu" and not self.interleaved:
                cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self._cast[dtype] = cos, sin
        return self._cast[dtype]


class Rotary(nn.Module):
    """Rotary positions (RoFormer, Su et al., 2021): pair i of a head is rotated by position · theta^(-2i/head_dim).

    interleaved: pairs are neighbours (the paper, Meta's files, GGUF, Cohere). By default they are from the two halves
    (Hugging Face's LLaMA). Frequencies are computed in float32 for any dtype of the model.
    """

    def __init__(
        self, head_dim: int, theta: float = 10_000.0, scaling: RopeScaling | None = None, interleaved: bool = False
    ):
        super().__init__()
        if head_dim % 2:
            raise UserError(f"Rotary positions turn pairs, so head_dim must be even; it is {head_dim}.")
        if scaling and scaling.kind == "longrope":
            sizes = [len(divisors or ()) for divisors in (scaling.short_divisors, scaling.long_divisors)]
            if sizes != [head_dim // 2] * 2:
                raise UserError(f"longrope needs {head_dim // 2} factors as short_ and long_divisors, not {sizes}.")
        self.head_dim, self.theta, self.scaling, self.interleaved = head_dim, theta, scaling, interleaved

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the settings that determine the rotation of a position."""
        return self.head_dim, self.theta, self.scaling, self.interleaved

    def forward(self, positions: Int[Tensor, "*batch length"], lengths: Lengths = None) -> Rotation:
        angles = positions[..., None].float() * self.frequencies(positions, lengths)
        size = self.scaling.magnitude() if self.scaling else 1.0
        return Rotation(angles.cos() * size, angles.sin() * size, self.interleaved)

    def frequencies(self, positions: Tensor, lengths: Lengths = None) -> Float[Tensor, "..."]:
        """Return the radians per position of each pair. lengths: length of each token's sequence, which some scalings
        need; None: the last position + 1."""
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        if self.scaling and self.scaling.by_length:
            lengths = positions.amax(-1, keepdim=True) + 1 if lengths is None else lengths
            return self.scaling.of_lengths(lengths[..., None], self.theta, exponents)
        frequencies = 1.0 / self.theta**exponents
        return self.scaling.apply(frequencies, self.theta) if self.scaling else frequencies


class ProportionalRotary(Rotary):
    """Rotary positions in which only the fastest pairs turn, `share` of all (p-RoPE, Barbero et al., 2024; Gemma 4).

    A pair that turns has the frequency that it has if all turn.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None, share: float):
        super().__init__(head_dim, theta, scaling)
        self.n_turning = int(share * head_dim // 2)

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the settings that determine the rotation of a position."""
        return (*super().settings, self.n_turning)

    def frequencies(self, positions: Tensor, lengths: Lengths = None) -> Float[Tensor, "..."]:
        """Return the radians per position of each pair; 0 for pairs that do not turn."""
        turning = torch.arange(self.head_dim // 2, device=positions.device) < self.n_turning
        return super().frequencies(positions, lengths).where(turning, 0.0)


class ReversedRotary(Rotary):
    """Rotary positions in the opposite direction, by -position · theta^(-2i/head_dim) (nanochat, 2025)."""

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the settings that determine the rotation of a position."""
        return (*super().settings, "reversed")

    def forward(self, positions: Int[Tensor, "*batch length"], lengths: Lengths = None) -> Rotation:
        turned = super().forward(positions, lengths)
        return replace(turned, sin=-turned.sin)


class Positions:
    """Positions of the tokens of a pass. One object serves all layers; the angles of each rotary are computed once.

    ids: (batch, length), or (length,) if all rows have the same. lengths: length of each token's sequence; None: the
    last position of the row + 1.
    """

    def __init__(self, ids: Int[Tensor, "*batch length"], lengths: Lengths = None):
        self.ids, self.lengths = ids, lengths
        self._rotations: dict[Any, Rotation] = {}

    def rotation(self, rotary: Rotary) -> Rotation:
        """Return the rotation of these positions. Layers whose rotaries have the same settings share it."""
        if rotary.settings not in self._rotations:
            self._rotations[rotary.settings] = rotary(self.ids, self.lengths)
        return self._rotations[rotary.settings]
