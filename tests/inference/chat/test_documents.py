"""Passages for a question: how many the model reads, in which order, and by what they are found."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from keifu.data.text.excerpts import Excerpt
from keifu.inference.chat import documents
from keifu.inference.chat.documents import INSTRUCTION, Retriever
from keifu.inference.embeddings.reranker import PairScores

PASSAGES = [Excerpt("notes.md", n, f"Part {n}", f"Text {n}.", n) for n in range(30)]
EMBEDDINGS = torch.tensor([[math.cos(n / 60), math.sin(n / 60)] for n in range(30)])  # the first is the nearest
QUESTION = "Why?"


class Recorded(Retriever):
    """Retriever that keeps the texts that it embeds. Every text has the direction of the first passage."""

    def __init__(self, judge: Any = None):
        super().__init__(("encoder", "tokenizer"), judge)
        self.texts = list[str]()

    def embed(self, texts: Sequence[str], advance: Any = None) -> torch.Tensor:
        self.texts += texts
        return EMBEDDINGS[:1].expand(len(texts), -1)


def prompt(*numbers: int) -> str:
    quotes = "".join(f"> Part {n}\n> Text {n}.\n\n" for n in numbers)
    return f"{quotes}{INSTRUCTION} {QUESTION}"


def test_the_model_reads_three_passages_with_their_headings_and_the_nearest_last() -> None:
    order = torch.arange(29, -1, -1)  # the nearest is not the first in the folder
    grounding = Recorded().ground(QUESTION, [PASSAGES[n] for n in order.tolist()], EMBEDDINGS[order])
    assert grounding.prompt(QUESTION) == prompt(2, 1, 0)
    assert grounding.similarity == pytest.approx(1.0)


def test_a_cross_encoder_selects_three_of_the_twenty_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()

    def rank(model: Any, tokenizer: Any, question: str, texts: Sequence[str], cut: bool) -> PairScores:
        seen.extend(texts)
        return PairScores(torch.arange(len(texts)).float(), 0, 0)  # the farthest of them is the best

    monkeypatch.setattr(documents, "rank", rank)
    grounding = Recorded(("judge", "tokenizer")).ground(QUESTION, PASSAGES, EMBEDDINGS)
    assert seen == [passage.full_text for passage in PASSAGES[:20]]
    assert grounding.prompt(QUESTION) == prompt(17, 18, 19)


def test_a_passage_is_found_by_its_heading_too() -> None:
    retriever = Recorded()
    retriever.ground_in(QUESTION, [("harbour.md", "# Harbour\n\nIt lifts forty tons.\n")], None)
    assert retriever.texts == ["Harbour: It lifts forty tons.", QUESTION]
