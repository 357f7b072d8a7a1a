"""A second device without one: tensors on "sim" hold their numbers in the CPU's memory, and an operation whose tensors
lie on two devices is refused, as a GPU would. So code runs whole, values included, and what it computes is comparable.

`simulated()` is a block in which the device exists and is chosen. `READ` counts what the host reads from the device,
`SENT` copies from the host: a GPU would be waited for in both. `STAGED` counts copies to pinned memory of the host that
nobody waits for: they are made when somebody waits for a later event. `LAUNCHED` counts kernels. Scalars (tensors
without an axis) may lie anywhere.
"""

import functools
import importlib
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakTensorKeyDictionary

from keifu import devices

importlib.import_module("torch.nn.attention.varlen")  # registers its operation
aten = torch.ops.aten
CPU = torch.device("cpu")
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
    """Run the operation on the CPU, and put its results on the device that a GPU would use."""
    if func is torch.ops.torch_attn._varlen_attn.default:
        LAUNCHED["_varlen_attention"] += 1
        inside = [x.held if isinstance(x, Held) else x for x in args]
        found = _varlen_attention(*inside, **kwargs)
        Graph.record(_varlen_attention, inside, kwargs, found)
        return Held(found), args[0].new_empty(0), args[0].new_empty(0)
    facts, leaves = _facts(func), [*_leaves(args), *_leaves(kwargs.values())]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if RECORDS:
        RECORD.append((facts.text, *map(_shape, leaves)))
    held, copies = [x for x in tensors if isinstance(x, Held)], func in COPIES
    plain = [x for x in tensors if not isinstance(x, Held)] if len(held) < len(tensors) else []
    if held and not copies and any(x.dim() and x.device.type == "cpu" for x in plain):
        raise TwoDevices(f"{func} has tensors on two devices: {[(tuple(x.shape), x.device.type) for x in tensors]}")
    where = kwargs.get("device")
    there = bool(held) if where is None else torch.device(where).type == "sim"
    if where is not None and there:
        kwargs = {**kwargs, "device": CPU}
    if held and (facts.reads or (copies and not there and where is not None)):
        READ[facts.text] += 1
    if func is aten.copy_.default and isinstance(args[1], Held) and not isinstance(args[0], Held):
        if args[0] in PINNED and (*args, False)[2]:
            return _copy_later(*args[:2])
        READ[facts.text] += 1
    if copies and not held and there:
        SENT[facts.text] += 1
    if func is aten.copy_.default and isinstance(args[0], Held) and not isinstance(args[1], Held) and args[1].dim():
        SENT[facts.text] += 1
    if facts.kernel and (there or (held and not copies)) and (not tensors or any(x.numel() for x in tensors)):
        LAUNCHED[facts.kernel] += 1
    if pinned := bool(kwargs.get("pin_memory")):
        kwargs = {**kwargs, "pin_memory": False}
    inside = [_inside(x) for x in args], {name: _inside(x) for name, x in kwargs.items()}
    found = func(*inside[0], **inside[1])
    if pinned:
        PINNED[found] = True
    if there or held:
        Graph.record(func, *inside, found)
    if func is aten.copy_.default:
        return args[0]
    if not there and not (held and not copies):
        return found
    if held and func is not aten._to_copy.default and facts.written is not None:
        place, name = facts.written
        return args[place] if place < len(args) else kwargs[name]
    return _outside(found)


class _Facts(NamedTuple):
    """Facts about an operation: its name, the kernel that a GPU launches, whether the host reads, and the number and
    name of the argument that it writes into and returns."""

    text: str
    kernel: str | None
    reads: bool
    written: tuple[int, str] | None


@functools.cache
def _facts(func) -> _Facts:
    """Return the facts about an operation. A view, new memory and a read are no kernels."""
    schema = func._schema
    returns, arguments = ([(x.name, x.alias_info) for x in part] for part in (schema.returns, schema.arguments))
    name, reads = schema.name.removeprefix("aten::"), func in READS
    views = any(alias and not alias.is_write for _, alias in returns)
    written = [(n, name) for n, (name, alias) in enumerate(arguments) if alias and alias.is_write]
    written = written[0] if len(returns) == 1 and returns[0][1] and returns[0][1].is_write else None
    return _Facts(str(func), None if views or name in FREE or reads else name, reads, written)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values; a list, a tuple or a dictionary yields its contents."""
    for each in values:
        kind = type(each)
        if kind is list or kind is tuple:
            yield from _leaves(each)
        elif kind is dict:
            yield from _leaves(each.values())
        else:
            yield each


def _inside(x: Any) -> Any:
    """Return an argument with the numbers of its tensors."""
    if isinstance(x, Held):
        return x.held
    kind = type(x)
    return kind([_inside(each) for each in x]) if kind is list or kind is tuple else x


def _outside(x: Any) -> Any:
    """Return a result with its tensors on the device."""
    if isinstance(x, Tensor):
        return x if isinstance(x, Held) else Held(x)
    kind = type(x)
    return kind([_outside(each) for each in x]) if kind is list or kind is tuple else x


def _copy_later(to: Tensor, source: Held) -> Tensor:
    """Copy the numbers of now when somebody waits for it; until then the memory has others."""
    LATER.append(functools.partial(to.copy_, source.held.clone()))
    STAGED["copy_"] += 1
    return to.fill_(torch.nan if to.is_floating_point() else 1)


class _Event:
    """The end of the copies that were asked for before it."""

    def __init__(self):
        self.copies = LATER.copy()

    def synchronize(self) -> None:
        for copy in self.copies:
            if copy in LATER:
                LATER.remove(copy)
                copy()


class _Stream:
    """The order in which the device works."""

    def record_event(self) -> _Event:
        return _Event()


class Graph:
    """A CUDA graph: operations on the device, which `replay` repeats on the memory that they had."""

    recording: "Graph | None" = None

    def __init__(self):
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    @classmethod
    def record(cls, func, args, kwargs, found) -> None:
        if cls.recording is not None:
            written = [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]
            cls.recording.calls.append((func, args, kwargs, written))

    @classmethod
    def capture(cls, compute, memory):
        """Return `keifu.inference.text.paged.graphs.capture` on this device: the host must not read or send
        anything."""
        MEMORIES.append(memory)
        graph, before = cls(), (READ.total(), SENT.total())
        cls.recording = graph
        try:
            compute()
        finally:
            cls.recording = None
        assert (READ.total(), SENT.total()) == before, (READ, SENT)
        for call in graph.calls:  # what a graph writes is not there before its replay
            for x in call[3]:
                if x.is_floating_point() and _is_new(x, call):
                    x.fill_(torch.nan)
        return graph.replay

    def replay(self) -> None:
        for call in self.calls:
            func, args, kwargs, written = call
            found = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for x, new in zip(written, found, strict=True):
                if _is_new(x, call):
                    x.copy_(new)


def _is_new(x: Tensor, call) -> bool:
    """Return whether a result of a call has memory of its own."""
    given = [y for y in tree_flatten(call[1:3])[0] if isinstance(y, Tensor)]
    return all(x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for y in given)


def _shape(x: Any) -> Any:
    """Return the part of an argument that a CUDA graph would repeat."""
    return (x.shape, x.stride(), x.storage_offset(), x.dtype) if isinstance(x, Tensor) else x


READ: Counter = Counter()
MEMORIES: list[Any] = []  # of each graph
STAGED: Counter = Counter()
LATER: list[Any] = []
PINNED = WeakTensorKeyDictionary()
SENT: Counter = Counter()  # copies from the host's pageable memory, for which the host waits
LAUNCHED: Counter = Counter()
RECORD: deque = deque(maxlen=10_000)  # operations with the shapes of their tensors, and their numbers
RECORDS = False  # whether to note them; a test sets it
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
WIDE = [torch.float64]  # types that the device has beside the others; a test takes them away


class _Factories(TorchDispatchMode):
    """Sees what has no tensor of the device among its arguments: new tensors, and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Fused(TorchFunctionMode):
    """Operations for which a GPU has one kernel forward and one backward, and the CPU a formula of several."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fused = FUSED.get(func) if isinstance(args[0] if args else None, Held) else None
        if fused is None:
            return func(*args, **kwargs)
        if fused is torch.rms_norm:  # whose weight has a gradient
            args, kwargs = (*args, *kwargs.values()), {}
        args, kwargs = _autocast(LOWER if fused is _attention else FLOAT32, args, kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return _OneKernel.apply(fused, kwargs, *args)
        return _one_kernel(fused, *args, **kwargs)


class _OneKernel(torch.autograd.Function):
    """One kernel forward, and one backward, which computes the formula again."""

    @staticmethod
    def forward(ctx, formula, kwargs, *args):
        ctx.formula, ctx.kwargs = formula, kwargs
        ctx.plain = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
        return _one_kernel(formula, *args, **kwargs)

    @staticmethod
    def backward(ctx, upstream):
        saved = [x if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        args = [plain if x is None else x for x, plain in zip(saved, ctx.plain, strict=True)]
        inputs = [x for x, needed in zip(saved, ctx.needs_input_grad[2:], strict=True) if needed]

        def formula() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(ctx.formula(*args, **ctx.kwargs), inputs, upstream)

        found = iter(_one_kernel(formula))
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


def _one_kernel(formula, *args, **kwargs):
    before = LAUNCHED.copy()
    found = formula(*args, **kwargs)
    LAUNCHED.clear()
    LAUNCHED.update(before + Counter({getattr(formula, "__name__", "formula"): 1}))
    return found


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


def _varlen_attention(q, k, v, queries, seen, most_q, most_k, causal, scale, window, enable_gqa=False, *rest):
    """Return attention of each sequence, whose last query is at its last key."""
    assert q.dtype in (torch.float16, torch.bfloat16) and queries.dtype == seen.dtype == torch.int32
    assert window[1] == 0 and not any(x is not None for x in rest)
    bounds, parts = [x.tolist() for x in (queries, seen)], []
    for (a, b), (c, d) in zip(*(itertools.pairwise(each) for each in bounds), strict=True):
        if a == b:
            continue
        ahead = torch.arange(d - c)[None] - torch.arange(d - c - (b - a), d - c)[:, None]
        mask = (ahead <= 0) & (ahead > -window[0] - 1 if window[0] >= 0 else ahead <= 0)
        found = _attention(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), mask, scale=scale,
                           enable_gqa=enable_gqa)  # fmt: skip
        parts.append(found[0].transpose(0, 1))
    longest = [max(b - a for a, b in itertools.pairwise(each)) for each in bounds]
    assert longest[0] <= most_q and longest[1] <= most_k and bounds[1][-1] <= len(k)
    return torch.cat([*parts, torch.zeros_like(q[bounds[0][-1] :]) / 0])  # NaN: the kernel leaves padding as it is


FUSED = {
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch.nn.functional.rms_norm: torch.rms_norm,
}


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

    def current_stream(self, device=None) -> _Stream:
        return _Stream()

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
    """Enter inference mode as the plain one without gradients: its tensors allow no views of tensors of a class of
    ours."""
    self.without = torch.no_grad()
    self.without.__enter__()


def _leave(self: torch.inference_mode, *error: object) -> None:
    self.without.__exit__(*error)


@functools.cache
def device() -> torch.device:
    """Return the simulated device. The first call registers it with torch."""
    _setup_privateuseone_for_python_backend("sim", _Module())
    for name in ("empty.memory_format", "empty_strided"):  # for threads, in which no mode is on
        LIBRARY.impl(name, functools.partial(_empty, getattr(aten, name.partition(".")[0])), "PrivateUse1")
    LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")  # of torch.tensor(..., device=)
    EVERY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for kind, names in AUTOCAST.items():
        for name in names.split():
            _cast_operation(name, kind)
    return torch.device("sim:0")


LIBRARY = torch.library.Library("aten", "IMPL")
EVERY = torch.library.Library("_", "IMPL")
LOWER, FLOAT32 = "lower", "float32"
AUTOCAST = {  # of CUDA's lists, which have more than the CPU's, the operations that appear in a graph of keifu
    LOWER: "conv1d conv2d conv_transpose2d.input matmul mm mv addmm addmv bmm baddbmm linear",
    FLOAT32: "exp expm1 log log1p log2 pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar reciprocal rsqrt softplus erfinv "
    "layer_norm group_norm mse_loss l1_loss nll_loss nll_loss_nd binary_cross_entropy_with_logits logsumexp cumsum "
    "norm.Scalar cumprod prod prod.dim_int softmax.int log_softmax.int sum sum.dim_IntList",
}


def _autocast(kind: str, args: Any, kwargs: Any) -> Any:
    """Return the arguments as autocast casts them."""
    if not torch.is_autocast_enabled("sim"):
        return args, kwargs
    to = torch.float32 if kind == FLOAT32 else torch.get_autocast_dtype("sim")

    def cast(x: Any) -> Any:
        held = isinstance(x, Held) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(to) if held and (kind == LOWER or x.dtype != torch.float32) else x

    return tree_map(cast, (args, kwargs))


def _cast_operation(name: str, kind: str) -> None:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args, **kwargs):
        args, kwargs = _autocast(kind, args, kwargs)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return operation(*args, **kwargs)

    LIBRARY.impl(name, run, "AutocastPrivateUse1")


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
    """Make the device exist and choose it inside a block. Yield the count of the host's reads from it."""
    where, before = device(), torch.get_num_threads()
    for counter in (READ, SENT, STAGED, LATER, PINNED, LAUNCHED, MEMORIES):
        counter.clear()
    names = mock.patch.object(devices, "available", lambda: ["sim:0", "cpu"])
    one_thread = torch.autograd.set_multithreading_enabled(False)  # the engine has no thread for this device
    no_grad = mock.patch.multiple(torch.inference_mode, __enter__=_enter, __exit__=_leave)
    environment = mock.patch.dict("os.environ", {devices.VARIABLE: str(where)})
    with no_grad, one_thread, names, environment, _Fused(), _Factories():
        yield READ
    torch.set_num_threads(before)
