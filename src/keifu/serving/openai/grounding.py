"""Documents of a chat: passages for the last message, and an answer with citations.

The encoder is one that the server has for embeddings. Documents are cut, embedded and forgotten with the request.
"""

from collections.abc import Sequence
from typing import Any

from keifu.data.text.excerpts import LINE_BREAK
from keifu.inference.chat.citations import Citation, Citer
from keifu.inference.chat.documents import NOT_FOUND, Grounding, Retriever
from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.tools import Delta
from keifu.serving.worker import GoOn

Messages = list[dict[str, Any]]
Documents = Sequence[tuple[str, str]]  # pairs of title and text
ENCODER = "minilm"  # preferred among several encoders


class AnswerCitations:
    """Citations of an answer's choices. texts: of the choices so far, with marks. annotations: in OpenAI's form.

    fixed_text: the whole answer if no passage is near enough; "": the model answers.
    """

    def __init__(self, documents: Documents, grounding: Grounding, choices: int):
        self.documents, self.fixed_text = documents, "" if grounding.passages else NOT_FOUND
        self._citers = [Citer(grounding.passages) for _ in range(choices)]
        self.texts = [""] * choices
        self.annotations: list[list[dict[str, Any]]] = [[] for _ in range(choices)]

    def cited(self, choice: int, deltas: Sequence[Delta], last: bool) -> list[Delta]:
        """Return the next parts of a choice with citations. last: whether the choice ends with them."""
        parts = [part for delta in deltas for part in self._citers[choice].push(delta.content)]
        parts += self._citers[choice].push("", True) if last else []
        return [self._delta(choice, part) for part in parts]

    def _delta(self, choice: int, part: str | Citation) -> Delta:
        self.texts[choice] += part if isinstance(part, str) else part.mark
        if isinstance(part, str):
            return Delta(part)
        delta = Delta(part.mark, citation=part, end=len(self.texts[choice]))
        self.annotations[choice].append(url_citation(part, delta.end))
        return delta

    def location(self, citation: Citation) -> dict[str, Any]:
        """Return a citation in Anthropic's form: the characters of the cited lines in their document."""
        index = [title for title, _ in self.documents].index(citation.excerpt.file)
        text = self.documents[index][1]
        starts = [0, *(match.end() for match in LINE_BREAK.finditer(text))]
        ends = [*(match.start() for match in LINE_BREAK.finditer(text)), len(text)]
        start, end = starts[citation.excerpt.line - 1], ends[citation.excerpt.last_line - 1]
        about = {"document_index": index, "document_title": citation.excerpt.file, "cited_text": text[start:end]}
        return {"type": "char_location", **about, "start_char_index": start, "end_char_index": end}


async def ground(models: ServedModels, messages: Messages, documents: Documents) -> tuple[Messages, Grounding]:
    """Return the messages, the last one with its passages; and the passages.

    Raises `ApiError` if the server has no encoder, or the last message is not the user's.
    """
    question = str(messages[-1].get("content") or "")
    if messages[-1]["role"] != "user" or not question.strip():
        raise ApiError(400, "documents answer a question: end the messages with one of the user.", "messages")
    able = [each for each in models.descriptions.values() if {"embedding", "rerank"} <= {*each.uses}]
    encoders = [each.name for each in able if "match" not in each.uses]  # a CLIP knows labels of pictures
    if not encoders:
        text = f"documents needs an encoder, and this server has none: start it with keifu serve MODEL {ENCODER}."
        raise ApiError(400, text, "documents", "wrong_model")
    worker = models.worker(ENCODER if ENCODER in encoders else encoders[0])

    def work(model: Any, tokenizer: Any, go_on: GoOn) -> Grounding:
        return Retriever((model, tokenizer)).ground_in(question, documents, go_on)

    grounding = await worker.call(work)
    return [*messages[:-1], messages[-1] | {"content": grounding.prompt(question)}], grounding


def url_citation(citation: Citation, end: int) -> dict[str, Any]:
    """Return a citation as OpenAI's annotation. end: the number of characters of the answer up to this mark's end."""
    excerpt = citation.excerpt
    place = {"start_index": end - len(citation.mark) + 1, "end_index": end}
    url = f"{excerpt.file}#L{excerpt.line}-L{excerpt.last_line}"
    return {"type": "url_citation", "url_citation": {**place, "title": excerpt.source, "url": url}}
