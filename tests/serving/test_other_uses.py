"""Embeddings, reranking, translations, tokens and pictures over HTTP are the library's; several models share memory."""

import asyncio
import base64
import io
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from serving_toys import WAIT, running, sharp

import keifu
from keifu import cli
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.encoders import embed
from keifu.inference.embeddings.reranker import rank
from keifu.inference.text.draft import Draft
from keifu.inference.text.translation import translate
from keifu.models import bert
from keifu.models.hybrid import qwen3_next
from keifu.serving.app import Access
from keifu.serving.metrics import Metrics
from keifu.serving.models import ServedModels, public_names
from keifu.serving.openai.generation import prepare
from keifu.serving.openai.schemas import CompletionRequest
from keifu.serving.worker import Limits

TEXTS = ["the cat", "seven dogs ran", "a mat"]


def name_of(folder: Path, kind: str) -> str:
    return str(folder / kind)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_are_the_librarys(served: Any, folder: Path, form: str) -> None:
    name = name_of(folder, "encoder")
    model, tokenizer = keifu.load(name)
    found = served.openai.embeddings.create(model=name, input=TEXTS, encoding_format=form)
    rows = [each.embedding for each in found.data]
    if form == "base64":
        rows = [torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32).tolist() for row in rows]
    torch.testing.assert_close(torch.tensor(rows), embed(model, tokenizer, TEXTS))
    assert found.usage.prompt_tokens == sum(map(len, tokenizer.encode_batch(TEXTS, special=True)))
    with pytest.raises(openai.BadRequestError, match="dimensions is 8, and the embeddings of this model have 24"):
        served.openai.embeddings.create(model=name, input=TEXTS, dimensions=8)
    alone = served.openai.embeddings.create(model=name, input=TEXTS[0], dimensions=24).data[0].embedding
    assert alone == pytest.approx(rows[0], abs=1e-6)


def test_what_cannot_be_embedded_is_refused(served: Any, folder: Path, chat: str) -> None:
    ask = served.openai.embeddings.create
    with pytest.raises(openai.BadRequestError, match="Text 2 of 2 has .* tokens; the model takes 16"):
        ask(model=name_of(folder, "encoder"), input=["cat", "cat " * 30])
    with pytest.raises(openai.BadRequestError, match="Text 1 of 1 is empty"):
        ask(model=name_of(folder, "encoder"), input=" ")
    with pytest.raises(openai.BadRequestError, match="for this, ask .*encoder"):
        ask(model=chat, input="cat")


@pytest.mark.parametrize(
    ("kind", "path", "field"), [("base", "completions", "prompt"), ("encoder", "embeddings", "input")]
)
def test_too_many_texts_at_a_time_are_refused_by_their_number(
    served: Any, folder: Path, kind: str, path: str, field: str
) -> None:
    found = served.post(f"/v1/{path}", {"model": name_of(folder, kind), field: ["a"] * 3000})
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == field and "not 3000" in error["message"], error


def test_documents_are_ranked_by_their_cosine(served: Any, folder: Path) -> None:
    """The documents are sent in the order from worst to best, in which no two of the best ones are in order."""
    name = name_of(folder, "encoder")
    model, tokenizer = keifu.load(name)
    query, *points = embed(model, tokenizer, ["a cat", *TEXTS])
    texts = [TEXTS[place] for place in (torch.stack(points) @ query).argsort().tolist()]
    body = {"model": name, "query": "a cat", "documents": texts, "top_n": 2}
    found = served.post("/v1/rerank", body).json()
    assert served.post("/rerank", body).json() == found
    query, *points = embed(model, tokenizer, ["a cat", *texts])
    scores = torch.stack(points) @ query
    order = scores.argsort(descending=True).tolist()[:2]
    assert order != sorted(order)
    assert [each["index"] for each in found["results"]] == order
    assert [each["relevance_score"] for each in found["results"]] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert [each["document"]["text"] for each in found["results"]] == [texts[place] for place in order]


def test_translations_are_the_librarys(served: Any, folder: Path) -> None:
    name = name_of(folder, "translator")
    model, tokenizer = keifu.load(name)
    texts = ["a pen. the cat.", "dogs"]
    found = served.post("/v1/translations", {"model": name, "input": texts, "beam": 3}).json()
    assert [each["text"] for each in found["data"]] == translate(model, tokenizer, texts, beam=3)
    sentences = [part for each in found["data"] for part in each["sentences"]]
    read, written = (sum(part[name] for part in sentences) for name in ("source_tokens", "tokens"))
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    assert found["usage"] == usage and read and written
    refused = served.post("/v1/translations", {"model": name, "input": "a" * 40}).json()["error"]
    assert "has 41 tokens, but this model takes 24" in refused["message"]


def test_tokens_are_those_that_the_model_reads(served: Any, chat: str, folder: Path) -> None:
    _, tokenizer = keifu.load(chat)
    messages = [{"role": "user", "content": "é <|im_end|>"}]
    found = served.post("/v1/tokenize", {"model": chat, "messages": messages}).json()
    assert found["ids"] == tokenizer.render_chat(messages)
    plain = served.post("/v1/tokenize", {"model": chat, "input": "é"}).json()
    assert plain["ids"] == tokenizer.encode("é", special=True)
    assert bytes(sum((token["bytes"] for token in plain["tokens"]), [])).decode() == "é"
    assert "either input or messages" in served.post("/v1/tokenize", {"model": chat}).json()["error"]["message"]
    refused = served.post("/v1/tokenize", {"model": name_of(folder, "ddpm"), "input": "x"})
    assert refused.status_code == 400 and "reads no text" in refused.json()["error"]["message"]


def test_a_picture_says_how_it_was_drawn_and_is_drawn_again_bit_for_bit(
    served: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)  # a picture names its model by the id, not by the server's path
    body = {"model": name_of(folder, "ddpm"), "n": 2, "seed": 5, "steps": 3, "label": "dog"}
    data = served.post("/v1/images/generations", body).json()["data"]
    assert [each["seed"] for each in data] == [5, 6] and data[0]["b64_json"] != data[1]["b64_json"]
    for number, each in enumerate(data):
        file = tmp_path / f"{number}.png"
        file.write_bytes(base64.b64decode(each["b64_json"]))
        assert str(folder).encode() not in file.read_bytes()
        cli.main(["draw", "--again", str(file), "-o", str(tmp_path / "again.png")])
        pixels = [Image.open(io.BytesIO(path.read_bytes())).tobytes() for path in (file, tmp_path / "again.png")]
        assert pixels[0] == pixels[1], capsys.readouterr()


def picture(mode: str, colour: Any, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_drawn_on_and_what_the_mask_keeps_stays(
    served: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 4, 8))  # the left half is to be drawn anew
    file = io.BytesIO()
    half.save(file, "PNG")
    ask = {"model": name_of(folder, "ddpm"), "image": ("red.png", picture("RGB", (250, 10, 10)))}
    ask |= {"prompt": "", "mask": ("half.png", file.getvalue()), "extra_body": {"steps": 4, "label": "cat", "seed": 3}}
    with pytest.raises(openai.BadRequestError, match="reads no text"):
        served.openai.images.edit(**ask | {"prompt": "x"})
    del ask["prompt"]
    fields = {"model": ask["model"], "steps": "4", "label": "cat", "seed": "3"}
    files = {"image": ask["image"], "mask": ask["mask"]}
    found = httpx.post(f"{served.url}/v1/images/edits", data=fields, files=files, timeout=WAIT)
    data = base64.b64decode(found.json()["data"][0]["b64_json"])
    image = Image.open(io.BytesIO(data))
    pixels = [image.getpixel((x, y)) for y in range(8) for x in range(8)]
    assert all(pixel == (250, 10, 10) for place, pixel in enumerate(pixels) if place % 8 >= 4)
    assert not all(pixel == (250, 10, 10) for place, pixel in enumerate(pixels) if place % 8 < 4)
    (tmp_path / "red.png").write_bytes(ask["image"][1])
    (tmp_path / "drawn.png").write_bytes(httpx_edit(served, {**fields, "strength": "0.5"}, files["image"]))
    again = ["draw", "--again", str(tmp_path / "drawn.png"), "--init", str(tmp_path / "red.png")]
    cli.main([*again, "-o", str(tmp_path / "again.png")])
    assert "bit for bit" in capsys.readouterr().err


def httpx_edit(served: Any, fields: dict[str, str], image: tuple[str, bytes]) -> bytes:
    found = httpx.post(f"{served.url}/v1/images/edits", data=fields, files={"image": image}, timeout=WAIT).json()
    return base64.b64decode(found["data"][0]["b64_json"])


@pytest.mark.parametrize(
    ("fields", "files", "words"),
    [
        ({}, {}, "send one as image"),
        ({}, [("image[]", ("x.png", picture("L", 0)))] * 2, "The files are ['image', 'image']: send one as image"),
        ({}, {"image": ("x.png", picture("L", 0, (33, 32)))}, "size is 33x32, and this model draws no more than 32x32"),
        ({}, {"image": ("x.png", b"no picture")}, "x.png is not a picture"),
        ({}, {"image": ("x.png", picture("RGB", 7, (90, 64))[:60])}, "x.png is damaged or cut off"),
        ({"steps": "many"}, {"image": ("x.png", picture("L", 0))}, 'steps is "many"'),
        ({"strenght": "1"}, {"image": ("x.png", picture("L", 0))}, "Did you mean 'strength'?"),
        ({}, {"image": ("x.png", picture("L", 0)), "maks": ("y.png", picture("L", 0))}, "as mask if any"),
        (
            {},
            {"image": ("x.png", picture("L", 0)), "mask": ("y.png", picture("L", 9, (3, 3)))},
            "must have the same size",
        ),
    ],
)
def test_what_cannot_be_drawn_on_is_refused(served: Any, folder: Path, fields: Any, files: Any, words: str) -> None:
    fields = {"model": name_of(folder, "ddpm"), "label": "cat", **fields}
    found = httpx.post(f"{served.url}/v1/images/edits", data=fields, files=files, timeout=WAIT)
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_a_stream_shows_the_noise_go_and_ends_with_the_same_picture(served: Any, folder: Path) -> None:
    ask = {"model": name_of(folder, "ddpm"), "seed": 5, "steps": 6, "label": "dog"}
    whole = served.post("/v1/images/generations", ask).json()["data"][0]
    found = served.post("/v1/images/generations", {**ask, "stream": True, "partial_images": 3})
    events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: ")]
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    assert [event["partial_image_index"] for event in events[:3]] == [0, 1, 2]
    assert events[-1]["b64_json"] == whole["b64_json"] and events[0]["b64_json"] != events[1]["b64_json"]
    wrong = served.post("/v1/images/generations", {**ask, "label": "dgo", "stream": True}).text
    assert "dog" in json.loads(wrong.split("data: ")[1])["error"]["message"]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"prompt": "a cat"}, "no class of this model 'a cat'. Did you mean 'cat'?"),
        ({"label": "dgo"}, "dog"),
        ({"sampler": "dimm"}, "Did you mean 'ddim'?"),
        ({"size": "8by8"}, 'size is "8by8": it must be WIDTHxHEIGHT'),
        ({"response_format": "jpeg"}, 'response_format is "jpeg"'),
        ({"background": "transparent"}, "background is not supported"),
        ({"size": "32x36"}, "size is 32x36, and this model draws no more than 32x32 here"),
        ({"n": 17}, "n is 17"),
        ({"partial_images": 3}, "partial_images is for streams"),
    ],
)
def test_what_cannot_be_drawn_is_refused(served: Any, folder: Path, field: dict[str, Any], words: str) -> None:
    found = served.post("/v1/images/generations", {"model": name_of(folder, "ddpm"), "steps": 2, **field})
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_memory_is_bounded_by_letting_the_model_go_that_was_not_used_longest(folder: Path) -> None:
    paths = [name_of(folder, kind) for kind in ("encoder", "base", "chat")]
    names = ["encoder", "base", "chat"]
    with running(paths, Limits(), Access()) as served:
        sizes = {name: served.models.descriptions[name].size for name in names}
    memory = sizes[names[0]] + max(sizes[names[1]], sizes[names[2]]) + 1
    with running(paths, Limits(), Access(), memory) as served:
        for name in (names[0], names[2]):
            assert served.post("/v1/tokenize", {"model": name, "input": "the cat"}).status_code == 200
        served.openai.embeddings.create(model=names[0], input="the cat")
        served.openai.completions.create(model=names[2], prompt="the cat", max_tokens=2)
        assert set(served.models.workers) == {names[0], names[2]}
        served.openai.embeddings.create(model=names[0], input="the cat")
        served.openai.completions.create(model=names[1], prompt="the cat", max_tokens=2)
        assert {*served.models.workers} == {names[0], names[1]}, "the one that was not used longest is gone"
        assert sum(sizes[name] for name in served.models.workers) <= memory
    with pytest.raises(UserError, match="takes .* MiB, but --memory allows"):
        ServedModels(public_names(paths, {}), Limits(), Metrics(), 1000)


def test_memory_holds_the_draft_too(folder: Path) -> None:
    path = name_of(folder, "base")
    draft = Draft(*keifu.load(path))
    assert draft.nbytes == ServedModels({"base": path}, Limits(), Metrics()).descriptions["base"].size
    both = 2 * draft.nbytes
    with pytest.raises(UserError, match=r"takes .* MiB and the draft .* MiB, but --memory allows"):
        ServedModels({"base": path}, Limits(guesses=draft), Metrics(), both - 1)
    models = ServedModels({"base": path, "other": path}, Limits(guesses=draft), Metrics(), both)
    models.worker("base")
    models.worker("other")
    assert {*models.workers} == {"other"}


def test_guesses_and_a_draft_change_no_answer_of_a_hybrid(folder: Path, tmp_path: Path) -> None:
    base, hybrid = folder / "base", tmp_path / "hybrid"
    _, tokenizer = keifu.load(base)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rope_dim": 4, "n_experts": 2}
    linear = {"n_linear_key_heads": 1, "n_linear_value_heads": 1, "linear_key_dim": 4, "linear_value_dim": 4}
    others = {"expert_dim": 8, "shared_dim": 8, "n_experts_per_token": 1, "context_length": 64, "global_layers": (1,)}
    config = qwen3_next.Config(vocab_size=tokenizer.vocab_size, **sizes, **linear, **others)
    keifu.save(sharp(qwen3_next.build(config)), tokenizer, hybrid)
    body = {"prompt": "abcabcabcabc", "max_tokens": 24, "temperature": 0}
    texts, guessed = [], []
    for guesses in (0, 3, Draft(*keifu.load(base))):
        with running([str(hybrid)], Limits(guesses=guesses), Access()) as served:
            answer = served.post("/v1/completions", body).json()
        texts.append(answer["choices"][0]["text"])
        details = answer["usage"]["completion_tokens_details"]
        guessed.append(details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"])
    assert texts[1] == texts[2] == texts[0]
    assert not guessed[0] and guessed[2], "the draft has guessed"


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [("base", "completions", {"prompt": "abc", "max_tokens": 1}), ("encoder", "embeddings", {"input": "the cat"})],
)
def test_a_model_whose_load_failed_is_loaded_by_what_asks_next(
    folder: Path, tmp_path: Path, kind: str, path: str, body: dict[str, Any]
) -> None:
    name = str(shutil.copytree(folder / kind, tmp_path / kind))
    weights, away = tmp_path / kind / "model.safetensors", tmp_path / "away"
    with running([name], Limits(), Access()) as served:
        weights.rename(away)
        assert served.post(f"/v1/{path}", {"model": name, **body}).status_code >= 400
        assert not served.openai.models.retrieve(name).loaded
        away.rename(weights)
        assert served.post(f"/v1/{path}", {"model": name, **body}).status_code == 200
        assert served.openai.models.retrieve(name).loaded


def test_an_answer_whose_model_was_let_go_before_it_began_is_written(folder: Path) -> None:
    base, chat = "base", "chat"
    sources = {kind: name_of(folder, kind) for kind in (base, chat)}
    sizes = [each.size for each in ServedModels(sources, Limits(), Metrics()).descriptions.values()]
    models = ServedModels(sources, Limits(), Metrics(), max(sizes))

    async def write() -> list[int]:
        body = CompletionRequest(model=base, prompt=[1, 2], max_tokens=3)
        answer = await prepare(models, body, "completion", lambda _: body.prompts(), "cmpl")
        models.worker(chat)
        assert set(models.workers) == {chat}
        found = [piece.token async for _, piece in answer.pieces()]
        await models.close()
        return found

    assert asyncio.run(write())


def test_packed_weights_write_text_and_the_whole_ones_are_looked_into(folder: Path) -> None:
    names = [name_of(folder, kind) for kind in ("base", "encoder")]
    with running(names, Limits(), Access(), weights="int8") as served:
        models = served.models
        assert models.packed == {"base": "int8"}
        assert models.descriptions["base"].uses == ("completion", "inspection")
        assert served.post("/v1/completions", {"model": "base", "prompt": "abc", "max_tokens": 2}).status_code == 200
        assert set(models.workers) == {"base"}
        found = served.post("/v1/inspect", {"model": "base", "input": "abc"}).json()
        assert found["model"] == "base" and len(found["attention"]) == 2
        assert set(models.workers) == {"base", "base (inspection)"}
        assert [model.id for model in served.openai.models.list()] == ["base", "encoder"]


def cut(form: str, share: float) -> bytes:
    """Return an animation or a file of two pages that ends early."""
    file = io.BytesIO()
    frames = [Image.effect_noise((40, 40), 90), Image.effect_noise((40, 40), 90)]
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()[: int(len(file.getvalue()) * share)]


def bomb() -> bytes:
    """Return a JPEG of some hundred bytes whose header says 13,000 x 13,000 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = (13_000).to_bytes(2, "big") * 2
    return bytes(content)


CUT = [(form, share) for form in ("GIF", "TIFF") for share in (0.3, 0.6, 0.97)]


@pytest.mark.parametrize("content", [bomb(), *(cut(*each) for each in CUT)], ids=["bomb", *map(str, CUT)])
def test_damaged_and_huge_pictures_are_no_error_of_the_server(served: Any, content: bytes) -> None:
    statuses = (400,) if content == bomb() else (200, 400)  # of a file that is cut, the first picture may be whole
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("image", "mask"):
        files = {"image": ("x.png", picture("L", 0)), name: ("y.bin", content)}
        found = httpx.post(f"{served.url}/v1/images/edits", data={"model": "ddpm"}, files=files, timeout=WAIT)
        assert found.status_code in statuses, found.text
    body = {"model": "clip", "images": [base64.b64encode(content).decode()], "texts": ["a cat"]}
    found = served.post("/v1/match", body)
    assert found.status_code in statuses, found.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_picture_as_a_url_holds_the_same_picture(served: Any) -> None:
    ask = {"model": "ddpm", "seed": 5, "steps": 2, "label": "dog"}
    plain = served.post("/v1/images/generations", ask).json()["data"][0]
    found = served.post("/v1/images/generations", {**ask, "response_format": "url"}).json()["data"][0]
    assert found["url"] == f"data:image/png;base64,{plain['b64_json']}" and "b64_json" not in found


def test_embeddings_of_ids_are_those_of_their_text(served: Any, folder: Path) -> None:
    _, tokenizer = keifu.load(name_of(folder, "encoder"))
    ids = tokenizer.encode_batch(TEXTS, special=True)
    ask = served.openai.embeddings.create
    expected = [each.embedding for each in ask(model="encoder", input=TEXTS).data]
    found = ask(model="encoder", input=ids)
    for each, own in zip(found.data, expected, strict=True):
        assert each.embedding == pytest.approx(own, abs=1e-6)
    assert found.usage.prompt_tokens == sum(map(len, ids))
    assert ask(model="encoder", input=ids[0]).data[0].embedding == pytest.approx(expected[0], abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="input 1 has the token 9999, .*check_embedding_ctx_length=False"):
        ask(model="encoder", input=[9999])
    vocab_size = served.models.descriptions["encoder"].config.vocab_size
    with pytest.raises(openai.BadRequestError, match=f"has the token {vocab_size}, and this model has tokens from 0"):
        ask(model="encoder", input=[vocab_size])
    assert ask(model="encoder", input=[ids[0][:1] * 16]).usage.prompt_tokens == 16
    with pytest.raises(openai.BadRequestError, match="input 2 has 17 tokens; this model takes 16"):
        ask(model="encoder", input=[ids[0], ids[0][:1] * 17])
    with pytest.raises(openai.BadRequestError, match="keep its beginning with the field cut"):
        ask(model="encoder", input="cat " * 30)
    for wrong in ([], [[]], [-1], ["a", 1]):
        with pytest.raises(openai.BadRequestError):
            ask(model="encoder", input=wrong)


def test_openais_client_draws_a_class(served: Any, folder: Path) -> None:
    """The client requires a prompt, which a model of classes does not read: it may be empty, or name the class."""
    ask: dict[str, Any] = {"model": name_of(folder, "ddpm"), "response_format": "b64_json"}
    more: dict[str, Any] = {"seed": 1, "steps": 2}
    generate = served.openai.images.generate

    def drawn(prompt: str, **fields: Any) -> str:
        return generate(**ask, prompt=prompt, extra_body=more | fields).data[0].b64_json

    assert drawn("", label="dog") == drawn("", label=1) == drawn("dog") != drawn("cat")
    with pytest.raises(openai.BadRequestError, match="means nothing to it: leave it out and give a class as label"):
        drawn("a tree", label=1)
    with pytest.raises(openai.BadRequestError, match="no class of this model .*'tree'"):
        drawn("tree")


def test_documents_are_ranked_by_a_cross_encoder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    words = train_tokenizer("wordpiece", [" ".join(TEXTS)] * 2, 200)
    config = bert.Config(words.vocab_size, 32, 24, 40, 1, 3, words=False, next_sentence=False, labels=("relevant",))
    keifu.save(sharp(bert.build(config)), words, tmp_path / "judge")
    model, tokenizer = keifu.load(str(tmp_path / "judge"))
    ranking = rank(model, tokenizer, "a cat", TEXTS)
    order = ranking.scores.argsort(descending=True).tolist()
    with running([str(tmp_path / "judge")], Limits(), Access()) as own:
        found = own.post("/v1/rerank", {"query": "a cat", "documents": TEXTS, "top_n": 2}).json()
        assert [each["index"] for each in found["results"]] == order[:2]
        scores = [each["relevance_score"] for each in found["results"]]
        assert scores == pytest.approx(ranking.scores[order[:2]].tolist(), abs=1e-6)
        assert found["usage"]["prompt_tokens"] == ranking.tokens
        long = {"query": "a cat", "documents": ["cat " * 50]}
        assert "takes 32" in own.post("/v1/rerank", long).json()["error"]["message"]
        assert own.post("/v1/rerank", {**long, "cut": True}).status_code == 200
        refused = own.post("/v1/embeddings", {"model": "judge", "input": "x"}).json()["error"]["message"]
        assert "is for /v1/rerank and /v1/inspect" in refused
