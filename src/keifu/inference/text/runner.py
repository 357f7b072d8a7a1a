"""Runner of a causal model: computes tokens of several sequences in one step. Keys and values are in blocks.

An engine has one runner, in PyTorch (`TorchRunner`) or native (`keifu.native`), with the same attributes and methods.
The pool has `n_blocks` blocks of `block_size` tokens. The keys and values of the token at position p of a sequence are
in block `blocks[p // block_size]` of the sequence's block table, at index p % block_size. The scheduler assigns blocks
to sequences. Axes: wanted = tokens whose logits are needed, vocab.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.files import hash_buffers, hash_of
from keifu.inference.text.model import Model, causal, device_of
from keifu.inference.text.paged.blocks import BlockManager
from keifu.inference.text.paged.fixed_states import KeptStates
from keifu.inference.text.paged.graphs import StepGraphs
from keifu.inference.text.paged.pool import Pool
from keifu.inference.text.paged.state import SMALLEST, PagedState, first_of_run, on_device
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.packed import fits, has_kernel
from keifu.layers.attention.positions import Rotary
from keifu.layers.transformer.decoder import Inserted
from keifu.layers.transformer.decoding import decoding_form
from keifu.memory import available_memory
from keifu.native.model import NativeRunner, Span, native_form, widest

STATES = 32  # number of sequences for whose states of fixed size memory is left free; default number of kept states
SHORT = 32  # shorter spans attend together at different positions; longer ones would mask too much


class TorchRunner:
    """Runner of any causal model in PyTorch, on any device. All tokens of a step go through the linear layers together.

    The keys and values of a layer are one tensor [heads, tokens of all blocks, head_dim]. New ones are written by one
    index for all sequences. On a CPU attention reads the blocks without a copy: those of a sequence are consecutive
    (`contiguous`), and sequences at equal distances are one strided view. On other devices, and if blocks are not
    consecutive, they are gathered; on a CPU this took 3 to 10 times as long.

    On a GPU with a kernel for sequences of any lengths (`packs`), Transformer blocks run in a form with fewer kernels.
    If all blocks have this form, decoding steps are CUDA graphs.

    overlaps: whether the device computes asynchronously, so that the next step can be launched before the host has read
    the tokens of this one.

    token_bytes: bytes of a token's keys and values. window: the largest number of tokens that a token attends to in any
    layer, including itself; earlier blocks may be reused for other sequences. None: all tokens. contiguous: whether it
    is fastest if a sequence's blocks are consecutive. by_length: whether keys depend on the prompt's length, so that
    another prompt with the same beginning cannot reuse them.

    copied_bytes: further memory of a step for each token of the pool. Except on a CPU, the keys and values of one layer
    at a time are gathered, with up to a quarter of padding; all graphs share this memory.
    """

    def __init__(self, model: Model, n_blocks: int, block_size: int = 16, n_states: int = STATES):
        self.model, self.n_blocks, self.block_size = model, n_blocks, block_size
        self.vocab_size: int = model.config.vocab_size
        self.context_length: int = model.config.context_length
        layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
        self.window = widest([layer.window for layer in layers])
        scalings = [layer.scaling for layer in model.modules() if isinstance(layer, Rotary)]
        self.by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        empty = model.new_state(0, 1)
        self.device, self.token_bytes = empty.device, empty.token_bytes
        self.contiguous, self.overlaps = self.device.type == "cpu", self.device.type == "cuda"
        self.copied_bytes = 0 if self.contiguous else 5 * self.token_bytes // (4 * max(1, len(empty.keys)))
        kept = zip(empty.keys, empty.values, [layer.scoring for layer in layers], strict=False)
        every = len(layers) == len(empty.keys) and not empty.row_bytes
        self.packs = has_kernel(self.device) and every and all(fits(*cache) for cache in kept)
        self.n_states = n_states if empty.row_bytes else 0
        self._pool = Pool(empty, n_blocks * block_size, self.packs, self.n_states)
        self.state_bytes = self._pool.states.row_bytes
        self._form, whole = decoding_form(model) if self.packs else (model, False)
        self.graphs = StepGraphs(self._pool, self._logits) if whole and not self.by_length else None

    def run(self, batch: Sequence[Span], last: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "wanted vocab"]:
        """Return float32 logits after each wanted token: span by span, within a span in the order of the tokens.

        It writes the new keys and values into the blocks. A block that one span writes is not read by another in the
        same step, because the scheduler shares a block only from the next step on. An interrupted step is repeated,
        which overwrites its results. last: tokens on the device; spans refer to them by row.
        """
        # graphs and Triton's kernels use the current GPU, by default the first one
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._run(batch, last)

    def _run(self, batch: Sequence[Span], last: Tensor | None) -> Float[Tensor, "wanted vocab"]:
        size = self.block_size
        self._pool.reserve(size * (1 + max(max(span.blocks) for span in batch)))
        for span in batch:
            if span.sources:
                self._pool.copy(span.sources, span.blocks[: len(span.sources)], size)
        one_each = all(len(span.tokens) == span.wanted == 1 for span in batch)
        if self.graphs is not None and one_each and self._inserted(batch) is None:
            return self.graphs.run(batch, size, last)
        groups = self._groups(batch)
        spans = [span for group in groups for span in group]
        step = PagedState(self._pool, size, groups, _wanted(spans, batch), self.packs)
        tokens, *others = on_device(step.lists, self.device)
        step.begin([tokens if last is None else last.index_select(0, tokens), *others])
        return self._logits(step, self._inserted(spans))

    def _logits(self, step: PagedState, inserted: Inserted | None = None) -> Float[Tensor, "wanted vocab"]:
        """Run the model on the tokens of a step."""
        more: dict[str, Any] = {} if inserted is None else {"inserted": inserted}
        hidden = self._form.hidden(step.tokens, step, **more)
        return self._form.logits(hidden[0, step.wanted]).float()

    def read_blocks(self, blocks: Sequence[int]) -> dict[str, Tensor]:
        """Copy blocks out of the pool. The first axis of each tensor is the block."""
        return self._pool.read(blocks, self.block_size)

    def write_blocks(self, blocks: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `read_blocks` into the pool."""
        self._pool.write(blocks, tensors, self.block_size)

    def fingerprint(self) -> str:
        """Return a hash of all that the keys and values depend on: the weights, the modules, the config, PyTorch's
        version and the device."""
        model, config, device = cast(nn.Module, self.model), self.model.config, self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        code = torch.__version__, device.type, name, torch.get_float32_matmul_precision(), self.packs
        tensors = [*model.named_parameters(), *model.named_buffers()]
        kinds = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
        about = code, kinds, str(model), type(config).__module__, config
        data = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for _, x in tensors)
        return hash_of([repr(about), hash_buffers(data)])

    def latest(self, sequence: int, most: int) -> int:
        """Return the largest number of tokens, at most `most`, after which a sequence can continue: `most` itself
        without states of fixed size."""
        return self._pool.states.latest(sequence, most) if self.state_bytes else most

    def forget(self, sequence: int) -> None:
        """Free the data of a sequence, except blocks. The sequence has ended or was preempted."""
        self._pool.states.forget(sequence)

    def _inserted(self, spans: Sequence[Span]) -> Inserted | None:
        """Return the embeddings of the pictures in these spans; None if there are none."""
        positions, embeddings, first = list[int](), list[Tensor](), 0
        for span in spans:
            if span.images is not None:
                inserted, rows = span.images.between(self.model, span.start, span.start + len(span.tokens))
                positions += [first + position for position in inserted]
                embeddings += [rows] if inserted else []
            first += len(span.tokens)
        return Inserted(on_device([positions], self.device)[0], torch.cat(embeddings)) if positions else None

    def _groups(self, batch: Sequence[Span]) -> list[list[Span]]:
        """Group the spans that attend together: with equal numbers of tokens, similar ends, and views of the pool at
        equal distances. Without such views, group spans of one token. If a kernel takes any lengths, all are one
        group."""
        if self.packs:
            return [list(batch)]
        size, groups = self.block_size, list[list[Span]]()
        alike: dict[tuple[Any, ...], list[Span]] = {}
        for span in batch:
            width, end = len(span.tokens), span.start + len(span.tokens)
            first = first_of_run(span.blocks[: -(-end // size)]) if self.contiguous else None
            if first is None:  # blocks are not consecutive, so they are gathered
                key = (0, width) if width == 1 else (0, width, span.sequence)
            elif width > SHORT:
                key = (1, width, span.sequence)
            else:
                key = (1, width, max(SMALLEST, 1 << (end - 1).bit_length()))
            alike.setdefault((*key, *self._pool.states.kinds(span)), []).append(span)
        for (run, *_), spans in alike.items():
            if not run:
                groups.append(spans)
                continue
            longest = max(span.start + len(span.tokens) for span in spans)
            room = self._pool.capacity - longest  # the view of a shorter sequence extends beyond its end
            groups += _equally_spaced(sorted(spans, key=lambda span: span.blocks[0]), room // size)
        return groups


Runner = TorchRunner | NativeRunner
POOL = 0.25  # share of the free memory for the pool


def runner_of(model: nn.Module, memory: int | None = None, block_size: int = 16, native: bool = True) -> Runner:
    """Return the runner of the model's native form if there is one, otherwise PyTorch's.

    memory: bytes for its blocks; None: a share of the free memory. block_size: in PyTorch; the native form has a fixed
    one. native: whether to use the native form.
    """
    packed = native_form(model) if native else None
    make = partial(TorchRunner, causal(model), block_size=block_size) if packed is None else packed.runner
    probe: Runner = make(1)
    memory = int(POOL * available_memory(device_of(model))) if memory is None else memory
    memory -= min(memory // 2, STATES * probe.state_bytes)
    kept = memory // probe.state_bytes if probe.state_bytes else 0  # a running sequence has two, so this is half
    memory -= kept * probe.state_bytes // 2
    token = probe.token_bytes + (probe.copied_bytes if isinstance(probe, TorchRunner) else 0)
    n_blocks = max(1, memory // max(1, token * probe.block_size))
    return TorchRunner(causal(model), n_blocks, block_size, kept) if kept else make(n_blocks)


def blocks_of(runner: Runner, whole: bool = False) -> BlockManager:
    """Return a manager of the runner's blocks. whole: whether sequences have all their blocks until they end, and begin
    from no kept state."""
    fixed = isinstance(runner, TorchRunner) and runner.state_bytes
    sharing = not runner.by_length and not (fixed and whole)
    states = KeptStates(runner.n_states) if isinstance(runner, TorchRunner) and runner.state_bytes else None
    return BlockManager(runner.n_blocks, runner.block_size, sharing, states, None if whole else runner.window)


def _equally_spaced(spans: Sequence[Span], last: int) -> list[list[Span]]:
    """Sort spans by their first blocks, and split them into groups at equal distances. Spans after `last` are alone."""
    groups: list[list[Span]] = []
    step = 0
    for span in spans:
        first = span.blocks[0]
        distance = first - groups[-1][-1].blocks[0] if groups else 0
        if groups and distance and first <= last and (len(groups[-1]) == 1 or distance == step):
            groups[-1].append(span)
            step = distance
        else:
            groups.append([span])
    return groups


def _wanted(spans: Sequence[Span], batch: Sequence[Span]) -> list[int]:
    """Return the indices of the tokens whose logits are needed, in the order of the batch."""
    stops = accumulate(len(span.tokens) for span in spans)
    ends = dict(zip((span.sequence for span in spans), stops, strict=True))
    return [index for span in batch for index in range(ends[span.sequence] - span.wanted, ends[span.sequence])]
