"""Every tab of the page in a real browser, on a phone and at a desk, in both colours and languages."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving_toys import running, until

import keifu
from keifu.serving.app import Access
from keifu.serving.worker import Limits

pytestmark = pytest.mark.slow
SHAPES = [(360, "dark", "ja"), (1280, "light", "en-GB")]


def png(colour: str) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return {"name": f"{colour}.png", "mimeType": "image/png", "buffer": file.getvalue()}


def send(page: Any, tab: str) -> str:
    """Sends a tab's form and waits for the answer; what is told below."""
    page.click(f"#{tab} form button:not([type])")
    page.wait_for_selector(f"#{tab} form button:not([type]):enabled")
    assert "error" not in page.get_attribute(f"#{tab} .told", "class"), page.inner_text(f"#{tab} .told")
    return page.inner_text(f"#{tab} .told")


def look(page: Any, folder: Path) -> None:
    page.select_option("#look [name=model]", "base")
    page.fill("#look [name=input]", "The <b>cat</b>")
    send(page, "look")
    assert page.locator("#look .chip").count() == 14 and page.locator("#look b").count() == 0
    assert page.locator("#look tr").count() == 2 and page.locator("#look tr:first-child td").count() == 5
    page.locator("#look .chip").nth(3).press("Enter")
    assert page.locator("#look .chip").nth(3).get_attribute("aria-pressed") == "true"
    shades = page.locator("#look .chip").evaluate_all("chips => chips.map(chip => chip.style.background)")
    assert len(set(shades[:4])) > 1 and shades[4] == shades[13]  # what comes later is not seen
    page.select_option("#look [name=model]", "masked")
    page.fill("#look [name=input]", "the [MASK] sat on a [MASK]")
    send(page, "look")
    assert page.locator("#look meter").count() == 10


def translate(page: Any, folder: Path) -> None:
    page.fill("#translate [name=input]", "a pen")
    send(page, "translate")
    _, tokenizer = keifu.load(str(folder / "translator"))
    assert tokenizer is not None and page.locator("#translate .answer").count() == 1
    assert page.locator("#translate .chips").count() == 2


def draw(page: Any, _: Path) -> None:
    assert page.locator("#draw [name=prompt]").is_hidden()
    page.select_option("#draw [name=label]", "dog")
    page.fill("#draw [name=steps]", "4")
    page.fill("#draw [name=seed]", "7")
    assert "7" in send(page, "draw")
    first = page.get_attribute("#draw .drawing", "src")
    with page.expect_download() as download:
        page.click("#draw .found a")
    page.fill("#draw [name=seed]", "9")
    send(page, "draw")
    assert page.get_attribute("#draw .drawing", "src") != first
    page.set_input_files("#draw [name=base]", download.value.path())  # "again"
    until(lambda: page.input_value("#draw [name=seed]") == "7")
    assert page.input_value("#draw [name=steps]") == "4" and page.input_value("#draw [name=label]") == "dog"
    send(page, "draw")
    assert page.get_attribute("#draw .drawing", "src") == first
    page.set_input_files("#draw [name=base]", png("red"))
    page.wait_for_selector("#paint:visible")
    page.focus("#paint canvas")
    for key in ("ArrowRight", "ArrowRight", " "):
        page.keyboard.press(key)
    page.fill("#draw [name=strength]", "1")
    send(page, "draw")
    assert page.get_attribute("#draw .drawing", "src") != first


def match(page: Any, _: Path) -> None:
    page.set_input_files("#match [name=pictures]", [png("red"), png("blue")])
    page.fill("#match [name=texts]", "the cat\nseven dogs")
    send(page, "match")
    assert page.locator("#match meter").count() == 4 and page.locator("#match img").count() == 2


def neuron(page: Any, _: Path) -> None:
    page.click("#xor")
    page.select_option("#kind", "1")
    page.fill("#units", "12")
    page.click("#train")
    until(lambda: re.search(r" 0 of|中0点", page.inner_text("#neuron .told")) is not None, 60)
    page.click("#train")
    page.click("#clear-points")
    page.focus("#plane")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press(" ")
    page.click("#plane", position={"x": 30, "y": 40})
    assert "2" in page.inner_text("#neuron .told")


TABS: dict[str, Callable[[Any, Path], None]] = {
    "look": look, "translate": translate, "draw": draw, "match": match, "neuron": neuron,
}  # fmt: skip


@pytest.mark.parametrize(("width", "scheme", "locale"), SHAPES)
@pytest.mark.parametrize("tab", TABS)
def test_a_tab(served: Any, folder: Path, browser: Any, tab: str, width: int, scheme: str, locale: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme, locale=locale)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda each: errors.append(each.url) if not each.url.startswith(("data:", "blob:", served.url)) else None,
    )
    page.goto(served.url)
    page.wait_for_selector(f"#tab-{tab}:visible")
    page.focus("#tab-chat")
    while page.get_attribute(f"#tab-{tab}", "aria-selected") != "true":
        page.keyboard.press("ArrowRight")
    TABS[tab](page, folder)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert errors == []
    context.close()


def test_only_what_the_models_can_do_is_shown(folder: Path, browser: Any) -> None:
    with running([str(folder / "clip")], Limits(), Access()) as served:
        page = browser.new_page()
        page.goto(served.url)
        page.wait_for_selector("#tab-match:visible")
        shown = [tab.get_attribute("id") for tab in page.locator("[role=tab]").all() if tab.is_visible()]
        assert shown == ["tab-chat", "tab-match", "tab-neuron"]
        page.close()
