"""Tensors whose numbers are read, or drawn, when they are used. A slice reads only its rows and columns.

So a process that needs a part of every matrix never has the whole model in memory. Axes: rows = the first axis, columns
= the second one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from keifu.errors import UserError

aten: Any = torch.ops.aten
Index = tuple[slice, ...]  # rows and columns; () for all


class TensorReader:
    """Reader of a tensor from its file; after its first use as a whole, the tensor itself. writable: whether the
    tensor is a private copy that may be modified."""

    def __init__(self, read: Callable[[Index], Tensor]):
        self.read, self.writable = read, False
        self.tensor: Tensor | None = None

    def load(self, like: Tensor, writable: bool) -> Tensor:
        """Return the whole tensor, with the dtype and device of `like`, and keep it from now on."""
        tensor = (self.read(()) if self.tensor is None else self.tensor).to(like.device, like.dtype)
        self.tensor = tensor.clone() if writable and not self.writable else tensor
        self.writable |= writable
        return self.tensor


class LazyTensor(Tensor):
    """A tensor, or rows and columns of one, with shape, dtype and device. Its numbers are read when they are needed."""

    reader: TensorReader
    index: Index
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def of(reader: TensorReader, like: Tensor, index: Index = ()) -> "LazyTensor":
        """Return a lazy tensor for the rows and columns `index` of a reader's tensor. like: has their shape, dtype and
        device."""
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore
        lazy = make(LazyTensor, like.shape, dtype=like.dtype, device=like.device)
        lazy.reader, lazy.index = reader, index
        return lazy

    @property
    def blank(self) -> Tensor:
        """A tensor of this shape, dtype and device without memory."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    def value(self, writable: bool = False) -> Tensor:
        """Return the numbers. writable: return memory that the caller may modify; slices of one tensor share it."""
        if not self.numel():
            return self.blank.clone()
        if self.index and not writable and self.reader.tensor is None:
            return self.reader.read(self.index).to(self.device, self.dtype)
        return self.reader.load(self.blank, writable)[self.index]

    def part(self, axis: int, start: int, stop: int) -> "LazyTensor":
        """Return a lazy slice of rows (axis 0) or columns (axis 1)."""
        index = [*self.index, *(slice(0, size) for size in self.shape[len(self.index) : 2])]
        first = index[axis].start
        index[axis] = slice(first + start, first + stop)
        return LazyTensor.of(self.reader, self.blank.narrow(axis, start, stop - start), tuple(index))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if isinstance(args[0], LazyTensor):
            if (lazy := args[0]._lazily(func, args[1:], kwargs)) is not None:
                return lazy
            if schema.name.startswith("aten::new_") or schema.name.endswith("_like"):
                return func(args[0].blank, *args[1:], **kwargs)
        is_written = [bool(argument.alias_info and argument.alias_info.is_write) for argument in schema.arguments]
        arguments = [tree_map_only(LazyTensor, lambda x, writable=writable: x.value(writable), arg)
                for arg, writable in zip(args, is_written, strict=False)]  # fmt: skip
        return func(*arguments, **tree_map_only(LazyTensor, lambda x: x.value(True), kwargs))

    def _lazily(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute an operation that needs no numbers: a slice, the parts of a split, a copy of an unmodified tensor.
        Return None for any other operation."""
        axis, *_ = (*(args[1:] if func == aten.split.Tensor else args), 0)
        if func in (aten.detach.default, aten.alias.default):
            return LazyTensor.of(self.reader, self.blank, self.index)
        if func in (aten.clone.default, aten._to_copy.default) and not self.index and not self.reader.writable:
            like = self.blank.to(kwargs.get("device") or self.device, kwargs.get("dtype") or self.dtype)
            return LazyTensor.of(TensorReader(self.reader.read), like)
        if func == aten.slice.Tensor and axis in (0, 1) and args[3:] in ((), (1,)):
            start, stop, _ = slice(*(*args[1:3], None)[:2]).indices(self.shape[axis])
            return self.part(axis, start, max(start, stop))
        if func == aten.split.Tensor and axis in (0, 1):
            total, size = self.shape[axis], args[0]
            return [self.part(axis, at, min(at + size, total)) for at in range(0, total, size)]
        return None


def settle(module: nn.Module) -> None:
    """Read all parameters of a module that are not read yet. Each is read whole."""
    settled: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, LazyTensor):
                if parameter not in settled:
                    settled[parameter] = nn.Parameter(parameter.value().clone(), parameter.requires_grad)
                part._parameters[name] = settled[parameter]


class _Operation(NamedTuple):
    """Operation of a trace. state: the random generator's state before an operation that draws numbers, else None."""

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    result: Tensor
    state: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        """Return the meta tensors that the operation reads or writes."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor) and x.device.type == "meta"]

    @property
    def replaces(self) -> bool:
        """Whether the operation writes every number of its memory and reads none of it."""
        x = self.result
        return self.func in REPLACING and x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()

    def run(self, memory: dict[int, Tensor]) -> None:
        """Compute the operation on a CPU. memory: the numbers computed so far, by the storage on the meta device."""
        if self.state is not None:
            torch.set_rng_state(self.state)
        for x in self.inputs:
            memory.setdefault(_key(x), torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype))
        args, kwargs = tree_map_only(Tensor, lambda x: _view(memory, x), (self.args, self.kwargs))
        result = self.func(*args, **(kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})))
        memory.setdefault(_key(self.result), result.new_empty(0).set_(result.untyped_storage()))


REPLACING = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar}


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _view(memory: dict[int, Tensor], x: Tensor) -> Tensor:
    """Return the numbers of a meta tensor; return any other tensor unchanged."""
    return memory[_key(x)].as_strided(x.shape, x.stride(), x.storage_offset()) if x.device.type == "meta" else x


class _Trace(TorchDispatchMode):
    """Mode that records operations on the meta device. Each draws as many random numbers as on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, state = kwargs or {}, torch.get_rng_state() if torch.Tag.nondeterministic_seeded in func.tags else None
        alias = func._schema.arguments[0].alias_info if args and isinstance(args[0], Tensor) else None
        writes = bool(alias and alias.is_write) and args[0].device.type == "meta"
        result = args[0] if writes else func(*args, **kwargs)  # PyTorch would import its compiler to fill a meta tensor
        if (not alias and isinstance(result, tuple)) or kwargs.get("generator"):
            raise UserError(f"This model cannot be drawn in parts, since its initialisation uses {func}.")
        if not isinstance(result, Tensor) or result.device.type != "meta" or (alias and not writes):
            return result
        # detached, so that a later `.data =` does not change its storage
        self.operations.append(_Operation(*tree_map_only(Tensor, Tensor.detach, (func, args, kwargs, result, state))))
        if state is not None:
            self.operations[-1].run({})
        return result

    def value(self, tensor: Tensor) -> Tensor:
        """Compute a tensor, from only those operations on which it depends."""
        needed_keys, operations, memory, state = (
            {_key(tensor)},
            list[_Operation](),
            dict[int, Tensor](),
            torch.get_rng_state(),
        )
        for operation in reversed(self.operations):
            if _key(operation.result) in needed_keys:
                operations.append(operation)
                needed_keys |= {*map(_key, operation.inputs)}
                needed_keys -= {_key(operation.result)} if operation.replaces else set()
        for operation in reversed(operations):
            operation.run(memory)
        torch.set_rng_state(state)
        return _view(memory, tensor)


class _NoMetaChecks(TorchFunctionMode):
    """Mode that raises UserError if an initialisation checks for meta tensors, which some then leave unchanged
    (`nn.init.trunc_normal_`, `orthogonal_`)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func == cast(Any, Tensor.is_meta).__get__:
            raise UserError("This model cannot be drawn in parts, since its initialisation reads what it has drawn.")
        return func(*args, **(kwargs or {}))


def build_lazily(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Build a model whose parameters are drawn when they are used, one at a time, with the same numbers as in
    `build()`. Buffers are computed at once. Raises UserError for an initialisation that depends on drawn numbers."""
    trace, built = _Trace(), dict[Tensor, Tensor]()
    with torch.device("meta"), trace, _NoMetaChecks():
        model = build()
    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None and x not in built:
                    built[x] = _deferred(trace, x, device) if isinstance(x, nn.Parameter) else trace.value(x).to(device)
                if x is not None:
                    tensors[name] = cast(Any, built[x])
    return model


def _deferred(trace: _Trace, x: nn.Parameter, device: torch.device) -> nn.Parameter:
    reader = TensorReader(lambda index: trace.value(x)[index].clone() if index else trace.value(x))
    like = torch.empty((), dtype=x.dtype, device=device).expand(x.shape)
    return nn.Parameter(LazyTensor.of(reader, like), x.requires_grad)
