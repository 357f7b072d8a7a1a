"""Pictures in a conversation: by OpenAI's client, in both of its interfaces, and what is refused."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from serving_toys import Served, running, sharp

import keifu
from keifu.data.tokenizers.chat_template import CHATML, PICTURES
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import ImagePrompt
from keifu.models import llama
from keifu.models.clip import image as clip_image
from keifu.models.hf.image_processor import Pixels, Tiles
from keifu.models.multimodal import llava, siglip, smolvlm
from keifu.serving.app import Access
from keifu.serving.openai.tools import render
from keifu.serving.worker import Limits


def png(seed: int, width: int = 21, height: int = 16) -> bytes:
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "PNG")
    return file.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a toy that reads pictures, and return its folder."""
    torch.manual_seed(4)
    trained = train_tokenizer("bpe", ["ab"], 260, special_tokens=["<|im_start|>", "<|im_end|>", "<image>"])
    tokenizer = Tokenizer(trained.backend, {"eos_token": "<|im_end|>"}, chat_template=PICTURES + CHATML)
    text = llama.Config(tokenizer.vocab_size, 400, 24, 40, 2, 4, 2)
    image = clip_image.Config(16, 4, 3, 16, 32, 2, 2, projected=False)
    config = llava.Config(text, image, Pixels(16, 16), tokenizer.token_id("<image>"), (-1,), full=True)
    folder = tmp_path_factory.mktemp("seeing") / "seer"
    keifu.save(sharp(llava.build(config)), tokenizer, folder)
    tiles = smolvlm.Config(
        llama.Config(tokenizer.vocab_size, 800, 24, 40, 2, 4, 2), siglip.Config(16, 4, 3, 16, 32, 2, 2), Tiles(32, 16),
        tokenizer.token_id("<image>"), 2,
    )  # fmt: skip
    torch.manual_seed(5)
    keifu.save(sharp(smolvlm.build(tiles)), tokenizer, folder.parent / "tiler")
    (folder.parent / "shown").mkdir()
    (folder.parent / "shown/one.png").write_bytes(png(1))
    (folder.parent / "secret.png").write_bytes(png(1))
    return folder


@pytest.fixture(scope="module")
def seeing(seer: Path, chat: str) -> Iterator[Served]:
    limits = Limits(pictures=seer.parent / "shown")
    with running([str(seer), str(seer.parent / "tiler"), chat], limits, Access()) as found:
        yield found


def question(*urls: str) -> list[Any]:
    pictures = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "What?"}, *pictures]}]


def answer(client: openai.OpenAI, *urls: str, **more: Any) -> str:
    settings: Any = {"model": "seer", "temperature": 0, "max_tokens": 8, **more}
    return client.chat.completions.create(messages=question(*urls), **settings).choices[0].message.content or ""


def test_openai_s_client_sends_pictures(seeing: Served, seer: Path, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)
    model, tokenizer = keifu.load(seer)
    expected = []
    for seed in (1, 2):
        (tmp_path / "x.png").write_bytes(png(seed))
        asked = {"images": [tmp_path / "x.png"], "temperature": 0.0, "max_tokens": 8}
        expected.append(keifu.generate(model, tokenizer, "What?", **asked))
    assert [answer(client, url(png(seed))) for seed in (1, 2)] == expected
    assert answer(client, url(png(1))) == expected[0]  # by the blocks that are known
    assert answer(client, (seer.parent / "shown/one.png").as_uri()) == expected[0]
    assert answer(client, url(png(1)), url(png(2))) != ""

    content: Any = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": url(png(2))}]
    settings: Any = {"model": "seer", "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(input=[{"role": "user", "content": content}], **settings)
    assert first.output_text == expected[1]
    assert first.usage is not None and first.usage.input_tokens > 17
    again = client.responses.create(input="And?", previous_response_id=first.id, **settings)
    assert again.usage is not None and again.usage.input_tokens > first.usage.input_tokens


def test_anthropic_s_and_ollama_s_forms_send_pictures(seeing: Served) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)
    data = base64.b64encode(png(1)).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    for form in (source, {"type": "url", "url": url(png(1))}):
        turn = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "source": form}]}
        asked: dict[str, Any] = {"model": "seer", "temperature": 0, "max_tokens": 8, "messages": [turn]}
        assert seeing.post("/v1/messages", asked).json()["content"][0]["text"] == answer(client, url(png(1)))
    turn = {"role": "user", "content": "What?", "images": [data]}
    asked = {"model": "seer", "messages": [turn], "stream": False, "options": {"temperature": 0, "num_predict": 8}}
    assert seeing.post("/api/chat", asked).json()["message"]["content"] == answer(client, url(png(1)))
    turn["images"] = ["?"]
    refused = seeing.post("/api/chat", asked)
    assert refused.status_code == 400 and "data URL that cannot be read" in refused.text


def test_a_picture_is_cut_into_tiles(seeing: Served, seer: Path, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)
    model, tokenizer = keifu.load(seer.parent / "tiler")
    (tmp_path / "x.png").write_bytes(png(1))
    asked: Any = {"images": [tmp_path / "x.png"], "temperature": 0.0, "max_tokens": 8}
    assert answer(client, url(png(1)), model="tiler") == keifu.generate(model, tokenizer, "What?", **asked)
    with pytest.raises(openai.BadRequestError, match="but the context is 800: shorten it"):
        answer(client, *[url(png(1))] * 9, model="tiler")


def bomb() -> bytes:
    """Return a file of few bytes whose header promises 400 million pixels."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def thread() -> bytes:
    """Return a file of few bytes whose shorter side, enlarged, makes the longer one fill the memory."""
    file = io.BytesIO()
    Image.new("RGB", (1, 60_000)).save(file, "PNG")
    return file.getvalue()


REFUSED = {
    "1 x 60,000 pixels, one side much longer": lambda _: [url(thread())],
    "fetches nothing from the network": lambda _: ["https://example.org/cat.png"],
    "not a file in the folder that this server permits": lambda place: [(place / "secret.png").as_uri()],
    "is 'file://\\[', which is not a file": lambda _: ["file://["],
    "is 'file:///x%00', which is not a file": lambda _: ["file:///x%00"],
    "is 'file:///.*, which is not a file": lambda place: [f"{(place / 'shown').as_uri()}/{'x' * 999}"],
    "too many pixels|would take 400 MB": lambda _: [url(bomb())],
    "Picture 1 is not a picture": lambda _: [url(b"GIF or not")],
    "Picture 1 is damaged or cut off": lambda _: [url(png(1)[:200])],
    "Picture 2 is not a picture": lambda _: [url(png(1)), url(b"x")],
    "data URL that cannot be read": lambda _: ["data:image/png;base64,?"],
    "The messages have 17 pictures, and at most 16 are read": lambda _: [url(png(1))] * 17,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(sentence: str, seeing: Served, seer: Path) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)
    with pytest.raises(openai.BadRequestError, match=sentence):
        answer(client, *REFUSED[sentence](seer.parent))


def test_a_model_of_text_refuses_a_picture(seeing: Served) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)
    for picture in (url(png(1)), "data:image/png;base64,AAAA"):  # the second is no picture, which does not matter here
        with pytest.raises(openai.BadRequestError, match="reads text alone, and sees no pictures"):
            answer(client, picture, model="chat")
    listed = {each.id: each.model_extra for each in client.models.list()}
    assert [bool(listed[name] and (listed[name] or {})["sees"]) for name in ("seer", "chat")] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "locale", "word"), [(1280, "en-GB", "Picture"), (390, "ja-JP", "画像")])
def test_the_page_shows_a_picture_to_a_model_that_sees(
    width: int, locale: str, word: str, seeing: Served, seer: Path, browser: Any, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, locale=locale)
    page = context.new_page()
    page.goto(seeing.url)
    page.wait_for_selector("#model option >> nth=1", state="attached", timeout=120_000)
    page.select_option("#model", "chat")
    assert page.locator("#add-picture").is_hidden()
    page.select_option("#model", "seer")
    assert word in page.locator("#add-picture").inner_text()
    box = page.locator("#picture").bounding_box()
    assert box and box["x"] + box["width"] <= width
    page.click("#show-settings")
    page.fill("#max_tokens", "8")
    page.fill("#temperature", "0")
    page.click("#settings form > button")
    page.locator("#picture").set_input_files(seer.parent / "shown/one.png")
    page.fill("#message", "What?")
    with page.expect_request("**/v1/chat/completions", timeout=120_000) as asked:
        page.press("#message", "Enter")
    body: Any = asked.value.post_data_json
    parts = body["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]
    assert parts[1]["image_url"]["url"] == url(png(1))
    page.wait_for_selector("article.assistant", timeout=120_000)
    page.wait_for_selector("#send:visible", timeout=120_000)
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)
    one, other = (answer(client, url(png(seed))).split() for seed in (1, 2))
    assert page.inner_text("article.assistant .text").split() == one != other
    assert page.locator("article.user img.shown").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "page.png")
    context.close()


def test_functions_and_words_reach_a_template_that_reads_parts(seer: Path) -> None:
    """Published templates of models that see, which write nothing of a content that is a string."""
    model, tokenizer = keifu.load(seer)
    parts = "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    tokenizer = tokenizer.with_chat_template("{% for m in messages %}" + parts + "{% endfor %}")
    asked = [{"role": "user", "content": "ab ba"}]
    found = render(tokenizer, asked, [{"name": "look", "parameters": {}}], model.config)
    assert isinstance(found, ImagePrompt)
    text = tokenizer.decode(found.tokens, skip_special=False)
    assert "ab ba" in text and '"look"' in text
    continued = [*asked, {"role": "assistant", "content": "a", "images": [Image.new("RGB", (4, 4))]}]
    with pytest.raises(UserError, match="answer to be continued has a picture"):
        render(tokenizer, continued, (), model.config)
