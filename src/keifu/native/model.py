"""Language models computed natively. A model is packed once and serves any number of engines, each with its own caches.

Axes: batch, length, vocab; wanted = tokens whose logits are requested.
"""

import ctypes
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from weakref import finalize

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.files import hash_buffers, hash_of
from keifu.native import library as native
from keifu.native.compiler import Unavailable
from keifu.native.describe import LayerPart, ModelPart, describe
from keifu.native.library import open_library, say_why, switched_off
from keifu.native.pack import Packer, Weights, formats

BLOCK_SIZE = 32
MOST_TOKENS = 512  # per forward pass


@dataclass(slots=True)  # not frozen: that takes 5 times as long to make, for each token
class Span:
    """The new tokens of one sequence in a step: one that was just sampled, or a chunk of a prompt.

    - sequence: the sequence's number, the same in all its steps. Two spans of one step have different numbers.
    - tokens: at least one, at positions `start`, `start` + 1, ...
    - start: number of earlier tokens of the sequence; their keys and values are in its blocks.
    - blocks: the block table, long enough for the last new token. Blocks before the one that contains `start` may be
      shared with other sequences; the others belong to this sequence alone.
    - wanted: number of last tokens whose logits are returned: 0 for a prompt that continues, 1 to sample the next
      token, more to verify guesses or to score a text.
    - sources: blocks to copy into the first of `blocks` before the step; they contain tokens before `start`. Only for a
      runner that is `contiguous`.
    - images: pictures of the sequence (`InsertedImages`); only for PyTorch's runner.
    - prompt: number of prompt tokens, which some rotary positions depend on; only for PyTorch's runner.
    - guesses: number of last tokens that may be wrong. The sequence may continue from before them, or from any of them.
    - borders: slots for states of fixed size that other sequences may begin from, by the number of tokens before them.
    - origin: slot of such a state after `start` tokens, from which the sequence begins if it has none of its own.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wanted: int = 1
    sources: Sequence[int] = ()
    images: Any = None
    prompt: int = 0
    guesses: int = 0
    borders: Mapping[int, int] = field(default_factory=dict)
    origin: int | None = None


class NativeLM(nn.Module):
    """A causal language model whose weights are packed for the CPU. It has no trainable parameters.

    weights: their format (see `pack`). config: the model's configuration.
    """

    def __init__(self, part: ModelPart, source: Weights, weights: str, config: Any):
        """Pack the weights. Raises UserError with the name of a tensor that cannot be packed, and `Unavailable` if this
        machine cannot use the native code.
        """
        super().__init__()
        self.config, self.weights = config, weights
        self.library = open_library()
        chosen = formats(weights)
        special = dict.fromkeys((part.embedding.weight, part.head.weight), chosen.embedding)
        special |= {layer.router.weight: native.F32 for layer in part.layers if layer.router}
        self.packer = Packer(self.library, source, chosen, special)
        self._layers = (native.Layer * len(part.layers))(*(_layer(layer, self.packer) for layer in part.layers))
        self.description = _description(part, self._layers, self.packer)
        del self.packer.weights  # otherwise the source model, or the last matrix read from a file, would stay in memory

    @property
    def nbytes(self) -> int:
        """Size of the packed matrices in bytes."""
        return self.packer.arena.size

    def idle_bytes(self, tokens: int) -> float:
        """Return the expected number of bytes of the experts that a step of `tokens` tokens does not read, if the
        router chooses all experts equally often."""
        idle = 0.0
        for layer in self._layers:
            matrices = [m for e in layer.experts[: layer.n_experts] for m in (e.gate, e.up, e.down) if m.data]
            size = sum(self.library.call("packed_size", m.format, m.rows, m.columns) for m in matrices)
            idle += size * (1 - layer.n_chosen / max(1, layer.n_experts)) ** tokens
        return idle

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return torch.float32 if self.description.embedding.format == native.F32 else torch.bfloat16

    def fingerprint(self) -> str:
        """Return a hash of all that the results depend on: the packed weights, the numbers of the description, the
        config, the library and the instruction set."""
        experts = [expert for layer in self._layers for expert in layer.experts[: layer.n_experts]]
        numbers = [native.numbers_of(struct) for struct in (self.description, *self._layers, *experts)]
        code = self.library.key, native.INSTRUCTIONS[self.library.call("instructions")]
        about = code, numbers, type(self.config).__module__, self.config
        return hash_of([repr(about), hash_buffers(self.packer.buffers())])

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Raise UserError: packed weights have no published format."""
        raise UserError(f"Weights packed as {self.weights} cannot be saved: load it without weights, and save that.")

    __reduce_ex__ = state_dict  # pickle and deepcopy call it

    def runner(self, n_blocks: int, block_size: int = BLOCK_SIZE) -> "NativeRunner":
        """Return a runner for an engine, with caches of `n_blocks` blocks of `block_size` tokens."""
        return NativeRunner(self, n_blocks, block_size)

    @torch.inference_mode()
    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        """Return the logits after each token."""
        batch, length = tokens.shape
        n_blocks = -(-length // BLOCK_SIZE)
        runner = self.runner(n_blocks)
        blocks = list(range(n_blocks))
        rows = [runner.run([Span(0, row, 0, blocks, length)]) for row in tokens.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, length, runner.vocab_size)


class NativeRunner:
    """Native runner of an engine's steps for one packed model, with the interface of keifu.inference.text.runner."""

    def __init__(self, model: NativeLM, n_blocks: int, block_size: int = BLOCK_SIZE):
        self.model, self.n_blocks, self.block_size = model, n_blocks, block_size
        self.contiguous = self.by_length = False
        self.vocab_size: int = model.description.vocab_size
        self.context_length: int = model.description.context_length
        self.state_bytes = 0
        self.window = widest([layer.window for layer in model._layers])
        described = ctypes.byref(model.description)
        self.token_bytes = model.library.call("cache_bytes", described, 1, block_size) // block_size
        self._handle = model.library.call("create", described, n_blocks, block_size, MOST_TOKENS)
        finalize(self, model.library.destroy, self._handle).atexit = False  # at exit a thread may still use the model

    def run(self, batch: Sequence[Span]) -> Float[Tensor, "wanted vocab"]:
        """Return float32 logits after each wanted token, span after span."""
        tokens, positions, rows, wanted = [], [], [], []
        tables = np.zeros((len(batch), max(len(span.blocks) for span in batch)), np.int32)
        for row, span in enumerate(batch):
            tokens += span.tokens
            positions += range(span.start, span.start + len(span.tokens))
            rows += [row] * len(span.tokens)
            wanted += range(len(tokens) - span.wanted, len(tokens))
            tables[row, : len(span.blocks)] = span.blocks
        logits = torch.empty(len(wanted), self.vocab_size, dtype=torch.float32, device="cpu")
        for first in range(0, len(tokens), MOST_TOKENS):
            piece = slice(first, first + MOST_TOKENS)
            asked = slice(bisect_left(wanted, first), bisect_left(wanted, first + MOST_TOKENS))
            local = [index - first for index in wanted[asked]]
            self._forward([tokens[piece], positions[piece], rows[piece], local], tables, logits[asked])
        return logits

    def _forward(self, lists: list[list[int]], tables: np.ndarray, logits: Tensor) -> None:
        tokens, positions, rows, wanted = (np.array(numbers, np.int32) for numbers in lists)
        batch = native.Batch(
            len(tokens), at(tokens), at(positions), at(rows), *tables.shape, at(tables),
            n_wanted=len(wanted), wanted=at(wanted), logits=logits.data_ptr(),
        )  # fmt: skip
        self.model.library.call("forward", self._handle, ctypes.byref(batch))

    def read_blocks(self, blocks: Sequence[int]) -> dict[str, Tensor]:
        """Copy blocks out of the cache, with their keys and values in the order of native code. The first axis of each
        tensor is the block."""
        width = self.token_bytes * self.block_size // self.model.cache_dtype.itemsize
        copied = torch.empty(len(blocks), width, dtype=self.model.cache_dtype, device="cpu")
        for block, row in zip(blocks, copied, strict=True):
            self.model.library.call("read_block", self._handle, block, row.data_ptr())
        return {"keys_and_values": copied}

    def write_blocks(self, blocks: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `read_blocks` into the cache."""
        for block, row in zip(blocks, tensors["keys_and_values"].contiguous(), strict=True):
            self.model.library.call("write_block", self._handle, block, row.data_ptr())

    def fingerprint(self) -> str:
        """Return a hash of all that the keys and values depend on."""
        return self.model.fingerprint()

    def latest(self, sequence: int, most: int) -> int:
        """Return the number of tokens, at most `most`, after which a sequence can continue: any number."""
        return most

    def forget(self, sequence: int) -> None:
        """Forget a sequence: nothing to do, since only the sequence's blocks contain its state."""


def widest(windows: Sequence[int | None]) -> int | None:
    """Return the widest window of the layers; None if a layer has no window and sees all tokens."""
    return max(filter(None, windows)) if windows and all(windows) else None


def at(numbers: np.ndarray) -> int:
    """Return the memory address of a contiguous array."""
    return numbers.ctypes.data


Packed = TypeVar("Packed", bound=NativeLM)


def pack(model: nn.Module, weights: str) -> NativeLM:
    """Pack the weights of a model as f32, bf16, int8, int4 or int4_pure. The model itself does not change.

    Raises UserError for a weight that is not finite and for an unknown format, and `Unavailable` if the native code
    lacks one of the model's layers or cannot be used on this machine.
    """
    return NativeLM(describe(model), Weights(model), weights, model.config)


@dataclass(frozen=True)
class NativeForm:
    """The packed form of a model, which generates instead of the model. It is stored in the model's attribute `native`.

    weights: the format that was requested; None for bfloat16 weights, which are packed automatically. state: version of
    the weights when they were packed (see `_state`).
    """

    weights: str | None
    state: list[tuple[int, int]]
    packed: NativeLM

    def __reduce__(self) -> Any:
        """Replace the packed form by None in copies and pickles of the model, whose weights may change."""
        return type(None), ()


def native_form(model: nn.Module, make: Callable[[nn.Module, str], Packed] = pack) -> Packed | None:
    """Return the packed model that generates instead of `model`, or None if PyTorch generates.

    A `NativeLM` is returned as it is. Another model is packed with `make` if all its weights are bfloat16 on the CPU,
    or if `attach_native` packed it; it is packed again after its weights have changed. If the native code cannot
    compute a bfloat16 model, one sentence gives the reason.
    """
    if isinstance(model, NativeLM):
        return cast(Packed, model)
    weights = list(model.parameters())
    form: NativeForm | None = vars(model).get("native")
    chosen = form and form.weights
    if not weights or (chosen is None and any(weight.dtype != torch.bfloat16 for weight in weights)):
        return None
    if switched_off() or any(weight.device.type != "cpu" for weight in weights):
        return None
    if form and form.state == _state(model):
        return cast(Packed, form.packed)
    try:
        return attach_native(model, chosen, make)
    except Unavailable as reason:
        say_why(str(reason))
        return None


def attach_native(model: nn.Module, weights: str | None, make: Callable[[nn.Module, str], Packed]) -> Packed:
    """Pack a model (see `pack`) and let the packed form generate from now on; return it. The model itself is still
    needed.

    weights: the format; None packs as bf16, as long as all weights stay bfloat16.
    """
    packed = make(model, weights or "bf16")
    vars(model)["native"] = NativeForm(weights, _state(model), packed)
    return packed


def _state(model: nn.Module) -> list[tuple[int, int]]:
    """Return the address and the version of each parameter; one of these numbers changes when the weights change."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


def _layer(part: LayerPart, packer: Packer) -> native.Layer:
    return native.Layer(
        **{name: packer.matrix(matrix) for name, matrix in part.matrices.items()},
        **{name: packer.norm(norm) for name, norm in part.norms.items()},
        **part.numbers,
        rotary_frequencies=packer.address(part.frequencies),
        sinks=packer.address(part.sinks),
        **({} if part.router is None else {"router": packer.matrix(part.router), "experts": packer.experts(part)}),
    )


def _description(part: ModelPart, layers: Any, packer: Packer) -> native.ModelDescription:
    heads = {layer.heads for layer in part.layers}
    if len(heads) != 1:
        raise UserError(f"Its layers have different numbers of heads, {sorted(heads)}: leave out weights.")
    n_heads, n_kv_heads, head_dim = heads.pop()
    return native.ModelDescription(
        part.embedding.columns, n_heads, n_kv_heads, head_dim, part.embedding.rows, len(part.layers),
        packer.matrix(part.embedding), part.embedding_scale, packer.address(part.positions),
        part.context_length, layers,
        packer.norm(part.norm), packer.matrix(part.head), part.logit_scale, source_length=part.source_length,
    )  # fmt: skip
