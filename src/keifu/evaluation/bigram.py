"""The bigram baseline: how well the next token is guessed from the last one by counting; knows no model and no text."""

import numpy as np

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def bigram_loss(training: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats a token on `held_out` of p(b | a) = (count(a, b) + s · p(b)) / (count(a) + s), with counts of `training`.

    p(b) is the share of b in training, one count added to each token. The strength s of this Dirichlet prior (MacKay
    and Peto, 1995) is the one of seven that is best on the held-out tokens, so that the baseline is as strong as it can
    be.
    """
    pairs, counts = np.unique(_pairs(training, vocab_size), return_counts=True)
    firsts = np.bincount(training[:-1].astype(np.int64), minlength=vocab_size)
    alone = np.bincount(training.astype(np.int64), minlength=vocab_size) + 1.0
    wanted = _pairs(held_out, vocab_size)
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    prior = (alone / alone.sum())[held_out[1:].astype(np.int64)]
    before = firsts[held_out[:-1].astype(np.int64)]
    return min(float(-np.log((seen + s * prior) / (before + s)).mean()) for s in STRENGTHS)


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
