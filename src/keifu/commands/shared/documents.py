"""Documents of `keifu chat --documents`: the searched folder, and answers with citations."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keifu.commands.shared.inputs import load_encoder, load_reranker, notice, warn_of_language
from keifu.commands.shared.writing import print_completion
from keifu.errors import UserError, printable
from keifu.inference.text.sampling_params import SamplingParams

if TYPE_CHECKING:
    from keifu.inference.chat.conversation import Conversation
    from keifu.inference.chat.documents import SearchedFolder

ENCODER = "minilm"


def open_documents(folder: Path | None, rerank: str | None, least_similarity: float | None) -> "SearchedFolder | None":
    """Return the folder with its index. None: no folder was named."""
    if folder is None:
        options = {"--rerank": rerank, "--least-similarity": least_similarity}
        for name in (name for name, value in options.items() if value is not None):
            raise UserError(f"{name} selects passages of documents, and none are named: give a folder by --documents.")
        return None
    from keifu.checkpoints.hub import weights_identity
    from keifu.inference.chat.documents import LEAST_SIMILARITY, Retriever, SearchedFolder

    judge = load_reranker(rerank) if rerank else None
    least = LEAST_SIMILARITY if least_similarity is None else least_similarity
    retriever = Retriever(load_encoder(ENCODER), judge, least)
    searched = SearchedFolder(
        folder, retriever, weights_identity(ENCODER), lambda line: print(printable(line), file=sys.stderr)
    )
    notice(f"Reading {folder} ...")
    passages = searched.refresh()
    warn_of_language(ENCODER, [passage.text for passage in passages])
    notice(f"{folder}: {len(passages):,} passages.")
    return searched


def print_cited(
    conversation: "Conversation", question: str, sampling: SamplingParams, images: Any, documents: "SearchedFolder"
) -> None:
    """Print the answer to a question with citations, as JSON. `similarity` is that of the nearest passage."""
    from keifu.data.chat.thoughts import split_thoughts
    from keifu.inference.chat.citations import Citer, with_marks
    from keifu.inference.chat.documents import NOT_FOUND
    from keifu.inference.text.generate import Completion

    grounding = documents.ground(question)
    similarity = round(grounding.similarity, 6)
    if not grounding.passages:
        conversation.record(question, NOT_FOUND)
        done = Completion(NOT_FOUND, [], "stop", sampling.seed or 0, 0)
        return print_completion(done, sampling, similarity=similarity, citations=[])
    done = conversation.complete(question, sampling, images, grounding.prompt(question))
    _, text = split_thoughts(done.text, conversation.thinking)
    before = done.text.removesuffix(text)
    citer = Citer(grounding.passages)
    marked = before + with_marks(citer.push(done.text.removeprefix(before), True))
    citations = [
        {"source": each.excerpt.source, "cited": citer.text[each.start : each.end], "text": each.excerpt.text}
        for each in citer.citations
    ]
    return print_completion(replace(done, text=marked), sampling, similarity=similarity, citations=citations)
