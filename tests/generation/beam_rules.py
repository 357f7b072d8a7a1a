"""transformers' rules of beam search that no recipe asks for: what the tests compare with."""

from jaxtyping import Bool
from torch import Tensor

from keifu.generation.text.beam_search import Lengths, Scores


def power_penalty(lengths: Lengths, exponent: float = 1.0) -> Lengths:
    """|Y|^exponent, as transformers divides by; 1 is the mean of the tokens' log-probabilities, 0 their sum."""
    return lengths**exponent


def until_unlikely(scores: Scores, best_open: Lengths, now: Lengths, last: Lengths) -> Bool[Tensor, " sources"]:
    """Goes on while the best open text, were it to end now, would come among the kept ones. A longer one might yet have
    done so: not exact, but soon over. transformers: early_stopping=False."""
    return best_open / now > scores[:, -1]
