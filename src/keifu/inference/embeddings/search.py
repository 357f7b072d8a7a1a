"""Search by meaning: an index of passages' embeddings in the cache, and the passages nearest to a question."""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from keifu.data.progress import Advance
from keifu.data.text.passages import Passage
from keifu.files import write_atomic
from keifu.folders import cache
from keifu.inference.embeddings.encoders import embed_rows, encode_texts, nearest

FOLDER = "search"  # in the cache
ENGLISH = ("minilm",)  # encoders that read only English
OTHER_SCRIPT = re.compile(r"[\u0370-\u1fff\u2e80-\ud7ff\uf900-\ufaff\uff66-\uff9d]")


def language_warning(model: str, *groups: Sequence[str]) -> str:
    """Return a warning if an English encoder cannot read most texts of a group, else ""."""
    if model in ENGLISH and any(2 * sum(map(bool, map(OTHER_SCRIPT.search, group))) > len(group) for group in groups):
        return f"{model} reads English: results in other languages mean little."
    return ""


class SearchIndex(NamedTuple):
    """Embeddings of passages, one row each."""

    passages: Sequence[Passage]
    embeddings: Float[Tensor, "passages dim"]

    def nearest(self, question: Float[Tensor, "1 dim"], count: int) -> list[tuple[float, Passage]]:
        """Return (cosine similarity, passage) of the passages nearest to an embedded question, the nearest first."""
        similarity, indices = nearest(question, self.embeddings, min(count, len(self.passages)))
        pairs = zip(similarity[0].tolist(), indices[0].tolist(), strict=True)
        return [(value, self.passages[index]) for value, index in pairs]


def index_path(source: Path, model: str, encoder: nn.Module) -> Path:
    """Return the path of a folder's index for this model and dtype. model: a name that changes with the weights."""
    dtype = next(encoder.parameters()).dtype
    suffix = "" if dtype == torch.float32 else f"\n{dtype}"
    key = hashlib.sha256(f"{source.resolve()}\n{model}{suffix}".encode()).hexdigest()[:32]
    return cache() / FOLDER / f"{key}.safetensors"


def build_index(
    passages: Sequence[Passage], encoder: tuple[Any, Any], path: Path, batch_size: int, advance: Advance | None = None
) -> SearchIndex:
    """Return the index of these passages. Passages that are in the file at `path` are not embedded again.

    encoder: model and tokenizer. Of a passage longer than the context only the beginning is embedded. advance: called
    with the number of finished new passages.
    """
    stored = _read(path)
    digests = [_digest(passage) for passage in passages]
    new = {digest: passage for digest, passage in zip(digests, passages, strict=True) if digest not in stored}
    if new:
        model, tokenizer = encoder
        rows = encode_texts(
            tokenizer, [part.full_text for part in new.values()], model.config.context_length, True
        ).rows
        new_embeddings = embed_rows(model, rows, tokenizer.pad_id or 0, batch_size, advance).cpu()
        stored |= dict(zip(new, new_embeddings, strict=True))
    embeddings = torch.stack([stored[digest] for digest in digests])
    if new or len(stored) > len({*digests}):
        write_atomic(path, save({"embeddings": embeddings.contiguous()}, {"passages": json.dumps(digests)}))
    return SearchIndex(passages, embeddings)


def count_new(passages: Sequence[Passage], path: Path) -> int:
    """Return the number of passages that are not in the index yet."""
    return len({_digest(passage) for passage in passages} - _read(path).keys())


def _digest(passage: Passage) -> str:
    return hashlib.sha256(passage.full_text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """Return the embeddings of an index by the digests of their passages; {} if it is missing or damaged, so that it is
    built again."""
    with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError), safe_open(path, "pt") as file:
        digests = json.loads((file.metadata() or {})["passages"])
        return dict(zip(digests, file.get_tensor("embeddings"), strict=True))
    return {}
