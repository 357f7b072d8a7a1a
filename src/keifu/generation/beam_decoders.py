"""What a beam search asks for logits: a causal model and its prompts, or an encoder-decoder and its sources; knows no
search.

Axes: batch = prompts or sources, length, rows = texts that are open, vocab.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.data.lengths import padded
from keifu.generation.decoding import Model, left_padded, prefill, step

Logits = Float[Tensor, "rows vocab"]


@runtime_checkable
class Decoder(Protocol):
    """Texts that grow together. `first` gives one row of logits for each source, `next` one for each row: in
    float32, and in memory that the caller may write over."""

    def first(self) -> Logits: ...

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits: ...

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Goes on with these rows; one may stand there several times."""
        ...


class CausalDecoder:
    """Continues prompts, padded on the left; `longest` is the most tokens that are written."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], longest: int, device: torch.device | None = None
    ):
        self.model = model
        self.tokens, self.padding = left_padded(prompts, device)
        self.caches = model.new_caches(len(prompts), self.tokens.shape[1] + longest - 1)

    def first(self) -> Logits:
        return prefill(self.model, self.tokens, self.caches, self.padding)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        return step(self.model, tokens[:, None], self.caches, self.padding)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.padding = None if self.padding is None else self.padding[rows]
        for cache in self.caches:
            cache.select(rows)


@runtime_checkable
class State(Protocol):
    """What an encoder-decoder knows of its sources and of the targets so far."""

    def select(self, rows: Int[Tensor, " kept"]) -> None: ...


@runtime_checkable
class Translator(Protocol):
    """What an encoder-decoder offers; its `config` has vocab_size, context_length, start_id, end_id and pad_id."""

    config: Any

    def start(
        self,
        source: Int[Tensor, "batch length"],
        source_mask: Bool[Tensor, "batch length"] | None,
        capacity: int | None,
    ) -> Any: ...

    def hidden(self, target: Int[Tensor, "batch length"], state: Any) -> Tensor: ...

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]: ...


class SourceDecoder:
    """Writes targets of sources, which are read once; `longest` is the most tokens that are written."""

    def __init__(self, model: Translator, sources: Sequence[Sequence[int]], longest: int, device: torch.device):
        self.model = model
        self.begin = torch.full((len(sources),), model.config.start_id, device=device)
        source, mask = padded(sources, model.config.pad_id)
        self.state: State = model.start(source.to(device), None if mask is None else mask.to(device), longest)

    def first(self) -> Logits:
        return self.next(self.begin)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        return self.model.logits(self.model.hidden(tokens[:, None], self.state)[:, -1]).float()

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.state.select(rows)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are; the CPU for one without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
