"""What the recipes that learn from ranked answers have in common: reading, rendering, and none longer than a row; it
knows no objective."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from keifu.data.conversation_batches import Turns
from keifu.data.preferences import Ranked, read
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.recipes._assistant import held_out

T = TypeVar("T")


def parts(source: str, share: float) -> tuple[list[Ranked], list[Ranked]]:
    """To learn from, and held out; the same question is never on both sides."""
    found = list(read(source))
    return held_out(found, [each.prompt[-1]["content"] for each in found], share)


def answer(tokenizer: Tokenizer, ranked: Ranked, place: int) -> Turns:
    """A prompt with one of its answers; only that is learned, not what the assistant said before."""
    said = {"role": "assistant", "content": ranked.answers[place]}
    ids, own = tokenizer.render_turns([*ranked.prompt, said])
    begins = max((i + 1 for i, (before, after) in enumerate(pairwise(own)) if after and not before), default=0)
    return Turns(ids, [mine and i >= begins for i, mine in enumerate(own)])


def fitting(
    found: Sequence[T], answers: Callable[[T], Sequence[Turns]], length: int, drop: bool, told: tuple[str, str]
) -> list[T]:
    """Those without an answer that is too long; others are an error unless they may be left out. `told` is what the
    error says before and behind the length."""
    longest = [max(len(each.ids) for each in answers(one)) for one in found]
    over = [size for size in longest if size > length]
    if over and not drop:
        raise UserError(
            f"{len(over):,} of {len(found):,} {told[0]} longer than {length} tokens, the longest {told[1]}{max(over)}: "
            "leave them out with --drop-long, or choose a longer --context-length."
        )
    return [one for one, size in zip(found, longest, strict=True) if size <= length]
