"""Models that choose a label or an answer, whatever they read examples with: encoders, and decoders fine-tuned for it.

It knows no model. Axes: examples, answers = labels, or an example's own answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.data.form_batches import lay_out, row_size, stacked
from keifu.data.form_tables import Example, Examples
from keifu.data.forms import Form, form_of, marks_of
from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.classification import Confusion, classifier, probabilities
from keifu.evaluation.encoding import encoded, in_passes
from keifu.generation.decoding import Model


@runtime_checkable
class Judging(Protocol):
    """What a fine-tuned decoder offers; its `config` has `form`, `labels`, `context_length` and the special ids."""

    config: Any
    decoder: Any

    def hidden(self, tokens: Tensor) -> Tensor: ...

    def judge(self, hidden: Tensor, mask: Tensor) -> Tensor: ...

    def classify(self, tokens: Tensor, mask: Tensor) -> Tensor: ...


class Read(NamedTuple):
    """Examples as ids, and how many were cut."""

    rows: Sequence[Any]
    cut: int


@dataclass(frozen=True, eq=False)
class Judge:
    """A model that chooses, and how it reads.

    form: what an example must have. labels: what it chooses from; none where examples have answers of their own.
    limit: how many tokens it takes. read: examples to ids, of which too long ones may be cut. weigh: ids to
    probabilities; where an example has fewer answers than another, they are 0 at its end.
    """

    form: Form
    labels: tuple[str, ...]
    limit: int
    read: Callable[[Examples, bool], Read]
    weigh: Callable[[Sequence[Any]], Float[Tensor, "examples answers"]]

    def choices(self, row: Example) -> tuple[str, ...]:
        """What the columns of an example's probabilities stand for."""
        return row.texts[1:] if self.form.answers else self.labels

    def compared(self, examples: Examples, given: Float[Tensor, "examples answers"]) -> Confusion:
        """Right labels against the likeliest ones; the labels of answers are their numbers."""
        labels = tuple(map(str, range(given.shape[1]))) if self.form.answers else self.labels
        numbers = {label: number for number, label in enumerate(labels)}
        right = torch.tensor([numbers[row.label] for row in examples.rows])
        return Confusion.of(right, given.argmax(-1).cpu(), labels)


def judge(model: nn.Module, tokenizer: Tokenizer, name: str = "") -> Judge:
    """How a model chooses; one that cannot is a `UserError` that says how to make one. `name` is for errors."""
    if isinstance(model, Judging) and model.config.form == "score":
        raise UserError(f"{name or 'This model'} gives a score and knows no labels: it says how good an answer is.")
    if isinstance(model, Judging):
        return _decoder(model, tokenizer)
    if isinstance(model, Model):
        who, option = (name, f" --model {name}") if name else (f"This {type(model).__name__}", "")
        raise UserError(
            f"{who} writes and has no head for labels: fine-tune it first (keifu train gpt1-finetune{option} --data "
            "TABLE), and classify with that run."
        )
    reader = classifier(model, name)
    limit = reader.config.context_length

    def read(examples: Examples, cut: bool) -> Read:
        return Read(*encoded(tokenizer, [row.texts[0] for row in examples.rows], limit, cut))

    def weigh(rows: Sequence[Any]) -> Float[Tensor, "examples answers"]:
        return probabilities(model, rows, tokenizer.pad_id or 0)

    return Judge(form_of("classification"), reader.config.labels, limit, read, weigh)


def _decoder(model: Any, tokenizer: Tokenizer) -> Judge:
    config, form = model.config, form_of(model.config.form)
    marks = marks_of(tokenizer, (config.start_id, config.delimiter_id, config.extract_id))

    def read(examples: Examples, cut: bool) -> Read:
        return Read(*lay_out(tokenizer, examples, marks, config.context_length, cut))

    def weigh(rows: Sequence[Any]) -> Float[Tensor, "examples answers"]:
        return chances(model, rows, tokenizer.pad_id or 0)

    return Judge(form, config.labels, config.context_length, read, weigh)


def chances(
    model: Any, rows: Sequence[Any], pad_id: int, batch_size: int = 256
) -> Float[Tensor, "examples answers"]:
    """The probability of each label or answer for examples, each a list of sequences of ids."""
    most = len(model.config.labels) or max((len(row) for row in rows), default=0)

    def work(tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch answers"]:
        shares = model.classify(tokens, mask).float().softmax(-1)
        return F.pad(shares, (0, most - shares.shape[1]))

    return in_passes(model, work, rows, pad_id, batch_size, pack=stacked, size=row_size)
