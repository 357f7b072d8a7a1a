"""Reward models (Ouyang et al., 2022, section 3.5): a score for an answer to a prompt, learned from rankings.

Axes: batch = prompts, K = ranked answers of each prompt, length = tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.data.chat.prompts import Prompt
from keifu.data.padding import stack_rows
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.model import evaluation_mode
from keifu.training.protocols import Batch, LossOutput

Scores = Float[Tensor, "batch K"]


def ranking_losses(scores: Scores, levels: Scores) -> Float[Tensor, " batch"]:
    """Return -1/C(K, 2) Σ ln σ(r_better - r_worse) of each prompt (equation 1), over all pairs of its answers.

    levels: the ratings of the answers, higher is better, NaN for a missing answer. Pairs with equal or missing ratings
    do not count. K = 2 is the Bradley-Terry model.
    """
    better, share = pairs(levels)
    return -(F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * better * share).sum((1, 2))


def pairs(levels: Scores) -> tuple[Float[Tensor, "batch K K"], Float[Tensor, "batch 1 1"]]:
    """Return whether the first answer of each pair is better than the second (1 or 0), and each pair's weight: 1 / the
    number of the prompt's pairs."""
    better = (levels[:, :, None] > levels[:, None, :]).float()
    return better, 1 / better.sum((1, 2), keepdim=True).clamp(min=1)


def ranking_loss(model: Any, batch: Batch) -> LossOutput:
    """Return the ranking loss of batch["tokens"] and batch["mask"] (batch, K, length) with the ratings batch["levels"]
    (batch, K): an objective.

    The model has `classify(tokens, mask)`, which returns one score per answer. Figures: `accuracy`, the share of a
    prompt's pairs in which the better answer has the higher score, and `margin`, the mean difference of their scores.
    """
    scores = model.classify(batch["tokens"], batch["mask"]).float()
    total = ranking_losses(scores, batch["levels"]).sum()
    better, share = pairs(batch["levels"])
    margin = (scores[:, :, None] - scores[:, None, :]).detach()
    figures = {"accuracy": ((margin > 0) * better * share).sum(), "margin": (margin * better * share).sum()}
    return LossOutput(total, len(scores), figures)


@torch.no_grad()
def margins(model: Any, batches: Iterable[Batch]) -> Float[Tensor, " pairs"]:
    """Return r_better - r_worse of every pair of the batches."""
    gaps, device = [torch.zeros(0)], next(model.parameters()).device
    with evaluation_mode(model):
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            scores = model.classify(batch["tokens"], batch["mask"]).float()
            better, _ = pairs(batch["levels"])
            gaps.append((scores[:, :, None] - scores[:, None, :])[better.bool()].cpu())
    return torch.cat(gaps)


class Calibration(NamedTuple):
    """Calibration of a reward model: confidence and accuracy in each bin that has a pair.

    sure: mean of max(p, 1 - p), where p = σ(r_better - r_worse). right: share of pairs with p > 1/2. count: number of
    pairs. error: the expected calibration error, the mean over pairs of |sure - right| of their bin.
    """

    sure: list[float]
    right: list[float]
    count: list[int]
    error: float


def calibration(margins: Float[Tensor, " pairs"], bins: int = 10) -> Calibration:
    """Return the calibration from the differences of scores, in bins of equal width from 1/2 to 1."""
    sure, right = torch.sigmoid(margins.double().abs()), (margins > 0).double()
    bin_index = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    count = torch.bincount(bin_index, minlength=bins)
    has_pairs = count > 0
    means = [
        torch.bincount(bin_index, values, minlength=bins)[has_pairs] / count[has_pairs] for values in (sure, right)
    ]
    error = ((means[0] - means[1]).abs() * count[has_pairs]).sum() / max(1, len(margins))
    return Calibration(means[0].tolist(), means[1].tolist(), count[has_pairs].tolist(), float(error))


@torch.no_grad()
def scores_of(model: Any, texts: Sequence[Sequence[int]], pad_id: int, batch_size: int = 32) -> Float[Tensor, " texts"]:
    """Return the score of each text, given as token ids. Texts of similar length share a batch."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    scores, device = torch.zeros(len(texts)), next(model.parameters()).device
    with evaluation_mode(model):
        for at in range(0, len(order), batch_size):
            some = order[at : at + batch_size]
            tokens, mask = stack_rows([texts[index] for index in some], pad_id)
            scores[some] = model.classify(tokens[:, None].to(device), mask[:, None].to(device))[:, 0].float().cpu()
    return scores


@dataclass(frozen=True, eq=False)
class ModelReward:
    """A reward model as a `Scorer`, with its tokenizer and chat template."""

    model: Any
    tokenizer: Tokenizer

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return the score of each answer. Raises UserError for a score that is not finite, or a text longer than the
        context."""
        talks = [[*p.messages, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True)]
        texts = [self.tokenizer.render_chat(talk, add_generation_prompt=False) for talk in talks]
        if (longest := max(map(len, texts), default=0)) > (room := self.model.config.context_length):
            raise UserError(
                f"A prompt and its answer have {longest} tokens for the reward model, and its context is {room}: "
                "shorten the prompts, or lower --max-tokens."
            )
        scores = scores_of(self.model, texts, self.tokenizer.pad_id or 0).tolist()
        for prompt, answer, value in zip(prompts, answers, scores, strict=True):
            if not math.isfinite(value):
                of = f"for the answer {answer[:80]!r} to {prompt.text[:80]!r}"
                raise UserError(f"The reward model's score is {value} {of}: its weights are damaged; train it again.")
        return scores
