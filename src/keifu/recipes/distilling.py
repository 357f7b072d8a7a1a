"""A student of a large model: pruning of its layers and tokens, and options of learning from its probabilities.

DistilBERT (Sanh et al., 2019) keeps every other layer. "Shrink and fine-tune" (Shleifer and Rush, 2020) keeps evenly
spaced layers. The smaller model is then trained, on given tokens or on the probabilities of a teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn

from keifu import checkpoints
from keifu.alignment.distillation import CAPPED, Distillation
from keifu.checkpoints.loading import planned
from keifu.data.tokenizers.bpe import first_merges, ids_of_cut, keep_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose, device_choice
from keifu.errors import UserError
from keifu.inference.text.model import causal, text_model
from keifu.layers.lora import merge
from keifu.layers.transformer.decoder import SoftCappedLM
from keifu.models import llama
from keifu.native.model import pack
from keifu.processes import current
from keifu.ranges import Count, Positive, Share
from keifu.training.hardware.precision import resolve_dtype
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Objective


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learning from a larger model (Hinton et al., 2015)."""

    teacher: str | None = None
    """Model with the same tokenizer, whose probabilities are learned; unset: the tokens of the data are learned."""
    weights: str | None = None
    """Format of the teacher's weights for native computation on the CPU: f32, bf16, int8 or int4; unset: float32."""
    divergence: Literal["forward", "reverse", "jsd"] | None = None
    """Divergence from the teacher: forward KL, reverse KL, or jsd, the generalised Jensen-Shannon divergence; unset:
    jsd if beta is given, else forward."""
    beta: Share | None = None
    """Teacher's share in the mixture that jsd compares with; 0 is forward KL and 1 reverse KL; unset: 0.5."""
    temperature: Positive = 1.0
    """Number that divides the logits of teacher and student."""
    hard: Share = 0.0
    """Share of the cross-entropy on the given text in the loss."""

    def __post_init__(self) -> None:
        if self.teacher is None:
            changed_options = [field.name for field in fields(self) if vars(self)[field.name] != field.default]
            if changed_options:
                raise UserError(
                    f"distill.{changed_options[0]} needs a teacher: give --distill.teacher, or leave it out."
                )
        if self.beta is not None and self.divergence in ("forward", "reverse"):
            raise UserError(f"The divergence {self.divergence} has no beta: leave it out, or choose jsd.")

    @property
    def strength(self) -> float:
        """β of the generalised Jensen-Shannon divergence: the option, or the value of the chosen divergence."""
        defaults = {"reverse": 1.0, "jsd": 0.5}
        return defaults.get(self.divergence or "forward", 0.0) if self.beta is None else self.beta

    def options(self) -> dict[str, Any]:
        """Return the values that affect the result of a run; empty without a teacher."""
        return {} if self.teacher is None else {"distill": dict(vars(self))}

    def objective(self, tokenizer: Tokenizer, length: int, student: Any = None) -> Objective:
        """Load the teacher. Return the distillation objective for rows of `length` tokens; without a teacher, that of
        the tokens.

        Raises `UserError` for a teacher with another tokenizer or a shorter context, and if either model has a soft cap
        on its logits.
        """
        if self.teacher is None:
            return causal_language_modeling
        if not current().is_replicated:
            raise UserError("A student is trained whole on each process: leave out --mesh.shard and --mesh.tensor.")
        teacher = self._load(tokenizer)
        if isinstance(student, SoftCappedLM) or isinstance(teacher, SoftCappedLM):
            raise UserError(CAPPED)
        if teacher.config.context_length < length:
            raise UserError(
                f"The teacher {self.teacher} reads {teacher.config.context_length} tokens, and a row has {length}: "
                "choose a smaller --context-length."
            )
        return Distillation(teacher, self.strength, self.temperature, self.hard)

    def _load(self, tokenizer: Tokenizer) -> Any:
        """Return the teacher, in bfloat16 if the device supports it. If the student's tokenizer was reduced from the
        teacher's, the teacher is reduced to the same tokens (see `keep_rows`)."""
        name = str(self.teacher)
        its = planned(name).source.tokenizer()
        same = its is not None and its.backend.get_vocab() == tokenizer.backend.get_vocab()
        ids = None if same or its is None else ids_of_cut(its, tokenizer)
        if not same and ids is None:
            raise UserError(
                f"The teacher {name} has another tokenizer than the student, so their probabilities are of other "
                "tokens: start the student with the teacher's tokenizer."
            )
        dtype = None if self.weights else resolve_dtype(device_choice().precision or "auto", choose())
        loaded: Any = merge(checkpoints.load(name, dtype, weights=self.weights if same else None)[0])
        if ids is not None:
            keep_rows(loaded, ids)
            loaded = pack(loaded, self.weights) if self.weights else loaded
        return text_model(loaded.requires_grad_(False))


@dataclass(frozen=True, kw_only=True)
class DistillAnswers(Distill):
    """Learning from a larger model (Hinton et al., 2015), optionally on the student's answers (GKD, Agarwal et al.,
    2023)."""

    on_policy: Share = 0.0
    """Share of the steps in which the student writes the answers itself, to the questions of the data."""
    max_tokens: Count = 128
    """Most tokens of an answer that the student writes."""


def evenly(layers: int, n_kept: int) -> list[int]:
    """Return the indices of `n_kept` evenly spaced layers, with the first and the last."""
    if not (least := min(2, layers)) <= n_kept <= layers:
        raise UserError(f"A student of {n_kept} layers cannot be made of {layers}: choose {least} to {layers}.")
    return [round(number * (layers - 1) / max(1, n_kept - 1)) for number in range(n_kept)]


def keep_layers(model: Any, kept_layers: Sequence[int]) -> None:
    """Remove all layers except these from a LLaMA-like model with uniform layers."""
    if vars(model.config).keys() != vars(llama.Config()).keys():
        raise UserError("Only the layers of a model of LLaMA's type can be removed: choose another one.")
    model.blocks = nn.ModuleList(model.blocks[layer] for layer in kept_layers)
    below = sum(layer < model.config.first_window_layer for layer in kept_layers)
    model.config = replace(model.config, n_layers=len(kept_layers), first_window_layer=below)


@torch.no_grad()
def keep_rows(model: Any, ids: Sequence[int]) -> None:
    """Remove the embeddings and the rows of the head except those of these tokens."""
    if "vocab_size" not in vars(causal(model).config):
        raise UserError("The tokens of a model that sees cannot be removed: choose another one, such as smollm2.")
    model.embedding.num_embeddings = len(ids)
    for part in [model.embedding] if model.head is None else [model.embedding, model.head]:
        for name, rows in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(rows[list(ids)], rows.requires_grad))
    if model.head is not None:
        model.head.out_features = len(ids)
    model.config = replace(model.config, vocab_size=len(ids))


def prune(
    model: Any, tokenizer: Tokenizer, layers: int | None, merges: int | None, uses: Mapping[int, int] | None = None
) -> tuple[Any, Tokenizer]:
    """Reduce a model, in place, to `layers` layers and a byte-level BPE with `merges` merges. Return it with its
    tokenizer.

    None keeps all. uses: token frequencies; if given, the most useful merges are kept instead of the first (see
    `first_merges`).
    """
    if layers is not None:
        keep_layers(model, evenly(len(model.blocks), layers))
    if merges is not None:
        tokenizer, ids = keep_tokens(tokenizer, first_merges(tokenizer, merges, uses))
        keep_rows(model, ids)
    return model, tokenizer
