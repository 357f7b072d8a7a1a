"""Objectives on text: causal and masked language modeling, translation, classification, fine-tuning with an auxiliary
language-modeling loss (GPT-1), span corruption (UL2), and masked diffusion (LLaDA).

Each takes a model and a batch, and returns sums over the predicted elements.

Axes: batch = rows or examples, length = tokens, sequences = of one example.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from keifu.layers.counter_rng import uniform
from keifu.layers.losses.cross_entropy import IGNORED, cross_entropy, linear_cross_entropy
from keifu.layers.losses.head import Head
from keifu.training.protocols import Batch, LossOutput, Objective


def causal_language_modeling(model: Any, batch: Batch, z_loss: float = 0.0) -> LossOutput:
    """Predict the next token: return -log p of each token of batch["tokens"] (batch, length + 1) given the earlier
    ones.

    The model has `hidden(tokens)` and `head_weight`, so that the whole matrix of logits is never in memory.
    batch["mask"] (batch, length + 1) is optional and selects the tokens to predict. With batch["documents"], attention
    stays within a document. In training mode `z_loss` · log²Z is added for each token, where Z is the softmax's
    normaliser (PaLM, section 5); the figure `nats` is then the loss without it.
    """
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"][:, 1:], IGNORED)
    z_loss = z_loss if model.training else 0.0
    documents = {"documents": batch["documents"][:, :-1]} if "documents" in batch else {}
    hidden = model.hidden(inputs, **documents)
    total, nats = linear_cross_entropy(hidden, model.head_weight, None, targets, z_loss=z_loss)
    figures = {"nats": nats} if z_loss else {}
    return LossOutput(total, (targets != IGNORED).sum() if "mask" in batch else targets.numel(), figures)


def multi_token_prediction(model: Any, batch: Batch, weight: float = 0.3) -> LossOutput:
    """Predict the next token and further tokens (DeepSeek-V3, 2024, equations 24 and 25): the loss of
    `causal_language_modeling`, plus `weight` times the mean loss of the prediction blocks, in training mode.

    A further token is not predicted if its block's input is in another document. The model has `further_hidden` too.
    The figure `nats` is the loss of the next token, and `further_nats` the mean loss of the blocks.
    """
    inputs, documents = batch["tokens"][:, :-1], batch["documents"][:, :-1] if "documents" in batch else None
    targets = batch["tokens"][:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"][:, 1:], IGNORED)
    hidden = model.hidden(inputs, documents=documents)
    total, nats = linear_cross_entropy(hidden, model.head_weight, None, targets)
    further_total = torch.zeros_like(nats)
    states = model.further_hidden(inputs, hidden, documents)
    for shift, state in enumerate(states, 1):
        further_targets = targets[:, shift:]
        if documents is not None:
            further_targets = further_targets.masked_fill(documents[:, shift:] != documents[:, :-shift], IGNORED)
        further_total = further_total + linear_cross_entropy(state, model.head_weight, None, further_targets)[0]
    further_total = further_total / len(states)
    figures = {"nats": nats, "further_nats": further_total.detach()}
    total = total + weight * further_total if model.training else total
    return LossOutput(total, (targets != IGNORED).sum() if "mask" in batch else targets.numel(), figures)


def answers_about_pictures(normalised: Callable[[Tensor], Tensor]) -> Objective:
    """Return the objective of answers about batch["pictures"] (bytes, one picture per row): -log p of each token of
    batch["tokens"] where batch["mask"] is True.

    normalised: converts bytes to the model's input. The model has `encode_images` and `insertion`.
    """

    def loss(model: Any, batch: Batch) -> LossOutput:
        inputs = batch["tokens"][:, :-1]
        targets = batch["tokens"][:, 1:].masked_fill(~batch["mask"][:, 1:], IGNORED)
        pictures, rows = torch.unique_consecutive(batch["pictures"], return_inverse=True, dim=0)
        images = model.encode_images(normalised(pictures).to(model.head_weight.dtype))[rows]
        hidden = model.hidden(inputs, inserted=model.insertion(inputs, images))
        total, _ = linear_cross_entropy(hidden, model.head_weight, None, targets)
        return LossOutput(total, (targets != IGNORED).sum())

    return loss


def classification(model: Any, batch: Batch) -> LossOutput:
    """Return -log p of the label batch["targets"] (batch,) of each row of batch["tokens"] (batch, length).

    batch["mask"] (batch, length) is True on real tokens. The model has `classify(tokens, segments, mask)`.
    """
    logits, targets = model.classify(batch["tokens"], None, batch["mask"]), batch["targets"]
    return LossOutput(cross_entropy(logits, targets), len(targets), {"accuracy": (logits.argmax(-1) == targets).sum()})


def translation(model: Any, batch: Batch, label_smoothing: float = 0.0) -> LossOutput:
    """Predict each token of batch["target"] (batch, length + 1) after its first, given the earlier ones and
    batch["source"]. Masks are True on real tokens.

    The model has `start`, `hidden`, `head_weight` and `head_bias`, so that the whole matrix of logits is never in
    memory. Label smoothing (Szegedy et al., 2016) is applied in training mode only; the figure `nats` is then the loss
    without it.
    """
    mask = batch["source_mask"]
    # reading the mask would stop a GPU's queue, and a compiler cannot read values
    has_no_padding = mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())
    return _target_loss(model, batch, model.start(batch["source"], None if has_no_padding else mask), label_smoothing)


def transcription(model: Any, batch: Batch) -> LossOutput:
    """Predict each token of batch["target"] (batch, length + 1) after its first, given the earlier ones and
    batch["features"] (batch, mels, frames). batch["target_mask"] is True on real tokens (Whisper, section 2.4).

    The model has `listen`, `hidden`, `head_weight` and `head_bias`.
    """
    return _target_loss(model, batch, model.listen(batch["features"]), 0.0)


def _target_loss(model: Any, batch: Batch, state: Any, label_smoothing: float) -> LossOutput:
    """Return the loss of a target's tokens after its first, given the decoder's `state` for the source."""
    hidden = model.hidden(batch["target"][:, :-1], state)
    targets = batch["target"][:, 1:].masked_fill(~batch["target_mask"][:, 1:], IGNORED)
    smoothing = label_smoothing if model.training else 0.0
    total, nats = linear_cross_entropy(hidden, model.head_weight, model.head_bias, targets, label_smoothing=smoothing)
    return LossOutput(total, (targets != IGNORED).sum(), {"nats": nats} if model.training else {})


def masked_language_modeling(model: Any, batch: Batch) -> LossOutput:
    """Return BERT's loss (Devlin et al., 2018, appendix A.2): the mean over masked tokens plus the mean over sentence
    pairs.

    A batch is one of `keifu.data.text.masked_lm.MaskedText`; without "random_next" there are no sentence pairs. The two
    means have different denominators, but the loop divides by the number of tokens. So "word_weight" and "pair_weight"
    are the number of tokens of the whole batch divided by each denominator. The model has `encode`, `pool`,
    `next_sentence`, `word_states`, `head_weight` and `head_bias`; only masked tokens get logits. Their accuracy is
    computed in evaluation mode only, since it needs the logits again.
    """
    hidden = model.encode(batch["tokens"], batch.get("segments"), batch["mask"])
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    states, targets = model.word_states(hidden[rows, batch["places"]]), batch["targets"]
    head = model.head_weight, model.head_bias
    total = batch["word_weight"][0] * linear_cross_entropy(states, *head, targets)[0]
    figures = {"word_loss": total}
    if not model.training:
        right = (torch.nn.functional.linear(states, *head).argmax(-1) == targets) & (targets != IGNORED)
        figures["word_accuracy"] = batch["word_weight"][0] * right.sum()
    if "random_next" in batch:
        pairs, weight = model.next_sentence(model.pool(hidden)), batch["pair_weight"][0]
        figures["pair_loss"] = weight * cross_entropy(pairs, batch["random_next"])
        figures["pair_accuracy"] = weight * (pairs.argmax(-1) == batch["random_next"]).sum()
        total = total + figures["pair_loss"]
    return LossOutput(total, batch["mask"].sum(), figures)


LM_WEIGHT = 0.5  # the paper's weight (section 4.1)


def finetuning_loss(model: Any, batch: Batch, lm_weight: float = LM_WEIGHT) -> LossOutput:
    """Return GPT-1's fine-tuning loss: -log p of the label or answer batch["targets"] (batch,), plus `lm_weight` times
    the language-modeling loss.

    (Radford et al., 2018, equations 4 and 5.) The language-modeling loss is that of each next token, special ones
    included, averaged over a sequence's tokens and then over an example's sequences, as in the released code.
    batch["tokens"] and batch["mask"], True on real tokens, are (batch, sequences, length). The model has
    `hidden(tokens)`, `judge(hidden, mask)` and `head_weight`.
    """
    tokens, mask, targets = batch["tokens"], batch["mask"], batch["targets"]
    hidden = model.hidden(tokens)
    logits = model.judge(hidden, mask)
    task = total = cross_entropy(logits, targets)
    figures = {"accuracy": (logits.argmax(-1) == targets).sum(), "task_loss": task}
    if lm_weight:
        figures["lm_loss"] = _words(model.head_weight, hidden, tokens, mask)
        total = task + lm_weight * figures["lm_loss"]
    return LossOutput(total, len(targets), figures)


def _words(head_weight: Head, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the language-modeling loss: the mean of each example, summed over examples."""
    predicted = mask[..., 1:]
    counted = predicted.sum(-1, keepdim=True).clamp(min=1) * mask.any(-1).sum(-1)[:, None, None].clamp(min=1)
    shares = torch.where(predicted, 1.0 / counted, 0.0)
    return linear_cross_entropy(hidden[:, :, :-1], head_weight, None, tokens[..., 1:], predicted, shares=shares)[0]


def span_corruption(model: Any, batch: Batch) -> LossOutput:
    """Predict the tokens of batch["tokens"] (batch, length + 1) where batch["mask"] is True, or all without a mask.

    A batch is one of `keifu.data.text.span_corruption`. Attention is causal over the prefix too, so the model is an
    ordinary decoder. (For an encoder-decoder, with bidirectional attention over its inputs, use `translation`.) Only
    targets get logits: with UL2's mixture of denoisers they are less than half of the tokens. The model has `hidden`
    and `head_weight`.
    """
    hidden, targets = model.hidden(batch["tokens"][:, :-1]), batch["tokens"][:, 1:]
    if "mask" not in batch:
        return LossOutput(linear_cross_entropy(hidden, model.head_weight, None, targets)[0], targets.numel())
    is_target = batch["mask"][:, 1:]
    if is_target.device.type == "cpu":  # selecting rows would stop a GPU's queue
        hidden, targets = hidden[is_target], targets[is_target]
    else:
        targets = targets.masked_fill(~is_target, IGNORED)
    return LossOutput(linear_cross_entropy(hidden, model.head_weight, None, targets)[0], is_target.sum())


def masked_diffusion(model: Any, batch: Batch) -> LossOutput:
    """Return an upper bound of -log p of the tokens batch["tokens"] (batch, length), summed (Nie et al., 2025, equation
    3): the loss of masked tokens, divided by the masking probability batch["rates"] (batch,) of their row.

    batch["draws"] (batch,): random seeds that choose the masked tokens. The model has `hidden(tokens)`, `head_weight`
    and `config.mask_token`.
    """
    targets, rates = batch["tokens"], batch["rates"][:, None]
    positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    masked = uniform(batch["draws"][:, None].expand_as(targets), positions) < rates
    hidden, shares = model.hidden(targets.masked_fill(masked, model.config.mask_token)), masked / rates
    rows = hidden, targets, shares
    if targets.device.type == "cpu":  # selecting rows would stop a GPU's queue
        rows = hidden[masked], targets[masked], shares[masked]
    total, _ = linear_cross_entropy(rows[0], model.head_weight, None, rows[1], shares=rows[2])
    return LossOutput(total, targets.numel())


def masked_share_loss(model: nn.Module, batch: Batch, objective: Objective, names: list[str]) -> LossOutput:
    """Return the objective; in evaluation mode with the separate validation figures `names`.

    batch["figure"] (batch,) is the number, from 1, of the figure that a batch belongs to, or 0. A batch with a figure
    adds its loss times batch["factor"] (batch,) to this figure and to nothing else (see
    `keifu.data.text.mixture.MixedText`).
    """
    outcome = objective(model, batch)
    if model.training or "figure" not in batch:
        return outcome
    figures = dict.fromkeys(names, outcome.total.new_zeros(()))
    if figure := int(batch["figure"][0]):
        figures[names[figure - 1]] = outcome.total * batch["factor"][0]
        return LossOutput(outcome.total * 0, 0.0, figures)
    return LossOutput(outcome.total, outcome.weight, figures)
