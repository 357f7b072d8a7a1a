"""Tensors that are read when they are used: of a slice, its rows and columns alone.

So a process that keeps a part of every matrix never holds the whole model. Axes: rows = the first one, columns = the
second one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

aten: Any = torch.ops.aten
Index = tuple[slice, ...]  # rows and columns; () for all


class TensorReader:
    """Reader of a tensor from its file; once it was used as a whole, the tensor. own: whether it may be changed."""

    def __init__(self, read: Callable[[Index], Tensor]):
        self.read, self.own = read, False
        self.tensor: Tensor | None = None

    def whole(self, like: Tensor, own: bool) -> Tensor:
        """Return the whole tensor, of the type and on the device of another one, which is kept from now on."""
        tensor = self.read(()) if self.tensor is None else self.tensor
        tensor = tensor.to(like.device, like.dtype)
        self.tensor, self.own = tensor.clone() if own and not self.own else tensor, own or self.own
        return self.tensor


class LazyTensor(Tensor):
    """A tensor, or rows and columns of one, that has a shape, a type and a device, and numbers once they are needed."""

    reader: TensorReader
    index: Index
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def of(reader: TensorReader, like: Tensor, index: Index = ()) -> "LazyTensor":
        """Rows and columns of a reader's tensor; like: has their shape, type and device."""
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore
        found = make(LazyTensor, like.shape, dtype=like.dtype, device=like.device)
        found.reader, found.index = reader, index
        return found

    @property
    def blank(self) -> Tensor:
        """A tensor of this shape, type and device without numbers."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    def value(self, own: bool = False) -> Tensor:
        """Its numbers; own: they may be changed, which changes the whole tensor."""
        if not self.numel():
            return self.blank.clone()
        if self.index and not own and self.reader.tensor is None:
            return self.reader.read(self.index).to(self.device, self.dtype)
        return self.reader.whole(self.blank, own)[self.index]

    def part(self, axis: int, start: int, stop: int) -> "LazyTensor":
        """Select some of its rows (axis 0) or columns (1)."""
        index = [*self.index, *(slice(0, size) for size in self.shape[len(self.index) : 2])]
        first = index[axis].start
        index[axis] = slice(first + start, first + stop)
        return LazyTensor.of(self.reader, self.blank.narrow(axis, start, stop - start), tuple(index))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        found = self.detach().clone()
        return nn.Parameter(found, self.requires_grad) if isinstance(self, nn.Parameter) else found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if isinstance(args[0], LazyTensor):
            if (found := args[0]._lazily(func, args[1:], kwargs)) is not None:
                return found
            if schema.name.startswith("aten::new_") or schema.name.endswith("_like"):
                return func(args[0].blank, *args[1:], **kwargs)
        written = [bool(argument.alias_info and argument.alias_info.is_write) for argument in schema.arguments]
        read = [tree_map_only(LazyTensor, lambda x, own=own: x.value(own), arg)
                for arg, own in zip(args, written, strict=False)]  # fmt: skip
        return func(*read, **tree_map_only(LazyTensor, lambda x: x.value(True), kwargs))

    def _lazily(self, func: Any, rest: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute what needs no numbers: a slice, the parts of a split, a copy that nobody has changed; else None."""
        axis, *_ = (*(rest[1:] if func == aten.split.Tensor else rest), 0)
        if func in (aten.detach.default, aten.alias.default):
            return LazyTensor.of(self.reader, self.blank, self.index)
        if func in (aten.clone.default, aten._to_copy.default) and not self.index and not self.reader.own:
            like = self.blank.to(kwargs.get("device") or self.device, kwargs.get("dtype") or self.dtype)
            return LazyTensor.of(TensorReader(self.reader.read), like)
        if func == aten.slice.Tensor and axis in (0, 1) and rest[3:] in ((), (1,)):
            start, stop, _ = slice(*(*rest[1:3], None)[:2]).indices(self.shape[axis])
            return self.part(axis, start, max(start, stop))
        if func == aten.split.Tensor and axis in (0, 1):
            total, size = self.shape[axis], rest[0]
            return [self.part(axis, at, min(at + size, total)) for at in range(0, total, size)]
        return None


def settle(module: nn.Module) -> None:
    """Read the parameters of a module that are not read yet; each is whole here."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, LazyTensor):
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.value().clone(), parameter.requires_grad)
                part._parameters[name] = made[parameter]
