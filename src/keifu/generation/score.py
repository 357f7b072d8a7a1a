"""How likely a model finds a finished text, token by token, in one pass; knows no text.

Axes: batch = texts, length = tokens, vocab. Logits exist for a few tokens at a time, so that memory does not grow with
length · vocab.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.generation.decoding import causal, evaluating
from keifu.generation.processors import log_probability
from keifu.generation.sampler import History, RowSettings
from keifu.generation.sampling import Sampling

CHUNK = 256  # tokens whose logits exist at the same time


@torch.inference_mode()
def score(
    model: nn.Module, tokens: Int[Tensor, "batch length"], padding: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch predicted"]:
    """ln P(token | those before it) of every token but the first, [batch, length - 1] in float32.

    This is what `log_probability` reports while a text is written. `padding` counts the zeros before shorter texts (see
    `left_padded`); what stands there has no meaning. A text longer than the context is a `UserError`.
    """
    hidden, targets = _hidden(model, tokens, padding).flatten(0, 1), tokens[:, 1:].flatten()
    pairs = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([log_probability(causal(model).logits(h).float(), t) for h, t in pairs]).view(tokens[:, 1:].shape)


@torch.inference_mode()
def score_sampled(
    model: nn.Module, tokens: Int[Tensor, " length"], prompt_length: int, sampling: Sampling
) -> Float[Tensor, " written"]:
    """ln of the probability with which these settings draw each token after the first `prompt_length`, in float32.

    This is what `sampled_log_probability` reports while a text is written: -inf for a token that the settings exclude.
    """
    if not 1 <= prompt_length <= len(tokens):
        raise UserError(f"The prompt's length is {prompt_length}, which must be from 1 to the text's {len(tokens)}.")
    hidden = _hidden(model, tokens[None], None)[0, prompt_length - 1 :]
    settings = RowSettings([sampling], tokens.device)
    history = History.of_prompts(settings, tokens[None, :prompt_length], None, causal(model).config.vocab_size)
    found = [hidden.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(hidden), CHUNK):
        states = hidden[start : start + CHUNK]
        targets = tokens[prompt_length + start :][: len(states)]
        logits = causal(model).logits(states).float()
        logits = settings(logits, history.before_each(targets, logits.shape[1]))
        found.append(log_probability(logits, targets))
    return torch.cat(found)


def _hidden(model: nn.Module, tokens: Tensor, padding: Tensor | None) -> Float[Tensor, "batch length dim"]:
    """The hidden states that predict the tokens after the first."""
    longest, context = tokens.shape[1], causal(model).config.context_length
    if padding is not None:
        longest -= int(padding.min())
    if longest > context:
        raise UserError(f"The text has {longest} tokens, but this model's context is {context}: shorten it.")
    with evaluating(model):
        return causal(model).hidden(tokens, None, padding)[:, :-1]
