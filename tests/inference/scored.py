"""What sampling settings say of a text in one pass: beside it, what is reported while the text is written."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.inference.text import likelihood
from keifu.inference.text.logits_processors import log_probability
from keifu.inference.text.model import text_model
from keifu.inference.text.sampler import History, RowSettings
from keifu.inference.text.sampling_params import SamplingParams


def before_each(history: History, tokens: Int[Tensor, " length"], vocab: int) -> History:
    """Return the history before each of the next tokens, a row for each. Add all of them to the given history."""
    if history.seen is None and history.counts is None:
        return history
    new = torch.zeros(len(tokens), vocab, device=tokens.device).scatter_(1, tokens[:, None], 1.0)
    after = new.cumsum(0)
    before = after - new
    seen = None if history.seen is None else history.seen | (before > 0)
    counts = None if history.counts is None else history.counts + before
    history.seen = None if history.seen is None else history.seen | (after[-1:] > 0)
    history.counts = None if history.counts is None else history.counts + after[-1:]
    return History(seen, counts)


@torch.inference_mode()
def score_sampled(
    model: nn.Module, tokens: Int[Tensor, " length"], prompt_length: int, sampling: SamplingParams
) -> Float[Tensor, " written"]:
    """Return ln of the probability with which these settings draw each token after the first `prompt_length`, in
    float32.

    This is what `sampled_log_probability` reports while a text is written: -inf for a token that the settings exclude.
    """
    if not 1 <= prompt_length <= len(tokens):
        raise UserError(f"The prompt's length is {prompt_length}, which must be from 1 to the text's {len(tokens)}.")
    settings = RowSettings([sampling], tokens.device)
    vocab_size = text_model(model).config.vocab_size
    history = History.of_texts(settings, [tokens[:prompt_length].tolist()], [[]], vocab_size)
    left = tokens[prompt_length:]
    found = [left.new_zeros(0, dtype=torch.float32)]
    predictions = torch.cat(list(likelihood._predictions(model, tokens[None])))
    for logits in predictions[prompt_length - 1 :].split(likelihood.CHUNK):
        targets, left = left[: len(logits)], left[len(logits) :]
        logits = settings(logits, before_each(history, targets, logits.shape[1]))
        found.append(log_probability(logits, targets))
    return torch.cat(found)
