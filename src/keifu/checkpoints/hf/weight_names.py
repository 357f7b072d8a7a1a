"""Weight-name tables (WEIGHT_NAMES): which tensors of a published file make up each parameter of a model.

A table maps our names (keifu's) to theirs (the file's). Each name is a module, with its `.weight` and `.bias`, or one
tensor. `*` is a layer's number. `[a,b,c]` are several of theirs, joined by rows in one of ours. `.T` at the end:
matrices are stored transposed. `.flat`: the file's tensor lacks our axes of size 1. `+1`: the file's numbers are larger
by one. None instead of a table: both sides have the same names.

Axes: rows = a matrix's outputs, columns = its inputs; a bias has only rows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.lazy import Index
from keifu.layers.linear import JoinedLinear
from keifu.models.registration.arrangement import Arrangement

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a layer's number in a name
Table = Mapping[str, str] | None


@dataclass(frozen=True)
class Link:
    """One tensor of keifu's model, and the file's tensors that make it up.

    shape: shape of our tensor. rows: for each of theirs, how many rows of ours it gives. turned: for each of theirs,
    the size of a rotary head whose two halves are stored interleaved (GGUF's LLaMA), or 0. offset: theirs minus ours.
    flat: whether theirs lacks axes of size 1. arrangement: another arrangement, instead of all these.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False
    turned: tuple[int, ...] = ()
    offset: float = 0.0
    flat: bool = False
    arrangement: Arrangement | None = None

    def stored_shapes(self) -> list[tuple[int, ...]]:
        """Return the shape that each published tensor has in the file."""
        if self.arrangement:
            return [tuple(part.shape) for part in self.arrangement.split(torch.empty(self.shape, device="meta"))]
        columns = [size for size in self.shape[1:] if size != 1 or not self.flat]
        shapes = [(rows, *columns) if self.shape else () for rows in self.rows]
        return [shape[::-1] for shape in shapes] if self.transposed else shapes

    def subtract_offset(self, tensor: Tensor) -> Tensor:
        """Subtract the offset from one of the file's tensors, in float32, before it is rounded to another type."""
        return tensor.float() - self.offset if self.offset else tensor

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Make keifu's tensor from the file's. If nothing has to be done, return the same tensor without a copy."""
        if self.arrangement:
            return self.arrangement.join(tensors).contiguous()
        parts = [self.part(index, tensor) for index, tensor in enumerate(tensors)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def part(self, index: int, tensor: Tensor) -> Tensor:
        """Convert the file's tensor number `index` to the rows of keifu's that it makes."""
        tensor = tensor.reshape(-1, *self.shape[1:]) if self.flat else self._turn(tensor)
        return halves(tensor, self._heads()[index])

    def read(self, read: Callable[[str, Index], Tensor], index: Index) -> Tensor:
        """Return a part of our tensor: `index` is slices of its rows and columns; (): all. `read` reads a part of
        theirs by name."""
        if self.arrangement:
            return self.join([read(name, ()) for name in self.theirs])[index]
        first, *columns = index or (slice(0, sum(self.rows)),)
        parts = []
        for number, part in self.pieces(first.start, first.stop):
            name = self.theirs[number]
            if self._heads()[number] or self.flat:
                parts.append(self.part(number, self.subtract_offset(read(name, ())))[(part, *columns)])
            else:
                region = (part, *(columns or (slice(None),)))[::-1] if self.transposed else (part, *columns)
                parts.append(self._turn(self.subtract_offset(read(name, region))))
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def pieces(self, first: int, stop: int) -> list[tuple[int, slice]]:
        """Return, for our rows first, ..., stop - 1, the numbers of their tensors and the slice of each one's rows."""
        starts = accumulate(self.rows, initial=0)
        cuts = [slice(max(first - at, 0), min(stop - at, rows)) for at, rows in zip(starts, self.rows, strict=False)]
        return [(number, cut) for number, cut in enumerate(cuts) if cut.start < cut.stop]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split keifu's tensor into the published ones."""
        if self.arrangement:
            return [part.contiguous() for part in self.arrangement.split(tensor)]
        tensor = tensor.float() + self.offset if self.offset else tensor
        parts = tensor.split(list(self.rows)) if len(self.rows) > 1 else [tensor]
        turned = [pairs(part, size) for part, size in zip(parts, self._heads(), strict=True)]
        if self.flat:
            return [part.reshape(shape) for part, shape in zip(turned, self.stored_shapes(), strict=True)]
        return [self._turn(part).contiguous() for part in turned]

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed else tensor

    def _heads(self) -> tuple[int, ...]:
        return self.turned or (0,) * len(self.theirs)


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """Convert rows whose rotary pairs are neighbours to rows that pair (0, half), (1, half + 1), ... in each head."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2) if head_dim else rows


def pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Return the inverse of `halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2) if head_dim else rows


def links(model: nn.Module, table: Table, arrangements: Mapping[str, Arrangement] | None = None) -> list[Link]:
    """Return a link for every tensor of the model, in the model's order. Raises UserError for a tensor that the table
    lacks.

    arrangements: arrangements of tensors, by the name with `*` for numbers.
    """
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    arranged = arrangements or {}
    return [
        _link(name, tuple(tensor.shape), modules, table, arranged.get(NUMBER.sub("*", name)))
        for name, tensor in state.items()
    ]


def _link(
    ours: str, shape: tuple[int, ...], modules: Mapping[str, nn.Module], table: Table, arrangement: Arrangement | None
) -> Link:
    pattern = ours if table is None else _their_pattern(ours, table)
    transposed, offset = pattern.endswith(".T"), 1.0 if pattern.endswith("+1") else 0.0
    theirs = _alternatives(_without_mark(pattern))
    rows = (shape[0] if shape else 1,)
    if arrangement:
        return Link(ours, shape, theirs, rows, arrangement=arrangement)
    module = modules[ours.rpartition(".")[0]]
    if len(theirs) > 1:
        if not isinstance(module, JoinedLinear) or len(module.parts) != len(theirs):
            raise ValueError(f"{ours} is no joined matrix of {len(theirs)} parts, but the table gives it {theirs}.")
        rows = module.parts
    return Link(
        ours, shape, theirs, rows, transposed and len(shape) == 2, offset=offset, flat=pattern.endswith(".flat")
    )


def _their_pattern(ours: str, table: Mapping[str, str]) -> str:
    """Return the published name of a tensor, with layer numbers filled in. Alternatives `[a,b]` and marks (.T, +1)
    stay."""
    numbers, general = NUMBER.findall(ours), NUMBER.sub("*", ours)
    module, _, leaf = general.rpartition(".")
    if general in table:
        pattern, mark = table[general], ""
    elif module in table:
        pattern = _without_mark(table[module])
        mark = table[module].removeprefix(pattern)
        pattern += f".{leaf}"
    else:
        raise UserError(
            f"The published format has no entry for {ours}: a layer was wrapped, added or renamed. Put the original "
            "layer back before keifu.save. A model loaded with "
            "weights='own' may be packed: load it without, and save that."
        )
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern + mark


def _without_mark(pattern: str) -> str:
    return pattern.removesuffix(".T").removesuffix(".flat").removesuffix("+1")


def _alternatives(pattern: str) -> tuple[str, ...]:
    braces = re.search(r"\[([^]]*)\]", pattern)
    return tuple(pattern.replace(braces[0], one) for one in braces[1].split(",")) if braces else (pattern,)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns, in which `*` is a layer's number and `**` anything."""
    escaped = [re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", r"\d+") for pattern in patterns]
    return any(re.fullmatch(pattern, name) for pattern in escaped)
