"""Retrieval-augmented generation (Lewis et al., 2020): a message with the passages that are nearest to it.

Retrieval is by the cosine similarity of sentence embeddings, and optionally by a cross-encoder. A passage is quoted as
data: each of its lines begins with "> ", so that no text in it can end the quotation. Axes: dim.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keifu.data.text.excerpts import Excerpt, FolderOfDocuments, cut_all
from keifu.inference.embeddings.encoders import BATCH, Advance, embed_rows, encode_texts, nearest
from keifu.inference.embeddings.reranker import rank
from keifu.inference.embeddings.search import build_index, index_path

NOT_FOUND = "This is not in the documents."
LEAST_SIMILARITY = 0.49  # keeps 95% of the answerable questions by which benchmarks/documents.py chooses
COUNT = 3  # passages that the model reads
CANDIDATES = 20  # nearest passages that a cross-encoder sorts
INSTRUCTION = "Use the quoted text to answer in one sentence:"
Loaded = tuple[Any, Any]  # model and tokenizer


class Grounding(NamedTuple):
    """Passages for a question, the best first, and the highest cosine similarity.

    passages: empty if the similarity is below the threshold, so that the answer is `NOT_FOUND`.
    """

    passages: Sequence[Excerpt]
    similarity: float

    def prompt(self, question: str) -> str:
        """Return the message for the model: the quoted passages, the nearest last, then the question."""
        quoted = [quote(passage) for passage in reversed(self.passages)]
        return "\n\n".join([*quoted, f"{INSTRUCTION} {question}"])


def quote(passage: Excerpt) -> str:
    """Return a passage as quoted lines, its heading first."""
    lines = [*([passage.heading] if passage.heading else []), *passage.text.splitlines()]
    return "\n".join(f"> {line}" for line in lines)


class Retriever:
    """Encoder, and optionally a cross-encoder, that select passages for a question.

    least_similarity: cosine similarity below which the question is not answered from the documents.
    """

    def __init__(self, encoder: Loaded, judge: Loaded | None = None, least_similarity: float = LEAST_SIMILARITY):
        self.encoder, self.judge, self.least_similarity = encoder, judge, least_similarity

    def embed(self, texts: Sequence[str], advance: Advance | None = None) -> Tensor:
        """Return the embeddings of texts on the CPU. Only the beginning of a text longer than the context is read."""
        model, tokenizer = self.encoder
        rows = encode_texts(tokenizer, texts, model.config.context_length, True).rows
        return embed_rows(model, rows, tokenizer.pad_id or 0, BATCH, advance).cpu()

    def ground(self, question: str, passages: Sequence[Excerpt], embeddings: Tensor) -> Grounding:
        """Return the passages for a question. embeddings: of the passages, one row each."""
        count = min(CANDIDATES if self.judge else COUNT, len(passages))
        similarities, indices = nearest(self.embed([question]), embeddings, count)
        similarity = float(similarities[0, 0])
        if similarity < self.least_similarity:
            return Grounding((), similarity)
        near = [passages[index] for index in indices[0].tolist()]
        if self.judge:
            scores = rank(*self.judge, question, [passage.full_text for passage in near], True).scores
            near = [near[index] for index in scores.topk(min(COUNT, len(near))).indices.tolist()]
        return Grounding(near, similarity)

    def ground_in(self, question: str, documents: Sequence[tuple[str, str]], advance: Advance | None) -> Grounding:
        """Return the passages of documents that are given as pairs of name and text."""
        passages = cut_all(documents)
        if not passages:
            return Grounding((), 0.0)
        return self.ground(question, passages, self.embed([passage.full_text for passage in passages], advance))


class SearchedFolder:
    """Folder of documents with an index in the cache, which is refreshed before each question.

    A file is read again if its size or time of change is different; a passage is embedded again if its text is.
    identity: name of the encoder's weights.
    """

    def __init__(self, folder: Path, retriever: Retriever, identity: str, report: Callable[[str], object]):
        self.documents, self.retriever = FolderOfDocuments(folder, report), retriever
        model: nn.Module = retriever.encoder[0]
        self._path = index_path(folder.expanduser(), f"{identity}\nlines", model)
        self._passages: Sequence[Excerpt] = ()
        self._embeddings = torch.empty(0)

    def refresh(self) -> Sequence[Excerpt]:
        """Read what has changed. Return the passages."""
        passages = self.documents.refresh()
        if passages != self._passages:
            self._embeddings = build_index(passages, self.retriever.encoder, self._path, BATCH).embeddings
            self._passages = passages
        return passages

    def ground(self, question: str) -> Grounding:
        """Return the passages for a question."""
        self.refresh()
        return self.retriever.ground(question, self._passages, self._embeddings)
