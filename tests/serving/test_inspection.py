"""/v1/inspect and /v1/match: the attention, layers, masks and alignments that the library sees, and CLIP's cosines."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import keifu
from keifu.inference.embeddings.attention_maps import inspect_text
from keifu.inference.embeddings.clip import embed_pictures, embed_texts
from keifu.inference.text.fill import fill
from keifu.inference.text.translation import translate


def weights(layer: dict[str, Any], rows: int, columns: int) -> torch.Tensor:
    found = torch.frombuffer(bytearray(base64.b64decode(layer["bytes"])), dtype=torch.uint8)
    return found.reshape(layer["heads"], rows, columns).float() / 255


@pytest.mark.parametrize("kind", ["chat", "base"])
def test_a_causal_models_heads_and_layers(served: Any, folder: Path, kind: str) -> None:
    name = str(folder / kind)
    model, tokenizer = keifu.load(name)
    found = served.post("/v1/inspect", {"model": name, "input": "Hello, é", "top": 3}).json()
    ids = tokenizer.encode("Hello, é", special=True)
    expected = inspect_text(model, ids, 3)
    assert found["rows"] == found["columns"] and len(found["rows"]) == len(ids)
    for layer, own in zip(found["attention"], expected.attention.values(), strict=True):
        torch.testing.assert_close(weights(layer, len(ids), len(ids)), own, atol=0.003, rtol=0)
    likely = [[value for _, value in place] for place in found["lens"][-1]]
    assert torch.tensor(likely).allclose(torch.tensor([[value for _, value in place] for place in expected.lens[-1]]))


def test_words_for_a_mask(served: Any, folder: Path) -> None:
    name = str(folder / "masked")
    model, tokenizer = keifu.load(name)
    text = "the [MASK] sat on a mat"
    found = served.post("/v1/inspect", {"model": name, "input": text}).json()
    expected = [[each.word, each.probability] for each in fill(model, tokenizer, text)[0]]
    assert [word for word, _ in found["masks"][0]] == [word for word, _ in expected]
    assert found["rows"].count(" [MASK]") == 1 and found["lens"] == []
    for layer in found["attention"]:
        count = len(found["rows"])
        assert weights(layer, count, count).sum(-1).allclose(torch.ones(1), atol=0.05)
    plain = served.post("/v1/inspect", {"model": str(folder / "encoder"), "input": text})
    assert plain.status_code == 400 and "has no head for masked words" in plain.json()["error"]["message"]


def test_a_translators_alignment(served: Any, folder: Path) -> None:
    name = str(folder / "translator")
    model, tokenizer = keifu.load(name)
    found = served.post("/v1/inspect", {"model": name, "input": "a pen"}).json()
    assert found["columns"] == ["a", " ", "p", "e", "n", "</s>"]
    text = "".join(found["rows"]).replace("</s>", "").replace("<pad>", "")
    assert text.strip() == translate(model, tokenizer, ["a pen"])[0]
    assert all("cross_attention" in layer["layer"] for layer in found["attention"])
    shape = len(found["rows"]), len(found["columns"])
    assert weights(found["attention"][0], *shape).sum(-1).allclose(torch.ones(1), atol=0.05)


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), colour).save(file, "PNG")
    return file.getvalue()


def test_pictures_against_words(served: Any, folder: Path) -> None:
    name = str(folder / "clip")
    model, tokenizer = keifu.load(name)
    files, texts = [picture((250, 0, 0)), picture((0, 250, 9))], ["the cat", "seven dogs", "a mat"]
    body = {"model": name, "images": [base64.b64encode(file).decode() for file in files], "texts": texts}
    found = served.post("/v1/match", body).json()
    images = embed_pictures(model, [Image.open(io.BytesIO(file)) for file in files])
    with torch.no_grad():
        expected = images @ embed_texts(model, tokenizer, texts).T
    torch.testing.assert_close(torch.tensor(found["cosines"]), expected, atol=1e-5, rtol=0)
    assert torch.tensor(found["shares"]).sum(-1).allclose(torch.ones(2))


@pytest.mark.parametrize(
    ("path", "kind", "body", "words"),
    [
        ("inspect", "chat", {"input": "a" * 200}, "input has 200 tokens, and 128 can be looked at"),
        ("inspect", "encoder", {"input": "cat " * 20}, "input has 22 tokens, and 16 can be looked at"),
        ("inspect", "chat", {"input": ""}, 'input is ""'),
        ("inspect", "ddpm", {"input": "x"}, "for this, ask"),
        ("inspect", "translator", {"input": "a" * 40}, "has 41 tokens, but this model takes 24"),
        ("match", "encoder", {"images": ["x"], "texts": ["a"]}, "for this, ask"),
        ("match", "clip", {"images": ["x!"], "texts": ["a"]}, "must be files in base64"),
        ("match", "clip", {"images": ["é"], "texts": ["a"]}, "must be files in base64"),
        ("match", "clip", {"images": ["AAAA"], "texts": ["a"]}, "Picture 1 is not a picture"),
        ("match", "clip", {"images": [], "texts": ["a"]}, "images is []"),
    ],
)
def test_what_cannot_be_looked_at(served: Any, folder: Path, path: str, kind: str, body: Any, words: str) -> None:
    found = served.post(f"/v1/{path}", {"model": str(folder / kind), **body})
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text
