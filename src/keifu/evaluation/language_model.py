"""How well a language model foretells a text: its loss as perplexity and as bits a byte; knows no model by name.

Of a catalogue name the part that keifu holds out counts, of a file all of it. Axes: windows, length = tokens.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from keifu.data.catalogue import CATALOGUE
from keifu.data.progress import counting
from keifu.data.sources import TextFormat, documents
from keifu.data.text import prepare
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.task import Asked, Outcome
from keifu.generation.decoding import Model, causal
from keifu.generation.score import score

ABOUT = "a language model on a text: perplexity and bits per byte"
OPTIONS = {"batch_size", "text_field", "encoding"}
BATCH_SIZE = 8


def takes(model: nn.Module) -> bool:
    """Whether it gives the probability of a text."""
    return isinstance(model, Model)


def names() -> list[str]:
    """The texts of the catalogue."""
    return [name for name, entry in CATALOGUE.items() if entry.gives]


def accepts(on: str) -> bool:
    """Whether `on` is one of them, a file or a folder."""
    return on in names() or Path(on).exists()


def evaluate(model: nn.Module, tokenizer: Tokenizer, asked: Asked) -> Outcome:
    """The loss over windows as long as the context, each without what stands before it."""
    ids, bytes_per_token = _held_out(asked.on, tokenizer) if asked.on in names() else _whole(asked, tokenizer)
    context = causal(model).config.context_length
    begin = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), None)
    ids = ids if begin is None else np.concatenate([[begin], ids])
    if len(ids) < 2:
        raise UserError(f"{asked.on} has {len(ids)} tokens, too few to foretell one from another: give more text.")
    start, total, count, device = time.perf_counter(), 0.0, 0, next(model.parameters()).device
    windows = [ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)][: asked.limit]
    with counting("Evaluating", len(windows), "windows") as progress:
        for done, batch in _batches(windows, asked.batch_size or BATCH_SIZE):
            total -= float(score(model, batch.to(device)).cpu().double().sum())
            count += batch[:, 1:].numel()
            progress(done)
    loss = total / count
    figures = {
        "perplexity": round(math.exp(min(loss, 700)), 3),
        "bits per byte": round(loss / math.log(2) / bytes_per_token, 4),
        "loss": round(loss, 4),
        "tokens": count,
        "tokens/s": round(count / (time.perf_counter() - start), 1),
    }
    return Outcome(figures, (f"Each window of {context} tokens begins without what stands before it.",))


def _held_out(name: str, tokenizer: Tokenizer) -> tuple[np.ndarray, float]:
    shards = prepare(name, tokenizer)
    return np.asarray(shards.validation, dtype=np.int64), shards.bytes_per_token


def _whole(asked: Asked, tokenizer: Tokenizer) -> tuple[np.ndarray, float]:
    """All documents of a file or folder, an end-of-text token behind each where there is one."""
    texts = list(documents(asked.on, TextFormat(asked.text_field, asked.encoding)))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.array([i for each in tokenizer.encode_batch(texts) for i in [*each, *end]], dtype=np.int64)
    return ids, sum(len(text.encode()) for text in texts) / max(len(ids), 1)


def _batches(windows: list[np.ndarray], size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """A batch of equally long windows, and how many are done with it; a shorter last window is alone."""
    whole = [window for window in windows if len(window) == len(windows[0])]
    for first in range(0, len(whole), size):
        yield min(first + size, len(whole)), torch.from_numpy(np.stack(whole[first : first + size]))
    if len(whole) < len(windows) and len(windows[-1]) > 1:
        yield len(windows), torch.from_numpy(windows[-1])[None]
