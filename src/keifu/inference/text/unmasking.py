"""Text generation by the reverse process of masked diffusion (LLaDA, Nie et al., 2025, section 2.4).

Masks become tokens over several steps, the likeliest first (low-confidence remasking), block by block
(semi-autoregressive). It continues a text, or fills gaps between given words with context from both sides. There is no
cache: each step is a pass over the whole text.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known
from keifu.inference.text.model import MaskPredictor, device_of, evaluation_mode
from keifu.layers.counter_rng import bits, gumbel
from keifu.ranges import Count, Seed, Temperature, check

GAP = "___"


@dataclass(frozen=True)
class Unmasking:
    """Settings of the reverse process. Raises `UserError` for a value out of its range.

    max_tokens: number of masks after a prompt; None fills the context. steps: passes of the model; None: one for each
    token. block: number of masks that are filled before later ones. temperature: divides the logits of sampled tokens;
    0 takes the likeliest.
    """

    max_tokens: Count | None = 64
    steps: Count | None = None
    block: Count = 32
    temperature: Temperature | int = 0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Unmasking":
        """Return settings by name, with a random seed if there is none. Raises `UserError` for an unknown name."""
        for name in options:
            require_known("option of masked diffusion", name, [field.name for field in fields(cls)])
        return cls(**{"seed": secrets.randbits(53), **options})


@torch.inference_mode()
def unmask(model: nn.Module, tokens: Sequence[int], how: Unmasking) -> list[int]:
    """Return the tokens with every mask replaced. Raises `UserError` for a text that is too long."""
    predictor = _predictor(model)
    room, mask = predictor.config.context_length, predictor.config.mask_token
    if len(tokens) > room:
        raise UserError(f"The text has {len(tokens)} tokens with its masks, and the model reads {room}: shorten it.")
    x = torch.tensor([tokens], device=device_of(model))
    masks, number = (x[0] == mask).nonzero()[:, 0], 0
    with evaluation_mode(model):
        for block in masks.split(how.block) if len(masks) else ():
            for count in _counts(len(block), len(masks), how.steps):
                masked_positions = block[x[0, block] == mask]
                logits, number = predictor.predict_masked(x)[0, masked_positions], number + 1
                noisy = logits
                if how.temperature:
                    seed = bits(torch.tensor([how.seed]), torch.tensor([number])).to(x.device)
                    noisy = logits / how.temperature + gumbel(seed, logits.shape)[0]
                proposals = noisy.argmax(-1)
                sure = logits.softmax(-1).gather(-1, proposals[:, None])[:, 0].topk(count).indices
                x[0, masked_positions[sure]] = proposals[sure]
    return x[0].tolist()


def _counts(size: int, total: int, steps: int | None) -> Iterator[int]:
    """Yield the number of masks that each step fills in a block of `size`. The block gets its share of all steps, at
    least one."""
    passes = size if steps is None else min(size, max(1, round(steps * size / total)))
    for step in range(passes):
        yield size * (step + 1) // passes - size * step // passes


def write(model: nn.Module, tokenizer: Tokenizer, prompt: str | Sequence[int], how: Unmasking) -> str:
    """Return the model's continuation of a prompt, up to its first end token. Raises `UserError` if the prompt leaves
    no room."""
    config = _predictor(model).config
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [*prompt]
    if (room := config.context_length - len(ids)) < 1:
        raise UserError(f"The prompt has {len(ids)} tokens, and the model reads {config.context_length}: shorten it.")
    masks = [config.mask_token] * min(how.max_tokens or room, room)
    done = unmask(model, [*ids, *masks], how)[len(ids) :]
    ends = [index for index, token in enumerate(done) if token in tokenizer.stop_ids]
    return tokenizer.decode(done[: ends[0] if ends else None])


def fill_gaps(model: nn.Module, tokenizer: Tokenizer, text: str, tokens: int, how: Unmasking) -> str:
    """Replace each `___` in the text by `tokens` generated tokens. Raises `UserError` for a text without a gap."""
    parts = split_gaps(text)
    mask, encoded = _predictor(model).config.mask_token, tokenizer.encode_batch(close_gaps(parts))
    ids = [*encoded[0], *(token for part in encoded[1:] for token in [*[mask] * tokens, *part])]
    return tokenizer.decode(unmask(model, ids, how))


def split_gaps(text: str) -> list[str]:
    """Return the parts of a text between its gaps. Raises `UserError` for a text without a gap."""
    parts = text.split(GAP)
    if len(parts) == 1:
        raise UserError(f"There is no gap in {text!r}: write {GAP} where something is wanted.")
    return parts


def close_gaps(parts: Sequence[str]) -> list[str]:
    """Remove the space before each gap. It belongs to the filling, because tokens begin with their space."""
    return [part.removesuffix(" ") for part in parts[:-1]] + [parts[-1]]


def _predictor(model: nn.Module) -> MaskPredictor:
    if not isinstance(model, MaskPredictor):
        raise UserError(f"A {type(model).__name__} fills no masks: load a model of masked diffusion, such as LLaDA.")
    return model
