"""Evaluation of a language model on each text of a mixture: perplexity, and infilling if it was trained for it."""

import math
from typing import NamedTuple

import torch
from torch import nn

from keifu.data.progress import counted
from keifu.data.text import span_corruption
from keifu.data.text.mixture import MIXTURES, batches, held_out, is_mixture, prepare_mixture, read_mixture
from keifu.data.text.token_shards import Shards
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.registry import EvalRequest, EvalResult, Figures, ResultTable
from keifu.inference.text.model import Model, causal, device_of, evaluation_mode
from keifu.training.loader import on_device
from keifu.training.objectives.language_modeling import span_corruption as span_corruption_loss

ABOUT = "a language model on a mixture of texts: bits per byte of each"
NAMES, accepts = MIXTURES, is_mixture
OPTIONS = {"batch_size"}
BATCH_SIZE = 8
WINDOWS = 64  # of each source
LONGEST = 1024  # maximal tokens of a window


Tasks = dict[str, span_corruption.CorruptionTask]


class MixtureLosses(NamedTuple):
    """Mean loss in nats, and the number of tokens."""

    loss: float
    tokens: int


def takes(model: nn.Module) -> bool:
    """Return whether it is a language model."""
    return isinstance(model, Model)


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return the losses on the held-out text of each source."""
    mixture = read_mixture(request.on)
    context = min(causal(model).config.context_length, LONGEST)
    tasks = tasks_for(tokenizer, context)
    every = prepare_mixture(mixture, tokenizer)
    rows, bits = [], 0.0
    for source, shards in zip(mixture.sources, counted("Evaluating", every, "sources"), strict=True):
        by_task = losses(model, shards, tasks, context, request.limit or WINDOWS, request.batch_size or BATCH_SIZE)
        left_to_right, *hidden = by_task.values()  # from left to right, and infilling
        bits_per_byte = shards.bits_per_byte(left_to_right.loss)
        bits += source.weight * bits_per_byte
        figures = (
            round(bits_per_byte, 4),
            round(math.exp(min(left_to_right.loss, 700)), 2),
            round(left_to_right.loss, 4),
            left_to_right.tokens,
        )
        rows.append((source.name, round(source.weight, 4), *figures, *(round(task.loss, 4) for task in hidden)))
    columns = "source", "weight", "bits per byte", "perplexity", "loss", "tokens", *list(tasks)[1:]
    total: Figures = {"bits per byte, by the weights": round(bits, 4), "tokens": sum(row[5] for row in rows)}
    notes = [f"Windows of {context} tokens, each without the text before it, of what keifu holds out."]
    if "infilling" in tasks:
        notes.append("infilling: nats a hidden token, 15% of a text in spans of 3 on average, both sides given.")
    return EvalResult(total, tuple(notes), {"sources": ResultTable(columns, rows)})


def tasks_for(tokenizer: Tokenizer, context: int) -> Tasks:
    """Return the tasks of a model.

    "loss": predict from left to right, after the token that begins a text. "infilling", if the tokenizer has modes and
    sentinels: predict hidden tokens from both sides, as in UL2's first R-denoiser.
    """
    vocabulary = tokenizer.backend.get_vocab()
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if not vocabulary.keys() >= {*span_corruption.MODES} or begin != vocabulary[span_corruption.SEQUENTIAL]:
        return {"loss": span_corruption.CausalBatches(context - (begin is None), begin)}
    markers = span_corruption.Markers.of(tokenizer, sum(token.startswith("<extra_id_") for token in vocabulary))
    spans = [span_corruption.SpanCorruption(span_corruption.MODES[0], 0.15, 3)]
    hidden = span_corruption.InfillingExamples(span_corruption.SpanCorruptionBatches(spans, markers, context))
    return {"loss": span_corruption.CausalBatches(context, begin), "infilling": hidden}


@torch.inference_mode()
def losses(
    model: nn.Module, shards: Shards, tasks: Tasks, context: int, rows: int, batch_size: int
) -> dict[str, MixtureLosses]:
    """Return the loss of each task on at most `rows` held-out windows of `context` tokens."""
    windows = held_out(shards, context, rows)
    device, by_task = device_of(model), {}
    for name, task in tasks.items():
        parts = (on_device(batch, device) for batch in batches(task, windows[:, : task.width], batch_size))
        with evaluation_mode(model):
            outputs = [span_corruption_loss(model, batch) for batch in parts]
        if not (count := sum(int(output.weight) for output in outputs)):
            raise UserError(f"{shards.index['source']} has no held-out token to predict: give more text.")
        by_task[name] = MixtureLosses(sum(float(output.total) for output in outputs) / count, count)
    return by_task
