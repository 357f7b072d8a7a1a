"""Knowledge distillation (Hinton et al., 2015): a student learns all probabilities of a teacher, on given sequences or
on the student's own answers (GKD, Agarwal et al., 2023).

Axes: batch = rows, length = tokens of a row, n = learned tokens, vocab.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.alignment.rollouts import positions_of, stack_responses, take
from keifu.data.chat.packing import PackedConversations
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.model import evaluation_mode
from keifu.inference.text.sampling_params import SamplingParams
from keifu.layers.losses import cross_entropy, divergence
from keifu.layers.losses.head import SoftCappedHead
from keifu.layers.transformer.decoder import SoftCappedLM
from keifu.native.model import BLOCK_SIZE, NativeLM, Span
from keifu.processes import current
from keifu.training.protocols import Batch, LossOutput, StatelessBatches

Tokens = Int[Tensor, "batch length"]

CAPPED = "A model with a soft cap on its logits (Gemma 2, nanochat) cannot be teacher or student."


@dataclass(frozen=True, eq=False)
class Distillation:
    """Objective: the divergence of a student's probabilities from a teacher's, for each token of batch["tokens"]
    (batch, length + 1) after the first; with batch["mask"], only where it is True.

    beta: 0 is the forward KL divergence, 1 the reverse one, between them the generalised Jensen-Shannon divergence (see
    `layers.losses.divergence.linear_divergence`). temperature: divides the logits of both. hard: weight of the
    student's -log p of the tokens in the loss; 0 for answers that the student wrote (batch["own"]). The teacher may be
    packed for native code. In evaluation mode the figure `nats` is the student's -log p of the tokens.
    """

    teacher: Any
    beta: float = 0.0
    temperature: float = 1.0
    hard: float = 0.0

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the sums over the learned tokens."""
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        mask = batch["mask"][:, 1:] if "mask" in batch else torch.ones_like(targets, dtype=torch.bool)
        documents = batch["documents"][:, :-1] if "documents" in batch else None
        at = positions_of(mask)
        hidden = take(model.hidden(inputs, documents=documents), at)
        head, teacher = model.head_weight, self.teacher.config.vocab_size
        if isinstance(head, SoftCappedHead) or isinstance(self.teacher, SoftCappedLM):
            raise UserError(CAPPED)
        head = head if len(head) <= teacher else head[:teacher]  # further rows of the head belong to no token
        states, matrix = teacher_states(self.teacher, inputs, documents, len(head))
        total = divergence.linear_divergence(hidden, head, take(states, at), matrix, self.beta, self.temperature)
        hard = 0.0 if "own" in batch else self.hard
        if model.training and not hard:
            return LossOutput(total, mask.sum())
        loss, nats = cross_entropy.linear_cross_entropy(hidden, head, None, take(targets, at))
        total = (1 - hard) * total + hard * loss if hard else total
        return LossOutput(total, mask.sum(), {} if model.training else {"nats": nats})


@torch.inference_mode()
def teacher_states(
    teacher: Any, tokens: Tokens, documents: Tokens | None, vocab: int
) -> tuple[Float[Tensor, "batch length states"], Tensor | None]:
    """Return the teacher's hidden states and the first `vocab` rows of its head. For packed weights: its logits and
    None."""
    with evaluation_mode(teacher):
        if isinstance(teacher, NativeLM):
            return native_logits(teacher, tokens, documents)[..., :vocab], None
        return teacher.hidden(tokens, documents=documents), teacher.head_weight[:vocab]


def native_logits(model: NativeLM, tokens: Tokens, documents: Tokens | None) -> Float[Tensor, "batch length vocab"]:
    """Return the logits of packed weights. No token attends to another document."""
    rows = []
    for row, ids in enumerate(tokens.tolist()):
        numbers = [0] * len(ids) if documents is None else documents[row].tolist()
        starts = [i for i, (one, other) in enumerate(pairwise([None, *numbers])) if one != other]
        spans, used_blocks = [], 0
        for start, stop in pairwise([*starts, len(ids)]):
            blocks = range(used_blocks, used_blocks := used_blocks - (start - stop) // BLOCK_SIZE)
            spans.append(Span(start, ids[start:stop], 0, blocks, stop - start))
        rows.append(model.runner(used_blocks).run(spans))
    return torch.stack(rows)


class StudentAnswers(PackedConversations, StatelessBatches):
    """Training data in which the student writes some of the batches itself (GKD, algorithm 1).

    share: the share of such batches; the seed and the step choose them. Each row is then the prompt of one of the row's
    conversations, with the student's answer of at most `max_tokens` tokens, which is learned. Validation uses the given
    answers.
    """

    def __init__(self, student: nn.Module, tokenizer: Tokenizer, share: float, max_tokens: int, *plan_and_data: Any):
        super().__init__(*plan_and_data)
        self.student, self.tokenizer, self.share, self.max_tokens = student, tokenizer, share, max_tokens
        self.fingerprint += f"-{share}-{max_tokens}"

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: answers that the student samples now, or answers from the data."""
        random = np.random.default_rng([self.seed, step])
        if random.random() >= self.share:
            return super().batch(step)
        talks = [self.training[random.choice(self.rows[item])] for item in self.items(step)]
        prompts = [talk.ids[: max(1, talk.last_answer)] for talk in talks]
        rooms = [min(self.max_tokens, self.context_length - len(prompt)) for prompt in prompts]
        plain = SamplingParams(temperature=1.0, log_probabilities=True)
        how = [replace(plain, max_tokens=room, seed=int(random.integers(2**32))) for room in rooms]
        part = slice(*current().bounds(len(talks)))
        answers = generate_batch(self.student, self.tokenizer, prompts[part], how[part], len(talks))
        rows = stack_responses(prompts[part], answers, self.pad_id)
        del rows["old"]
        rows["own"] = torch.ones(len(answers), dtype=torch.bool)
        return current().gather_batch(rows, {"tokens": self.pad_id})
