"""Beam search of causal models, and transformers' penalty, which no recipe asks for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.inference.text.beam_search import Hypothesis, Lengths, Logits, Search, beam_search
from keifu.inference.text.model import PREFILL_TOKENS, Model, Padding, Tokens, causal, device_of, evaluation_mode
from keifu.layers.attention.kv_cache import KVState


def power_penalty(lengths: Lengths, exponent: float = 1.0) -> Lengths:
    """Return |Y|^exponent, as transformers divides by; 1 is the mean of the tokens' log-probabilities, 0 their sum."""
    return lengths**exponent


def step(model: Model, tokens: Tokens, state: KVState, padding: Padding = None) -> Float[Tensor, "batch vocab"]:
    """Return logits, in float32, of the token after the last one."""
    return model.logits(model.hidden(tokens, state, padding)[:, -1]).float()


def prefill(model: Model, tokens: Tokens, state: KVState, padding: Padding) -> Float[Tensor, "batch vocab"]:
    """Prefill the prompts into the state, in chunks to limit the memory. Return the logits after the last token."""
    width, before = max(1, PREFILL_TOKENS // len(tokens)), padding
    *earlier, last = tokens.split(width, 1)
    for chunk in earlier:
        model.hidden(chunk, state, None if before is None else before.clamp(max=width))
        before = None if before is None else (before - width).clamp(min=0)
    return step(model, last, state, before)


def pad_left(texts: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tokens, Padding]:
    """Return the sequences as one tensor, and the number of zeros before each (None if the lengths are equal)."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
    counts = [longest - len(text) for text in texts]
    return tokens, torch.tensor(counts, device=device) if any(counts) else None


class CausalBeamModel:
    """Continues prompts, padded on the left; `longest` is the most tokens that are written."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], longest: int, device: torch.device | None = None
    ):
        self.model = model
        self.tokens, self.padding = pad_left(prompts, device)
        self.state = model.new_state(len(prompts), self.tokens.shape[1] + longest - 1)

    def first(self) -> Logits:
        return prefill(self.model, self.tokens, self.state, self.padding)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        return step(self.model, tokens[:, None], self.state)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.state.select(rows)


@torch.inference_mode()
def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], search: Search, max_tokens: int
) -> list[Hypothesis]:
    """Return the best continuation of each prompt by a causal model. Prompts may have different lengths.

    A prompt that is empty or leaves no room in the context is a `UserError`.
    """
    writer = causal(model)
    context = writer.config.context_length
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"A prompt has {len(prompt)} tokens, but it must have from 1 to {context - 1}.")
    limits = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    with evaluation_mode(model):
        return beam_search(CausalBeamModel(writer, prompts, max(limits), device_of(model)), search, limits)
