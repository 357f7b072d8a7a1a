"""POST /v1/classify: labels and probabilities are the library's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_toys import running, sharp

import keifu
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.embeddings.classifiers import probabilities
from keifu.inference.embeddings.encoders import encode_texts
from keifu.models import bert
from keifu.serving.app import Access
from keifu.serving.worker import Limits

LABELS = ("good", "bad", "良い")
TEXTS = ["the cat sat", "seven dogs ran far away"]


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Any]:
    """Yield a server over a classifier and an encoder."""
    torch.manual_seed(2)
    words = train_tokenizer("wordpiece", ["the cat sat on a mat while seven dogs ran far away"] * 2, 200)
    config = bert.Config(
        vocab_size=words.vocab_size, context_length=16, dim=24, hidden_dim=40, n_layers=1, n_heads=3, words=False,
        next_sentence=False, labels=LABELS,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("judge") / "judge"
    keifu.save(sharp(bert.build(config)), words, place)
    with running([str(place), str(folder / "encoder")], Limits(), Access()) as found:
        yield found, place


def test_labels_are_the_librarys(judging: Any) -> None:
    served, place = judging
    model, tokenizer = keifu.load(str(place))
    rows = encode_texts(tokenizer, TEXTS, 16).rows
    expected = probabilities(model, rows, tokenizer.pad_id)
    found = served.post("/v1/classify", {"input": TEXTS}).json()  # the only classifier
    assert found["model"] == "judge" and found["usage"]["prompt_tokens"] == sum(map(len, rows))
    for row, data in zip(expected, found["data"], strict=True):
        assert data["probs"] == pytest.approx(row.tolist(), abs=1e-6)
        assert data["label"] == LABELS[int(row.argmax())] and data["num_classes"] == 3
    alone = served.post("/v1/classify", {"model": "judge", "input": TEXTS[0]}).json()["data"]
    assert alone[0]["label"] == found["data"][0]["label"]


def test_what_cannot_be_classified_is_refused(judging: Any) -> None:
    served, _ = judging
    uses = {model.id: model.uses for model in served.openai.models.list()}
    assert uses == {
        "judge": ["embedding", "rerank", "classification", "inspection"],
        "encoder": ["embedding", "rerank", "inspection"],
    }
    wrong = served.post("/v1/classify", {"model": "encoder", "input": "x"}).json()["error"]
    assert "for this, ask judge" in wrong["message"]
    long = {"model": "judge", "input": "cat " * 40}
    assert "keep its beginning with the field cut" in served.post("/v1/classify", long).json()["error"]["message"]
    assert served.post("/v1/classify", {**long, "cut": True}).status_code == 200
