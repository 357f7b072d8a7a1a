"""Common interface of text classifiers and multiple-choice models: encoders, and fine-tuned decoders.

Axes: examples, answers = labels, or the answers of an example.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.data.classification.batches import Encoded, encode_form, row_size
from keifu.data.classification.examples import Example, Examples
from keifu.data.classification.input_formats import Form, delimiters_of, form_of
from keifu.data.padding import Rows, stack_sequences
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.encoders import encode_texts, encoder, in_batches
from keifu.inference.text.model import Encoder, Mask, Model, TaskHeadModel, Tokens


class TextClassifier(NamedTuple):
    """Classifier or multiple-choice model with its tokenization.

    form: the layout of an example. labels: the classes; empty if each example has different answers. limit: context
    length in tokens. read: converts examples to ids of at most a given length; it can truncate longer ones.
    predict_proba: converts ids to probabilities; if an example has fewer answers than others, its last columns are
    0.
    """

    form: Form
    labels: tuple[str, ...]
    limit: int
    read: Callable[[Examples, int, bool], Encoded]
    predict_proba: Callable[[Sequence[Any]], Float[Tensor, "examples answers"]]

    def choices(self, row: Example) -> tuple[str, ...]:
        """Return the names of an example's probabilities."""
        return row.texts[1:] if self.form.answers else self.labels

    def targets(self, examples: Examples) -> list[int]:
        """Return the index of each example's label or right answer."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        return [int(label) if self.form.answers else numbers[label] for label in examples.labels]


def text_classifier(model: nn.Module, tokenizer: Tokenizer, name: str = "") -> TextClassifier:
    """Return a model as a classifier. Raises `UserError`, which says how to train one, for any other model. name: for
    errors."""
    if isinstance(model, TaskHeadModel) and model.config.form == "score":
        raise UserError(f"{name or 'This model'} gives a score and knows no labels: it says how good an answer is.")
    if isinstance(model, TaskHeadModel):
        return _decoder(model, tokenizer)
    if isinstance(model, Model):
        who, option = (name, f" --model {name}") if name else (f"This {type(model).__name__}", "")
        raise UserError(
            f"{who} generates text and has no head for labels: fine-tune it first (keifu train "
            f"gpt1-finetune{option} --data TABLE), and classify with that run."
        )
    config = classifier(model, name).config
    if len(config.labels) == 1:
        raise UserError(
            f"{name or 'This model'} gives a score for two texts and knows no labels: it reranks (keifu search "
            "--rerank, and /v1/rerank of keifu serve)."
        )

    def read(examples: Examples, limit: int, cut: bool) -> Encoded:
        return encode_texts(tokenizer, examples.texts, limit, cut)

    predict_proba = partial(probabilities, model, pad_id=tokenizer.pad_id or 0)
    return TextClassifier(form_of("classification"), config.labels, config.context_length, read, predict_proba)


def classifier(model: nn.Module, name: str = "") -> Encoder:
    """Return the model. Raises `UserError`, which says how to train one, if it has no classification head."""
    reader = encoder(model)
    if not reader.config.labels:
        who, option = (name, f" --model {name}") if name else (f"This {type(model).__name__}", "")
        raise UserError(
            f"{who} has no classification head: train one with keifu train classifier{option} --data TABLE, and "
            "classify with that run."
        )
    return reader


def probabilities(model: nn.Module, rows: Rows, pad_id: int) -> Float[Tensor, "texts labels"]:
    """Return the probability of each label for each text. rows: token ids of the texts."""
    reader = classifier(model)

    def work(tokens: Tokens, mask: Mask) -> Float[Tensor, "batch labels"]:
        return reader.classify(tokens, None, mask).float().softmax(-1)

    return in_batches(model, work, rows, pad_id)


def _decoder(model: Any, tokenizer: Tokenizer) -> TextClassifier:
    config, form = model.config, form_of(model.config.form)
    marks = delimiters_of(tokenizer, (config.start_id, config.delimiter_id, config.extract_id))
    encode_examples = partial(encode_form, tokenizer, form, marks)
    predict_proba = partial(class_probabilities, model, pad_id=tokenizer.pad_id or 0)
    return TextClassifier(form, config.labels, config.context_length, encode_examples, predict_proba)


def class_probabilities(model: Any, rows: Sequence[Any], pad_id: int) -> Float[Tensor, "examples answers"]:
    """Return the probability of each label or answer. rows: examples, each a list of token sequences."""
    most = len(model.config.labels) or max((len(row) for row in rows), default=0)

    def work(tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch answers"]:
        shares = model.classify(tokens, mask).float().softmax(-1)
        return F.pad(shares, (0, most - shares.shape[1]))

    return in_batches(model, work, rows, pad_id, pack=stack_sequences, size=row_size)
