"""Options of the recipes that can learn from a teacher's probabilities instead of given tokens, and the teacher."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from keifu import checkpoints
from keifu.alignment.distillation import CAPPED, Distillation
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.model import text_model
from keifu.layers.lora import merge
from keifu.layers.transformer.decoder import SoftCappedLM
from keifu.processes import current
from keifu.ranges import Count, Positive, Share
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Objective


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learning from a larger model (Hinton et al., 2015)."""

    teacher: str | None = None
    """Model with the same tokenizer, whose probabilities are learned; unset: the tokens of the data are learned."""
    weights: str | None = None
    """Format of the teacher's weights for native computation on the CPU: f32, bf16, int8 or int4; unset: float32."""
    beta: Share = 0.0
    """Divergence: 0 is forward KL, 1 is reverse KL, and between them the generalised Jensen-Shannon divergence."""
    temperature: Positive = 1.0
    """Number that divides the logits of teacher and student."""

    def __post_init__(self) -> None:
        if self.teacher is None:
            given = [field.name for field in fields(self) if vars(self)[field.name] != field.default]
            if given:
                raise UserError(f"distill.{given[0]} needs a teacher: give --distill.teacher, or leave it out.")

    def options(self) -> dict[str, Any]:
        """Return the values that decide the result of a run; none without a teacher."""
        return {} if self.teacher is None else {"distill": dict(vars(self))}

    def objective(self, tokenizer: Tokenizer, length: int, student: Any = None) -> Objective:
        """Load the teacher; return the objective for rows of `length` tokens, or without a teacher that of the tokens.

        A teacher with another tokenizer, or one that reads fewer tokens, is a `UserError`. So is a soft cap on
        the logits of either model.
        """
        if self.teacher is None:
            return causal_language_modeling
        if not current().is_replicated:
            raise UserError("A student is trained whole on each process: leave out --mesh.shard and --mesh.tensor.")
        loaded, its = checkpoints.load(self.teacher, None if self.weights else torch.float32, weights=self.weights)
        teacher: Any = text_model(merge(loaded).requires_grad_(False))
        if isinstance(student, SoftCappedLM) or isinstance(teacher, SoftCappedLM):
            raise UserError(CAPPED)
        if its is None or its.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise UserError(
                f"The teacher {self.teacher} has another tokenizer than the student, so their probabilities are of "
                "other tokens: start the student with the teacher's tokenizer."
            )
        if teacher.config.context_length < length:
            raise UserError(
                f"The teacher {self.teacher} reads {teacher.config.context_length} tokens, and a row has {length}: "
                "choose a smaller --context-length."
            )
        return Distillation(teacher, self.beta, self.temperature)


@dataclass(frozen=True, kw_only=True)
class DistillAnswers(Distill):
    """Learning from a larger model (Hinton et al., 2015), also on one's own answers (GKD, Agarwal et al., 2023)."""

    own_share: Share = 0.0
    """Share of the steps in which the student writes the answers itself, to the questions of the data."""
    max_tokens: Count = 128
    """Most tokens of an answer that the student writes."""
