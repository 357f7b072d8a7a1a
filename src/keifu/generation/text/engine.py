"""The decode loop: prompts into key-value caches, then one token a step for every request of a batch, streamed.

Batching is static: requests start together, and finished ones leave the batch. Axes: batch = texts, length = tokens,
vocab. Shorter prompts are padded on the left, so that all end together.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.generation.text.request import Piece, Request, allowed_tokens
from keifu.generation.text.sampler import SampledTokens, Sampler
from keifu.generation.text.sampling_params import SamplingParams
from keifu.layers.attention.kv_cache import Cache

PREFILL_TOKENS = 4096  # of all rows together in one pass: enough to fill a matrix product, few enough for memory
GREEDY = SamplingParams(temperature=0, seed=0)

Tokens = Int[Tensor, "batch length"]
Padding = Int[Tensor, " batch"] | None


@runtime_checkable
class Model(Protocol):
    """Interface of a causal language model; its `config` has `vocab_size` and `context_length`."""

    config: Any

    def hidden(self, tokens: Tokens, caches: Sequence[Cache] | None, padding: Padding) -> Tensor: ...

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]: ...

    def new_caches(self, batch: int, capacity: int) -> list[Cache]: ...


@runtime_checkable
class BidirectionalEncoder(Protocol):
    """Interface of an encoder such as BERT, whose attention is bidirectional: it cannot continue a text."""

    def encode(self, tokens: Tokens, segments: Tokens | None, mask: Tensor | None) -> Tensor: ...

    def pool(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class EncoderDecoderModel(Protocol):
    """Interface of an encoder-decoder, which encodes a source before it writes a target."""

    def start(self, source: Tokens, source_mask: Tensor | None, capacity: int | None) -> Any: ...


@runtime_checkable
class TaskHeadModel(Protocol):
    """Interface of a model fine-tuned to choose a label or an answer."""

    def judge(self, hidden: Tensor, mask: Tensor) -> Tensor: ...


def explain_not_causal(model: nn.Module) -> str:
    """Why a model cannot generate text, and what it can do instead, as the end of an error message."""
    name = type(model).__name__
    if isinstance(model, BidirectionalEncoder):
        return (
            f"a {name} reads both sides of a text and cannot go on with one; it can embed texts (keifu embed), "
            "classify them (keifu classify) or fill in [MASK] (keifu.generation.text.fill.fill); smollm2 can write."
        )
    if isinstance(model, EncoderDecoderModel):
        return "as an encoder-decoder, it turns one text into another and does not go on with it: use keifu translate."
    if isinstance(model, TaskHeadModel):
        return "it was fine-tuned to choose a label or an answer: use keifu classify."
    return f"a {name} cannot; choose a language model, such as smollm2."


def causal(model: nn.Module) -> Model:
    """The same model, checked to be a causal language model; any other is a `UserError`."""
    if not isinstance(model, Model):
        raise UserError(f"This model writes no text: {explain_not_causal(model)}")
    return model


def step(model: Model, tokens: Tokens, caches: Sequence[Cache], padding: Padding) -> Float[Tensor, "batch vocab"]:
    """Logits, in float32, of the token after the last one.

    Every token is chosen from the result of this call, so a model whose `hidden` is compiled or whose layers are
    replaced needs no further change.
    """
    return model.logits(model.hidden(tokens, caches, padding)[:, -1]).float()


def prefill(model: Model, tokens: Tokens, caches: Sequence[Cache], padding: Padding) -> Float[Tensor, "batch vocab"]:
    """Fills the caches with the prompts, in chunks so that memory stays bounded; the logits after the last token."""
    *earlier, last = tokens.split(max(1, PREFILL_TOKENS // len(tokens)), 1)
    for chunk in earlier:
        model.hidden(chunk, caches, padding)
    return step(model, last, caches, padding)


def pad_left(texts: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tokens, Padding]:
    """The texts as one tensor, with zeros before the shorter ones, and how many; None if all are equally long."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
    counts = [longest - len(text) for text in texts]
    return tokens, torch.tensor(counts, device=device) if any(counts) else None


class Batch:
    """Texts that are decoded together, one token a step, each with its own settings (which must have a seed).

    caches: with room for all tokens; they may hold the beginning of the prompts already.
    """

    def __init__(
        self, model: Model, tokens: Tokens, padding: Padding, samplings: Sequence[SamplingParams], caches: list[Cache]
    ):
        self.model, self.padding, self.caches = model, padding, caches
        self._logits = prefill(model, tokens[:, caches[0].length :], caches, padding)
        self._tokens: Tensor | None = None
        self._sampler = Sampler(samplings, tokens, padding, self._logits.shape[1])

    def advance(self, allowed: Bool[Tensor, "batch vocab"] | None = None) -> SampledTokens:
        """The next token of every text, after those of the last call, of those that are allowed."""
        if self._tokens is not None:
            self._logits = step(self.model, self._tokens, self.caches, self.padding)
        choice = self._sampler.choose(self._logits, allowed)
        self._tokens = choice.tokens[:, None]
        return choice

    def keep(self, rows: list[int]) -> None:
        """Continues with these texts only, and drops padding that all of them have."""
        index, start = torch.tensor(rows, device=self.caches[0].keys.device), 0
        if self.padding is not None:
            padding = self.padding[index]
            start = int(padding.min())
            self.padding = padding - start if int(padding.max()) > start else None
        for cache in self.caches:
            cache.select(index, start)
        self._sampler.select(rows)
        self._tokens = None if self._tokens is None else self._tokens[index]


@torch.inference_mode()
def decode(model: nn.Module, tokens: Tokens, n: int, sampling: SamplingParams = GREEDY) -> Int[Tensor, "batch n"]:
    """The next `n` tokens of texts of equal length; no token ends a text early. Rows share the seed."""
    writer, length = causal(model), tokens.shape[1]
    context = writer.config.context_length
    if length + n > context:
        raise UserError(f"{length} tokens and {n} more do not fit this model's context of {context}: ask for fewer.")
    with evaluation_mode(model):
        caches = writer.new_caches(len(tokens), length + n - 1)
        batch = Batch(writer, tokens, None, [sampling.seeded()] * len(tokens), caches)
        return torch.stack([batch.advance().tokens for _ in range(n)], 1)


@dataclass
class _Modes:
    """The training mode of each module before the first of several users, who may leave in any order."""

    modes: list[tuple[nn.Module, bool]]
    users: int = 0


_evaluated: WeakKeyDictionary[nn.Module, _Modes] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode. Several users may overlap and leave in any order (two streams read in turn): when
    the last has left, every module is back in the mode that it had before the first."""
    with _lock:
        held = _evaluated.get(model)
        if held is None:
            held = _evaluated[model] = _Modes([(module, module.training) for module in model.modules()])
        held.users += 1
    model.eval()
    try:
        yield
    finally:
        with _lock:
            held.users -= 1
            if not held.users:
                del _evaluated[model]
                for module, mode in held.modes:
                    module.training = mode


def batch_capacity(requests: Sequence[Request]) -> int:
    """How many tokens the caches must hold for these requests; the last token of a text is not fed back."""
    return max(len(request.prompt) for request in requests) + max(request.limit for request in requests) - 1


@torch.inference_mode()
def write(model: Model, requests: Sequence[Request], caches: list[Cache]) -> Iterator[Piece]:
    """Decodes all requests to their ends: yields a piece for every token of every text, in turn.

    model: as `causal` gives it. caches: with room for `batch_capacity(requests)`. They may hold the beginning of all
    prompts already; at the end, if there is one request, they hold all its tokens but the last. Texts that end leave
    the batch: the others get faster.
    """
    tokens, padding = pad_left([request.prompt for request in requests], caches[0].keys.device)
    with evaluation_mode(cast(nn.Module, model)):
        batch = Batch(model, tokens, padding, [request.sampling for request in requests], caches)
        going = list(requests)
        while going:
            allowed = allowed_tokens(going, model.config.vocab_size, tokens.device)
            rows = batch.advance(allowed).figures.tolist()  # the one time in a step that the host waits for the device
            pieces = [request.take(*row) for request, row in zip(going, rows, strict=True)]
            yield from pieces
            kept = [row for row, piece in enumerate(pieces) if piece.finish_reason is None]
            going = [going[row] for row in kept]
            if going and len(going) < len(pieces):
                batch.keep(kept)
