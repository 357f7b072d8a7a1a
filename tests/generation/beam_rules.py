"""Beam search of causal models, and transformers' rules that no recipe asks for: what the tests compare with."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.generation.text.beam_search import Hypothesis, Lengths, Logits, Scores, Search, beam_search
from keifu.generation.text.model import Model, Tokens, causal, device_of, evaluation_mode
from keifu.layers.attention.kv_cache import KVState


def power_penalty(lengths: Lengths, exponent: float = 1.0) -> Lengths:
    """|Y|^exponent, as transformers divides by; 1 is the mean of the tokens' log-probabilities, 0 their sum."""
    return lengths**exponent


def until_unlikely(scores: Scores, best_open: Lengths, now: Lengths, last: Lengths) -> Bool[Tensor, " sources"]:
    """Goes on while the best open text, were it to end now, would come among the kept ones. A longer one might yet have
    done so: not exact, but soon over. transformers: early_stopping=False."""
    return best_open / now > scores[:, -1]


def step(model: Model, tokens: Tokens, state: KVState) -> Float[Tensor, "batch vocab"]:
    """Logits, in float32, of the token after the last one."""
    return model.logits(model.hidden(tokens, state)[:, -1]).float()


class CausalBeamModel:
    """Continues prompts, each of which is read alone; `longest` is the most tokens that are written."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], longest: int, device: torch.device | None = None
    ):
        self.model, self.prompts, self.device = model, prompts, device
        self.state = model.new_state(len(prompts), max(map(len, prompts)) + longest - 1)

    def first(self) -> Logits:
        found = []
        for row, prompt in enumerate(self.prompts):
            alone = self.model.new_state(1, len(prompt))
            found.append(step(self.model, torch.tensor([prompt], device=self.device), alone))
            self.state.begin(alone, 0, len(prompt), [row])
        return torch.cat(found)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        return step(self.model, tokens[:, None], self.state)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.state.select(rows)


@torch.inference_mode()
def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], search: Search, max_tokens: int
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt by a causal model, best first; the prompts need not be equally long.

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
