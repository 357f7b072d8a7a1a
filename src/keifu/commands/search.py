"""`keifu search`: the passages of a folder's documents that are nearest to a question, with file and line."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.inputs import (
    ask,
    at_terminal,
    ids,
    load_encoder,
    load_reranker,
    notice,
    read_pipe,
    warn_of_language,
)  # fmt: skip
from keifu.data.text.passages import Passage, document_files, read_documents
from keifu.errors import UserError, printable
from keifu.ranges import Count, SmallCount

CANDIDATES = 50  # nearest passages that a cross-encoder reads
EXAMPLE = 'keifu search notes/ "How are logs rotated?"'


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Search documents by meaning: the passages of a folder's Markdown, text and HTML files that are nearest to a
    question, with file, line and cosine similarity, or with the score of --rerank.

    The embeddings are kept in the cache, so that only new and changed passages are embedded again. MiniLM, the encoder
    that comes with keifu, reads English.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of .md, .txt, .rst and .html files, or one file."""
    question: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[QUESTION]")] = None
    """Question, or some words."""
    count: SmallCount = 5
    """Number of passages to print."""
    model: str = "minilm"
    """Encoder of passages and question: a run, a folder, a hub id or a catalogue name."""
    rerank: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Cross-encoder (a BERT with one label) that reads the question together with each of the 50 nearest passages, and
    sorts them by its score."""
    batch_size: Count = 256
    """Number of passages that go through the model together, at most."""
    json: bool = False
    """Whether to print a JSON object for each passage."""


def run(options: Options) -> None:
    """Embed new passages, and print the nearest ones."""
    question = options.question or (ask("Question: ", EXAMPLE) if at_terminal() else read_pipe())
    if not question.strip():
        raise UserError(f"There is no question: write it after the folder ({EXAMPLE}), or pipe it in.")
    names = {path: str(path) for path in document_files(options.folder)}
    passages = read_documents(names, lambda error: print(printable(f"Left out: {error}"), file=sys.stderr))
    warn_of_language(options.model, [question], [passage.text for passage in passages])
    from keifu.checkpoints.hub import weights_identity
    from keifu.data.progress import counting
    from keifu.inference.embeddings.encoders import embed_rows
    from keifu.inference.embeddings.reranker import rank
    from keifu.inference.embeddings.search import build_index, count_new, index_path

    judge = load_reranker(options.rerank) if options.rerank else None
    notice(f"Loading {options.model} ...")
    model, tokenizer = load_encoder(options.model)
    # the question comes first: an error in it must not wait for the folder
    question_embedding = embed_rows(model, ids(model, tokenizer, [question], True), tokenizer.pad_id or 0).cpu()
    path = index_path(options.folder, weights_identity(options.model), model)
    new = count_new(passages, path)
    with counting("Embedding", new, "passages") if new else nullcontext() as advance:
        index = build_index(passages, (model, tokenizer), path, options.batch_size, advance)
    if judge is None:
        return _show(index.nearest(question_embedding, options.count), "similarity", options.json)
    near = [passage for _, passage in index.nearest(question_embedding, max(CANDIDATES, options.count))]
    ranking = rank(*judge, question, [passage.full_text for passage in near], True)
    if ranking.shortened:
        print(f"{ranking.shortened} of {len(near)} passages were cut for {options.rerank}.", file=sys.stderr)
    best = ranking.scores.topk(min(options.count, len(near)))
    hits = [(value, near[index]) for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return _show(hits, "score", options.json)


def _show(hits: list[tuple[float, Passage]], measure: str, as_json: bool) -> None:
    for value, passage in hits:
        if as_json:
            content: dict[str, Any] = {measure: round(value, 6), **asdict(passage)}
            print(json.dumps(content, ensure_ascii=False))
        else:
            print(f"{value:.3f}  {printable(str(passage.file))}:{passage.line}  {printable(passage.heading)}".rstrip())
            print(f"       {printable(passage.text)}\n")
