"""POST /v1/classify: the label of each text, by a trained classifier. Path and fields are those of vLLM."""

import time
import uuid
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Response
from pydantic import Field
from torch import Tensor, nn

from keifu.data.classification.input_formats import examples_of
from keifu.evaluation.classification.classifiers import text_classifier
from keifu.serving.facts import current
from keifu.serving.models import ServedModels
from keifu.serving.openai.schemas import Neutral, Texts
from keifu.serving.streaming import json_response
from keifu.serving.worker import GoOn

Found = tuple[list[tuple[str, ...]], Tensor, int]  # labels of each text, their probabilities, number of tokens


class ClassifyRequest(Texts):
    """POST /v1/classify.

    input: one text or several. If the model reads several texts together, separate them by a tab. cut: whether to keep
    the beginning of a text that is longer than the context.
    """

    cut: bool = False
    user: Annotated[str | None, Field(description="Ignored.")] = None
    ignored: ClassVar[Neutral] = {"priority": (0,)}


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the route for these models."""

    @app.post("/v1/classify", summary="The label of each text", tags=["vectors"])
    async def classify(body: ClassifyRequest) -> Response:
        name = models.find(body.model, "classification").name
        labels, shares, tokens = await models.worker(name).call(partial(_classify, body=body))
        current().prompt_tokens = tokens
        data = [
            {"index": index, "label": own[max(range(len(own)), key=probs.__getitem__)], "probs": probs[: len(own)]}
            | {"num_classes": len(own), "labels": own}
            for index, (own, probs) in enumerate(zip(labels, shares.tolist(), strict=True))
        ]
        head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": name}
        return json_response({**head, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def _classify(model: nn.Module, tokenizer: Any, go_on: GoOn, body: ClassifyRequest) -> Found:
    """Return the labels, their probabilities, and the number of tokens read."""
    go_on()
    classifier = text_classifier(model, tokenizer)
    examples = examples_of(body.texts, classifier.form)
    encoded = classifier.read(examples, classifier.limit, body.cut)
    shares = classifier.predict_proba(encoded.rows).cpu()
    return [classifier.choices(row) for row in examples.rows], shares, _tokens(encoded.rows)


def _tokens(part: Any) -> int:
    """Return the number of ids in rows of ids, or in examples of several rows."""
    return sum(map(_tokens, part)) if isinstance(part, list | tuple) else 1
