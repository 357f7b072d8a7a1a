"""Evaluation of a masked language model: the share of hidden words that it predicts, and of sentence pairs that it
recognises.

Masks are those of pretraining (Devlin et al., 2018, appendix A.2), on the held-out documents of a text. Only tokens
hidden by [MASK] count, because 20% of the targets stay visible or become other words. The baseline looks up the most
frequent token between the same two neighbours in the training part.

Axes: batch, length, hidden = the hidden tokens of all rows.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from keifu.data.progress import counted
from keifu.data.text.documents import TextFileFormat
from keifu.data.text.masked_lm import MaskedText, MaskingScheme, MaskingVocabulary
from keifu.data.text.sentence_shards import prepare_sentences
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.evaluation.intervals import as_text, bootstrap, mean_figures
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.evaluation.text.perplexity import NAMES, accepts
from keifu.inference.text.model import Encoder, device_of, evaluation_mode
from keifu.inference.text.translation import sentences

__all__ = ["ABOUT", "NAMES", "OPTIONS", "accepts", "evaluate", "takes"]
ABOUT = "a masked language model on a text: words and sentence pairs that it tells"
OPTIONS = {"batch_size", "text_field", "encoding", "output"}
ROWS = 1024
COMMON = 100  # number of words that count as common
CLASSES = ("punctuation", "pieces of words", f"the {COMMON} commonest words", "other words")


def takes(model: nn.Module) -> bool:
    """Return whether the model predicts masked words."""
    return isinstance(model, Encoder) and model.config.words


class NeighbourLookup:
    """Table of the most frequent token between two neighbours; if unknown, after the left one, before the right one, or
    of all."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        ids = tokens.astype(np.int64)
        left, middle, right = ids[:-2], ids[1:-1], ids[2:]
        self.tables = [self._most_frequent(keys, middle) for keys in (left * vocab_size + right, left, right)]
        self.commonest = int(np.bincount(ids).argmax())

    def _most_frequent(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs, counts = np.unique(keys * self.vocab_size + values, return_counts=True)
        order = np.lexsort((counts, pairs // self.vocab_size))
        keys, values = np.divmod(pairs[order], self.vocab_size)
        last = np.append(keys[1:] != keys[:-1], True)
        return keys[last], values[last]

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the most frequent token between each pair of neighbours."""
        answers = np.full(len(left), self.commonest)
        wanted_keys = left * self.vocab_size + right, left, right
        for (keys, values), query_keys in reversed([*zip(self.tables, wanted_keys, strict=True)]):
            index = np.minimum(np.searchsorted(keys, query_keys), len(keys) - 1)
            answers = np.where(keys[index] == query_keys, values[index], answers)
        return answers


class HiddenTokens(NamedTuple):
    """Hidden tokens of all rows: row number, target, the model's answer and its loss in nats, and both neighbours."""

    rows: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    losses: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Mask of the tokens that the model predicts correctly."""
        return self.answers == self.targets


@torch.inference_mode()
def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return the figures on evenly spaced held-out rows with fixed masks."""
    config = cast(Any, model).config
    form = TextFileFormat(request.text_field, request.encoding)
    shards = prepare_sentences(request.on, tokenizer, sentences, form=form)
    masking = MaskingScheme(min(128, config.context_length), sentence_pairs=config.next_sentence)
    vocabulary = MaskingVocabulary.of(tokenizer)
    size, most = request.batch_size or 32, request.limit or ROWS
    batches = [*MaskedText(shards, vocabulary, masking, size, validation_rows=most).validation()]
    hidden, next_found = _fill_in(model, batches, vocabulary.mask)
    training = shards.training.tokens
    looked_up = NeighbourLookup(training, tokenizer.vocab_size)(hidden.left, hidden.right) == hidden.targets
    classes = token_classes(tokenizer, vocabulary, training)[hidden.targets]
    figures = mean_figures("masked words right", hidden.correct, hidden.rows)
    figures |= mean_figures("masked words looked up", looked_up, hidden.rows)
    figures["perplexity of masked words"] = round(math.exp(min(float(hidden.losses.mean()), 700)), 3)
    figures["masked words"] = len(hidden.targets)
    if masking.sentence_pairs:
        figures["sentence pairs right"] = round(float(np.mean(next_found)), 4)
    rows = sum(len(batch["tokens"]) for batch in batches)
    note = (
        f"{rows:,} rows of at most {masking.length} tokens, of the documents of {request.on} that keifu holds out. "
        "Only tokens that [MASK] hides count. Looked up: the most frequent token between the two neighbours."
    )
    tables = {"by class": by_class(hidden, looked_up, classes)}
    return EvalResult(figures, (note,), tables, _counts(hidden, looked_up, classes))


def by_class(hidden: HiddenTokens, looked_up: np.ndarray, classes: np.ndarray) -> ResultTable:
    """Return for each class of tokens the share that the model, and the lookup, predict correctly."""
    lines = []
    for number, name in enumerate(CLASSES):
        some = classes == number
        if some.any():
            right = hidden.correct[some]
            shares = [round(float(values.mean()), 4) for values in (right, looked_up[some])]
            interval = as_text(bootstrap(right, clusters=hidden.rows[some]))
            lines.append((name, len(right), shares[0], interval, shares[1]))
    return ResultTable(("tokens", "count", "right", "95% interval", "looked up"), lines)


def _counts(hidden: HiddenTokens, looked_up: np.ndarray, classes: np.ndarray) -> ResultTable:
    """Return for each row and class the numbers of hidden tokens, and of correct ones by the model and by the lookup,
    for a file."""
    groups, group = np.unique(hidden.rows * len(CLASSES) + classes, return_inverse=True)
    columns = (np.bincount(group, weights).astype(int).tolist() for weights in (None, hidden.correct, looked_up))
    names = [CLASSES[number] for number in groups % len(CLASSES)]
    lines = list(zip((groups // len(CLASSES)).tolist(), names, *columns, strict=True))
    return ResultTable(("row", "tokens", "count", "right", "looked up"), lines)


def token_classes(tokenizer: Tokenizer, vocabulary: MaskingVocabulary, training: np.ndarray) -> np.ndarray:
    """Return the index in `CLASSES` of each token. The common words are those of the training part."""
    texts = [tokenizer.backend.id_to_token(number) or "" for number in range(tokenizer.vocab_size)]
    is_word = np.array([any(map(str.isalnum, text)) for text in texts])
    words = is_word & ~vocabulary.goes_on & vocabulary.is_ordinary
    counts = np.where(words, np.bincount(training, minlength=len(texts)), 0)
    classes = np.where(vocabulary.goes_on, 1, np.where(is_word, 3, 0))
    commonest = np.argsort(-counts, kind="stable")[:COMMON]
    classes[commonest[counts[commonest] > 0]] = 2
    return classes


def _fill_in(model: Any, batches: Sequence[dict[str, torch.Tensor]], mask_id: int) -> tuple[HiddenTokens, list[bool]]:
    """Return the hidden tokens with the model's answers, and for each sentence pair whether its answer is right."""
    parts, next_found, first = list[tuple[np.ndarray, ...]](), list[bool](), 0
    with evaluation_mode(model):
        for cpu in counted("Evaluating", batches, "batches"):
            batch = {name: values.to(device_of(model)) for name, values in cpu.items()}
            states = model.encode(batch["tokens"], batch.get("segments"), batch["mask"])
            rows = torch.arange(len(states), device=states.device)[:, None].expand_as(batch["places"])
            is_masked = (batch["targets"] >= 0) & (batch["tokens"][rows, batch["places"]] == mask_id)
            rows, columns, targets = rows[is_masked], batch["places"][is_masked], batch["targets"][is_masked]
            logits = model.words(states[rows, columns]).float()
            losses = F.cross_entropy(logits, targets, reduction="none")
            around = batch["tokens"][rows, columns - 1], batch["tokens"][rows, columns + 1]
            part = rows + first, targets, logits.argmax(-1), losses, *around
            parts.append(tuple(values.cpu().numpy() for values in part))
            if "random_next" in batch:
                next_found += (model.next_sentence(model.pool(states)).argmax(-1) == batch["random_next"]).tolist()
            first += len(states)
    return HiddenTokens(*map(np.concatenate, zip(*parts, strict=True))), next_found
