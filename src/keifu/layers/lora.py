"""Low-rank adapters on the linear layers and convolutions of a built model (LoRA, Hu et al., 2021; DoRA, Liu et al.,
2024).

A layer's matrix W is frozen. The low-rank matrix B A · scale is added to it, and only A and B are trained. Each part of
a joined matrix (queries, keys, values) may have an adapter. Axes: in, out, rank.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from keifu.errors import UserError
from keifu.layers.dropout import Dropout
from keifu.layers.quantized import QuantizedLinear
from keifu.layers.unet.spatial_transformer import PixelLinear


@dataclass(frozen=True)
class LoraSettings:
    """Settings of an adapter. B A is multiplied by alpha / rank, or by alpha / √rank if `root` is set (rsLoRA,
    Kalajdzievski, 2023). dora: whether the length of each row is learned separately from its direction."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    dora: bool = False
    root: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"The rank of an adapter must be at least 1, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"The dropout of an adapter must be at least 0 and below 1, not {self.dropout}.")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)


@dataclass(frozen=True)
class Target:
    """Rows start, ..., start + rows - 1 of the linear layer named `module` in the model. label: their published
    name."""

    module: str
    start: int
    rows: int
    label: str


class Adapter(nn.Module):
    """A (rank, in), B (out, rank) and, for DoRA, the length of each row. An untrained adapter changes nothing.

    The matrix of a convolution is its weight with the kernel flattened into the inputs.
    """

    def __init__(self, weight: Float[Tensor, "out channels *kernel"], target: Target, low: LoraSettings):
        super().__init__()
        self.target, self.low, self.kernel = target, low, tuple(weight.shape[2:])
        initial = torch.empty(low.rank, math.prod(weight.shape[1:]))
        # drawn on the CPU: the same numbers for any device of the layer
        nn.init.kaiming_uniform_(initial, a=math.sqrt(5))
        self.a = nn.Parameter(initial.to(weight.device))
        self.b = nn.Parameter(torch.zeros(target.rows, low.rank, device=weight.device))
        self.dropout = Dropout(low.dropout)
        self.length = nn.Parameter(_lengths(weight.detach().flatten(1).float())) if low.dora else None

    @property
    def rows(self) -> slice:
        """Return the rows of the layer's matrix that the adapter changes."""
        return slice(self.target.start, self.target.start + self.target.rows)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """Return A x, with dropout on x."""
        return F.linear(self.dropout(x.to(self.a.dtype)), self.a)

    def change(self) -> Float[Tensor, "out in"]:
        """Return B A · scale."""
        return self.b @ self.a * self.low.scale

    def changed(self, weight: Float[Tensor, "out channels *kernel"]) -> Float[Tensor, "out channels *kernel"]:
        """Return the adapted rows of the layer's weight, computed in float32."""
        matrix = weight.flatten(1).float()
        stretch, changed = self.stretch(matrix), matrix + self.change()
        return (changed if stretch is None else changed * stretch[:, None]).view_as(weight).to(weight.dtype)

    def stretch(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"] | None:
        """Return DoRA's factor of each row of W + B A · scale, None without DoRA. No gradient passes through the norm
        (section 4.3)."""
        return None if self.length is None else self.length / _lengths((weight + self.change()).detach())


def _lengths(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    return torch.linalg.vector_norm(weight, dim=1)


class AdaptedLinear(nn.Module):
    """Linear layer with adapters, which replaces the layer. Dropout acts only on the adapters' inputs."""

    idle = False  # see `unadapted`

    def __init__(self, base: nn.Linear | QuantizedLinear, adapters: Sequence[Adapter]):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleList(adapters)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.base(x)
        if self.idle:
            return y
        pieces = [self._piece(adapter, x, y) for adapter in self.parts]
        if len(pieces) == 1 and pieces[0].shape == y.shape:
            return pieces[0]
        outputs, at = [], 0
        for adapter, piece in zip(self.parts, pieces, strict=True):
            outputs += [y[..., at : adapter.rows.start], piece]
            at = adapter.rows.stop
        return torch.cat([*outputs, y[..., at:]], -1)

    @property
    def weight(self) -> Tensor:
        """The layer's weight without adapters; other code reads its dtype and device."""
        return self.base.weight

    @property
    def parts(self) -> list[Adapter]:
        """The adapters, in the order of their rows."""
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def _piece(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """Return an adapter's rows of the output, with the adapter added."""
        low, part = adapter.low, y[..., adapter.rows]
        change = F.linear(adapter(x), adapter.b * low.scale)
        stretch = None if adapter.length is None else adapter.stretch(self.base.weight[adapter.rows].float())
        if stretch is None:
            return part + change.to(y.dtype)
        bias = 0 if self.base.bias is None else self.base.bias[adapter.rows]
        return ((part - bias + change) * stretch + bias).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the plain layer, with the adapters merged into its matrix."""
        weight = self.base.weight.detach().clone()
        for adapter in self.parts:
            weight[adapter.rows] = adapter.changed(weight[adapter.rows])
        layer = self.base.layer if isinstance(self.base, QuantizedLinear) else self.base
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer


class ReweightedLinear(nn.Module):
    """Parametrization that adds an adapter to the weight of a convolution, or of another layer of images.

    torch's `parametrize` computes this weight at each call, which costs less than a second convolution. There is no
    dropout.
    """

    idle = False

    def __init__(self, adapter: Adapter):
        super().__init__()
        if adapter.low.dropout:
            raise UserError(f"{adapter.target.label} is a layer of pixels, whose adapter has no dropout: set it to 0.")
        self.adapter = adapter

    def forward(self, weight: Float[Tensor, "out channels *kernel"]) -> Float[Tensor, "out channels *kernel"]:
        return weight if self.idle else self.adapter.changed(weight)


def attach(model: nn.Module, targets: Mapping[Target, LoraSettings]) -> nn.Module:
    """Attach adapters to these layers, in place, freeze everything else, and return the model.

    Raises UserError if the model has adapters already: merge them first.
    """
    if next(adapters(model), None) is not None:
        raise UserError("This model has adapters already: merge them first, or load it without them.")
    if not targets:
        raise UserError("No layer was chosen for an adapter: name at least one.")
    targets_of: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        targets_of[target.module].append(target)
    if packed := [name for name in targets_of if isinstance(model.get_submodule(name), QuantizedLinear)]:
        raise UserError(f"The matrix of {packed[0]} is packed in blocks: load the model without `weights` first.")
    model.requires_grad_(False)
    for name, parts in targets_of.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | nn.Conv2d)
        ordered = sorted(parts, key=lambda part: part.start)
        new_adapters = [Adapter(base.weight[p.start : p.start + p.rows], p, targets[p]) for p in ordered]
        if isinstance(base, nn.Linear) and not isinstance(base, PixelLinear):
            model.set_submodule(name, AdaptedLinear(base, new_adapters))
        else:
            parametrize.register_parametrization(base, "weight", ReweightedLinear(new_adapters[0]))
    return model


def quantize_bases(model: nn.Module) -> nn.Module:
    """Quantise the matrices that have adapters to blocks of 4 bits, in place."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and isinstance(module.base, nn.Linear):
            module.base = QuantizedLinear(module.base)
    return model


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Return an iterator over the adapters of a model, in the model's order."""
    return (module for module in model.modules() if isinstance(module, Adapter))


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the block. A model without adapters stays as it is."""
    parts = [module for module in model.modules() if isinstance(module, AdaptedLinear | ReweightedLinear)]
    for part in parts:
        part.idle = True
    try:
        yield
    finally:
        for part in parts:
            part.idle = False


def merge(model: nn.Module) -> nn.Module:
    """Merge every adapter into its matrix, in place, and return the model, which then has no adapters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            model.set_submodule(name, module.merged())
        elif parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return model
