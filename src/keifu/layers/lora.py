"""Low-rank adapters on the linear layers and convolutions of a built model (LoRA, Hu et al., 2021; DoRA, Liu et al.,
2024).

A layer's matrix W stays fixed; the product B A · scale, of low rank, is added to it, and only that is trained. Where a
joined matrix has parts (queries, keys and values), each has an adapter of its own or none. Axes: in, out, rank.
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
    """How an adapter is made. The product B A is multiplied with alpha / rank, or alpha / √rank where `root` is set
    (rsLoRA, Kalajdzievski, 2023). `dora`: each row's length is learned apart from its direction."""

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
        """Return the factor of the product B A."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)


@dataclass(frozen=True)
class Target:
    """Rows start to start + rows of the linear layer that the model calls `module`; `label` is their published name."""

    module: str
    start: int
    rows: int
    label: str


class Adapter(nn.Module):
    """A [rank, in], B [out, rank] and, of DoRA, the length of each row. It changes nothing before it is trained.

    A convolution's matrix is its weight with the kernel flattened into the inputs.
    """

    def __init__(self, weight: Float[Tensor, "out channels *kernel"], target: Target, low: LoraSettings):
        super().__init__()
        self.target, self.low, self.kernel = target, low, tuple(weight.shape[2:])
        begun = torch.empty(low.rank, math.prod(weight.shape[1:]))
        nn.init.kaiming_uniform_(begun, a=math.sqrt(5))  # the same numbers wherever the layer is
        self.a = nn.Parameter(begun.to(weight.device))
        self.b = nn.Parameter(torch.zeros(target.rows, low.rank, device=weight.device))
        self.dropout = Dropout(low.dropout)
        self.length = nn.Parameter(_lengths(weight.detach().flatten(1).float())) if low.dora else None

    @property
    def rows(self) -> slice:
        """Return the rows of the layer's matrix that it acts on."""
        return slice(self.target.start, self.target.start + self.target.rows)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """Multiply A x, with dropout on x."""
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
        """Return the factor of DoRA for each row of W + B A · scale; its norm passes no gradient (section 4.3)."""
        return None if self.length is None else self.length / _lengths((weight + self.change()).detach())


def _lengths(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    return torch.linalg.vector_norm(weight, dim=1)


class AdaptedLinear(nn.Module):
    """Linear layer with adapters, which replaces the layer; dropout acts on the adapters' inputs alone."""

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
        whole, at = [], 0
        for adapter, piece in zip(self.parts, pieces, strict=True):
            whole += [y[..., at : adapter.rows.start], piece]
            at = adapter.rows.stop
        return torch.cat([*whole, y[..., at:]], -1)

    @property
    def weight(self) -> Tensor:
        """The layer's own, whose type and place others ask for."""
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
        """Return the layer alone, its matrix changed as the adapters say."""
        weight = self.base.weight.detach().clone()
        for adapter in self.parts:
            weight[adapter.rows] = adapter.changed(weight[adapter.rows])
        layer = self.base.layer if isinstance(self.base, QuantizedLinear) else self.base
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer


class ReweightedLinear(nn.Module):
    """Weight of a convolution, or of another layer of images, with the change of an adapter.

    The layer computes this weight at each call (torch's `parametrize`), which costs less than a second convolution. It
    has no dropout.
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
    """Attach adapters to these layers, in place, and freezes everything else; gives the model back.

    A model that has adapters already is a `ValueError`: merge them first.
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
        made = [Adapter(base.weight[p.start : p.start + p.rows], p, targets[p]) for p in ordered]
        if isinstance(base, nn.Linear) and not isinstance(base, PixelLinear):
            model.set_submodule(name, AdaptedLinear(base, made))
        else:
            parametrize.register_parametrization(base, "weight", ReweightedLinear(made[0]))
    return model


def quantize_bases(model: nn.Module) -> nn.Module:
    """Put the matrices that have adapters into blocks of 4 bits, in place."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and isinstance(module.base, nn.Linear):
            module.base = QuantizedLinear(module.base)
    return model


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Return every adapter of a model, in the model's order."""
    return (module for module in model.modules() if isinstance(module, Adapter))


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the block; a model without adapters stays as it is."""
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
