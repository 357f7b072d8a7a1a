"""A second device without one: tensors on "sim" hold their numbers in the CPU's memory, and an operation whose tensors
lie on two devices is refused, as a GPU would. So code runs whole, values included, and what it computes is comparable.

`simulated()` is a block in which the device exists and is chosen. `READ` counts what the host reads from the device,
`SENT` copies from the host: a GPU would be waited for in both. `LAUNCHED` counts kernels. Scalars (tensors without an
axis) may lie anywhere.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from keifu import devices

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}


class TwoDevices(RuntimeError):
    """An operation has tensors on two devices."""


class Held(Tensor):
    """A tensor on the simulated device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        if held.dtype == torch.float64 and not WIDE:
            raise TypeError("the simulated device has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device()
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"sim({self.held!r})"

    def tolist(self) -> list:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict) -> Tensor:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Held(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """The operation on the CPU, its results where a GPU would have them."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    held = [x for x in tensors if isinstance(x, Held)]
    plain = [x for x in tensors if not isinstance(x, Held) and x.dim() and x.device.type == "cpu"]
    if func not in COPIES and held and plain:
        raise TwoDevices(f"{func} has tensors on two devices: {[(tuple(x.shape), x.device.type) for x in tensors]}")
    where = kwargs.get("device")
    there = bool(held) if where is None else torch.device(where).type == "sim"
    if where is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if held and (func in READS or (func in COPIES and not there and where is not None)):
        READ[str(func)] += 1
    if func is aten.copy_.default and isinstance(args[1], Held) and not isinstance(args[0], Held):
        READ[str(func)] += 1
    if func in COPIES and not held and there:
        SENT[str(func)] += 1
    if func is aten.copy_.default and isinstance(args[0], Held) and not isinstance(args[1], Held) and args[1].dim():
        SENT[str(func)] += 1
    if there or (held and func not in COPIES):
        _count_kernel(func, tensors)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    inside = tree_map(lambda x: x.held if isinstance(x, Held) else x, (args, kwargs))
    found = func(*inside[0], **inside[1])
    if func is aten.copy_.default:
        return args[0]
    if not there and not (held and func not in COPIES):
        return found
    wrapped = tree_map(lambda x: Held(x) if isinstance(x, Tensor) and not isinstance(x, Held) else x, found)
    if not held or func is aten._to_copy.default:
        return wrapped
    return _written(func, args, kwargs) if _writes(func) else wrapped


def _count_kernel(func, tensors: list[Tensor]) -> None:
    """Count an operation that a GPU would launch a kernel for: no view, no new memory, nothing on no elements."""
    name = func._schema.name.removeprefix("aten::")
    views = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
    if views or name in FREE or func in READS or (tensors and not any(x.numel() for x in tensors)):
        return
    LAUNCHED[name] += 1


def _writes(func) -> bool:
    returns = func._schema.returns
    return len(returns) == 1 and bool(returns[0].alias_info and returns[0].alias_info.is_write)


def _written(func, args, kwargs) -> Tensor:
    """The argument that an operation writes into, which is also what it gives."""
    for place, each in enumerate(func._schema.arguments):
        if each.alias_info and each.alias_info.is_write:
            return args[place] if place < len(args) else kwargs[each.name]
    raise AssertionError(func)


READ: Counter = Counter()
SENT: Counter = Counter()  # copies from the host's pageable memory, for which the host waits
LAUNCHED: Counter = Counter()
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
WIDE = [torch.float64]  # types that the device has beside the others; a test takes them away


class _Factories(TorchDispatchMode):
    """Sees what has no tensor of the device among its arguments: new tensors, and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Attention(TorchFunctionMode):
    """Attention as a plain formula: its fused kernels are chosen by the device's type."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], Held):
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


class _Module:
    """What torch asks a device's module for; its random numbers are the CPU's."""

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device=None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device=None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _enter(self: torch.inference_mode) -> None:
    """Inference mode as the plain one without gradients: its tensors allow no views of tensors of a class of ours."""
    self.without = torch.no_grad()
    self.without.__enter__()


def _leave(self: torch.inference_mode, *error: object) -> None:
    self.without.__exit__(*error)


@functools.cache
def device() -> torch.device:
    """The simulated device; torch knows it from the first call on."""
    _setup_privateuseone_for_python_backend("sim", _Module())
    for name in ("empty.memory_format", "empty_strided"):  # for threads, in which no mode is on
        LIBRARY.impl(name, functools.partial(_empty, getattr(aten, name.partition(".")[0])), "PrivateUse1")
    LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")  # of torch.tensor(..., device=)
    return torch.device("sim:0")


LIBRARY = torch.library.Library("aten", "IMPL")


def _empty(make, *args, **kwargs) -> Held:
    return Held(make(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(to, Held) and not isinstance(source, Held):
        SENT["_copy_from"] += 1
    source, place = (x.held if isinstance(x, Held) else x for x in (source, to))
    place.copy_(source)
    return to


@contextmanager
def simulated() -> Iterator[Counter]:
    """A block in which the device exists and is chosen; gives the count of what the host reads from it."""
    where, before = device(), torch.get_num_threads()
    for counter in (READ, SENT, LAUNCHED):
        counter.clear()
    names = mock.patch.object(devices, "available", lambda: ["sim:0", "cpu"])
    one_thread = torch.autograd.set_multithreading_enabled(False)  # the engine has no thread for this device
    no_grad = mock.patch.multiple(torch.inference_mode, __enter__=_enter, __exit__=_leave)
    environment = mock.patch.dict("os.environ", {devices.VARIABLE: str(where)})
    with no_grad, one_thread, names, environment, _Attention(), _Factories():
        yield READ
    torch.set_num_threads(before)
