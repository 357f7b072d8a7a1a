"""The decode loop: prompts into caches, then a token a step for every text of a batch; knows no text and no model.

Axes: batch = texts, length = tokens, vocab. Texts of different lengths begin with padding, so that all end together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.generation.requests import Piece, Request
from keifu.generation.sampler import Sampler
from keifu.layers.cache import Cache

PREFILL_TOKENS = 4096  # of all rows together in one pass: enough to fill a matrix product, few enough for memory


@runtime_checkable
class Model(Protocol):
    """What a causal model must offer; its `config` has `vocab_size` and `context_length`."""

    config: Any

    def hidden(
        self, tokens: Int[Tensor, "batch length"], caches: Sequence[Cache] | None, padding: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch length dim"]: ...

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]: ...

    def new_caches(self, batch: int, capacity: int) -> list[Cache]: ...


def step(
    model: Model, tokens: Int[Tensor, "batch length"], caches: Sequence[Cache], padding: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch vocab"]:
    """Logits, in float32, of the token after the last one. Every pass that chooses a token is this call, so a model whose
    `hidden` is compiled, or whose layers are replaced, needs nothing more."""
    return model.logits(model.hidden(tokens, caches, padding)[:, -1]).float()


def prefill(
    model: Model, tokens: Int[Tensor, "batch length"], caches: Sequence[Cache], padding: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch vocab"]:
    """Takes prompts into the caches, some at a time so that memory stays bounded; the logits after the last token."""
    *earlier, last = tokens.split(max(1, PREFILL_TOKENS // len(tokens)), 1)
    for chunk in earlier:
        model.hidden(chunk, caches, padding)
    return step(model, last, caches, padding)


def left_padded(
    texts: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, " batch"] | None]:
    """The texts as one tensor, with zeros before the shorter ones, and how many; None if all are equally long."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
    counts = [longest - len(text) for text in texts]
    return tokens, torch.tensor(counts, device=device) if any(counts) else None


def capacity(requests: Sequence[Request]) -> int:
    """How many tokens the caches must hold for these requests; the last token of a text is never fed back."""
    return max(len(request.prompt) for request in requests) + max(request.limit for request in requests) - 1


@torch.inference_mode()
def decode(model: Model, requests: Sequence[Request], caches: list[Cache], held: int = 0) -> Iterator[Piece]:
    """Writes the texts to their ends, a piece for every token of every text.

    caches: room for `capacity(requests)`. They hold the first `held` tokens of the prompts already, and afterwards, if
    there is one request, all its tokens but the last. Texts that end leave the batch, so that the others go on faster.
    """
    requests = list(requests)
    device = caches[0].keys.device
    tokens, padding = left_padded([request.prompt for request in requests], device)
    with evaluating(model):
        logits = prefill(model, tokens[:, held:], caches, padding)
        sampler = Sampler([request.sampling for request in requests], tokens, padding, logits.shape[1])
        while requests:
            choice = sampler.choose(logits)
            rows = choice.figures.tolist()  # the one time in a step that the host waits for the device
            pieces = [request.take(*row) for request, row in zip(requests, rows, strict=True)]
            yield from pieces
            going = [row for row, piece in enumerate(pieces) if piece.finish_reason is None]
            tokens, requests = choice.tokens[:, None], [requests[row] for row in going]
            if going and len(going) < len(pieces):
                tokens, padding = tokens[going], _select(going, caches, sampler, padding)
            logits = step(model, tokens, caches, padding) if going else logits


def _select(
    rows: list[int], caches: list[Cache], sampler: Sampler, padding: Int[Tensor, " batch"] | None
) -> Int[Tensor, " kept"] | None:
    """Keeps only these rows, and of the padding only what differs between them; returns what is left of it."""
    start = 0
    if padding is not None:
        padding = padding[rows]
        start = int(padding.min())
        padding = padding - start if bool((padding > start).any()) else None
    index = torch.tensor(rows, device=caches[0].keys.device)
    for cache in caches:
        cache.select(index, start)
    sampler.select(rows)
    return padding


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model without dropout; afterwards every module is in the mode it was in."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
