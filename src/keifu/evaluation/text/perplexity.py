"""Perplexity and bits per byte of a language model on a text, and the bigram baseline.

For a catalogue entry the held-out part is used, for a file all of it. Axes: windows, length = tokens.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from keifu.data.catalogue import catalogue
from keifu.data.progress import counting
from keifu.data.text.documents import TextFileFormat, documents
from keifu.data.text.token_shards import prepare
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.intervals import mean_figures
from keifu.evaluation.registry import EvalRequest, EvalResult, Figures, ResultTable
from keifu.inference.text.likelihood import score
from keifu.inference.text.model import device_of, is_writer, text_model

ABOUT = "a language model on a text: perplexity and bits per byte"
takes, NAMES = is_writer, catalogue.names()  # language models; the catalogue's texts
OPTIONS = {"batch_size", "output", "text_field", "encoding"}
BATCH_SIZE = 8
FEWEST = 1000  # tokens below which the figures come with a warning
FEW = "The text has only {} tokens, too few for reliable figures. Give it a few thousand."


def accepts(on: str) -> bool:
    """Return whether `on` is a file or a folder."""
    return Path(on).exists()


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return the loss over windows of the context's length, each scored independently."""
    ids, bytes_per_token = tokens_of(request, tokenizer)
    if (context := text_model(model).config.context_length) < 2:
        raise UserError(f"The model's context is {context} token, which leaves none in a window to predict from it.")
    begin = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), None)
    ids = ids if begin is None else np.concatenate([[begin], ids])
    if len(ids) < 2:
        raise UserError(f"{request.on} has {len(ids)} tokens, too few to predict one from another: give more text.")
    start, device, nats = time.perf_counter(), device_of(model), list[float]()
    windows = [ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)][: request.limit]
    with counting("Evaluating", len(windows), "windows") as progress:
        for done, batch in _batches(windows, request.batch_size or BATCH_SIZE):
            nats += (-score(model, batch.to(device)).cpu().double().sum(1)).tolist()
            progress(done)
    sizes = [len(window) - 1 for window in windows[: len(nats)]]
    loss, unit = math.fsum(nats) / sum(sizes), math.log(2) * bytes_per_token
    figures: Figures = {
        "perplexity": round(math.exp(min(loss, 700)), 3),
        **mean_figures("bits per byte", np.array(nats) / unit, sizes=sizes),
        "loss": round(loss, 4),
        "tokens": sum(sizes),
        "bytes per token": round(bytes_per_token, 6),
        "tokens/s": round(sum(sizes) / (time.perf_counter() - start), 1),
    }
    note = f"Each window of {context} tokens begins without the text before it. Intervals resample windows."
    notes = (note, FEW.format(sum(sizes))) if sum(sizes) < FEWEST else (note,)
    items = ResultTable(("tokens", "nats"), [(size, round(value, 3)) for size, value in zip(sizes, nats, strict=True)])
    return EvalResult(figures, notes, items=items)


def tokens_of(request: EvalRequest, tokenizer: Tokenizer) -> tuple[np.ndarray, float]:
    """Return the tokens of the data, and the mean number of bytes per token.

    The data are the held-out part of a catalogue entry, or all documents of a file or folder, each followed by an
    end-of-text token if there is one.
    """
    if request.on in NAMES:
        shards = prepare(request.on, tokenizer)
        return np.asarray(shards.validation, dtype=np.int64), shards.bytes_per_token
    texts = list(documents(request.on, TextFileFormat(request.text_field, request.encoding)))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.array([i for ids in tokenizer.encode_batch(texts) for i in [*ids, *end]], dtype=np.int64)
    return ids, sum(len(text.encode()) for text in texts) / max(len(ids), 1)


def _batches(windows: list[np.ndarray], size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (number of windows done after it, batch). A shorter last window is a separate batch."""
    full_windows = [window for window in windows if len(window) == len(windows[0])]
    for first in range(0, len(full_windows), size):
        yield min(first + size, len(full_windows)), torch.from_numpy(np.stack(full_windows[first : first + size]))
    if len(full_windows) < len(windows) and len(windows[-1]) > 1:
        yield len(windows), torch.from_numpy(windows[-1])[None]


STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def bigram_loss(training: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Return nats per token on `held_out` of p(b | a) = (count(a, b) + s · p(b)) / (count(a) + s), with counts of
    `training`.

    p(b) is the share of b in training, after adding 1 to each count. The strength s of this Dirichlet prior (MacKay and
    Peto, 1995) is the best of seven on the held-out tokens, so that the baseline is as strong as possible.
    """
    pairs, counts = np.unique(_pairs(training, vocab_size), return_counts=True)
    firsts = np.bincount(training[:-1].astype(np.int64), minlength=vocab_size)
    alone = np.bincount(training.astype(np.int64), minlength=vocab_size) + 1.0
    held_out_pairs = _pairs(held_out, vocab_size)
    at = np.minimum(np.searchsorted(pairs, held_out_pairs), len(pairs) - 1)
    pair_counts = np.where(pairs[at] == held_out_pairs, counts[at], 0)
    prior = (alone / alone.sum())[held_out[1:].astype(np.int64)]
    before = firsts[held_out[:-1].astype(np.int64)]
    return min(float(-np.log((pair_counts + s * prior) / (before + s)).mean()) for s in STRENGTHS)


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
