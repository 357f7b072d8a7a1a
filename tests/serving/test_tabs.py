"""Every tab of the page in a real browser, on a phone and at a desk, in both colours and languages."""

import io
import re
from collections.abc import Callable
from itertools import pairwise
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
    """Send a tab's form, wait for the answer, and return the message below it."""
    page.click(f"#{tab} form button:not([type])")
    page.wait_for_selector(f"#{tab} form button:not([type]):enabled")
    assert "error" not in page.get_attribute(f"#{tab} .told", "class"), page.inner_text(f"#{tab} .told")
    return page.inner_text(f"#{tab} .told")


def labels(page: Any, tab: str) -> list[list[str]]:
    """Return the labels of a matrix, by rows and by columns, after checking that it has cells and a scale."""
    svg = f"#{tab} .map"
    assert page.locator(f"{svg} .cell").count() and "100 %" in page.inner_text(f"#{tab} .scale")
    assert page.locator(f"{svg} .axis").count() == 2
    texts = page.locator(f"{svg} text:not(.axis)").evaluate_all(
        "all => all.map(each => [each.getAttribute('x'), each.textContent])"
    )
    return [[text for x, text in texts if (x is None) == is_column] for is_column in (False, True)]


def apart(page: Any, tab: str) -> None:
    """Assert that no bar of a tab runs under its number, and all are inside the page."""
    rows = page.locator(f"#{tab} .share:has(meter)").evaluate_all(
        """rows => rows.map((row) => [...row.children].map((part) => {
          const { left, right } = part.getBoundingClientRect();
          return [left, right];
        }))"""
    )
    width = page.evaluate("innerWidth")
    for parts in rows:
        assert parts[1][1] - parts[1][0] > 20, "there is no bar"
        assert all(before[1] <= after[0] for before, after in pairwise(parts)) and parts[-1][1] <= width


def look(page: Any, folder: Path) -> None:
    page.select_option("#look [name=model]", "base")
    page.fill("#look [name=input]", "The <b>cat</b>")
    send(page, "look")
    assert page.locator("#look .chip").count() == 14 and page.locator("#look b").count() == 0
    assert page.locator("#look thead th").count() == 6 and page.locator("#look tbody tr").count() == 2
    assert page.locator("#look tbody tr:first-child td").count() == 5
    shown = page.locator("#look .chip").all_inner_texts()
    assert labels(page, "look") == [shown, shown]
    page.locator("#look .chip").nth(3).press("Enter")
    assert page.locator("#look .chip").nth(3).get_attribute("aria-pressed") == "true"
    shades = page.locator("#look .chip").evaluate_all("chips => chips.map(chip => chip.style.background)")
    assert len(set(shades[:4])) > 1 and shades[4] == shades[13]  # what comes later is not seen
    page.select_option("#look [name=model]", "masked")
    page.fill("#look [name=input]", "the [MASK] sat on a [MASK]")
    send(page, "look")
    assert page.locator("#look meter").count() == 10
    apart(page, "look")
    assert "[SEP]" not in page.inner_text("#look .looked")  # it begins with a word


def translate(page: Any, folder: Path) -> None:
    page.fill("#translate [name=input]", "a pen")
    send(page, "translate")
    _, tokenizer = keifu.load(str(folder / "translator"))
    assert tokenizer is not None and page.locator("#translate .answer").count() == 1
    assert page.locator("#translate .chips").count() == 2
    written, source = (each.locator(".chip").all_inner_texts() for each in page.locator("#translate .chips").all())
    assert labels(page, "translate") == [written, source]


def draw(page: Any, _: Path) -> None:
    assert page.locator("#draw [name=prompt]").is_hidden()
    hints = [page.get_attribute(f"#draw [name={name}]", "placeholder") for name in ("seed", "steps", "guidance")]
    assert hints in (["random", "the model’s", "the model’s"], ["ランダム", "モデルの既定値", "モデルの既定値"])
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
    apart(page, "match")
    page.click("#examples")
    until(lambda: page.locator("#match img").count() == 3)
    send(page, "match")
    shares = page.locator("#match .share .number:nth-child(3)").all_inner_texts()
    assert page.locator("#match .fit").count() == 3 and sum("%" in each for each in shares) == 6


def neuron(page: Any, _: Path) -> None:
    assert page.locator("#units").is_hidden()
    page.click("#train")  # two groups that a line parts
    until(lambda: re.search(r"Done after|で完了", page.inner_text("#neuron .told")) is not None)
    page.click("#xor")
    page.click("#train")
    until(lambda: re.search(r"here is the proof|その証明", page.inner_text("#neuron .told")) is not None)
    box = "e => [e.getBoundingClientRect().top, e.getBoundingClientRect().bottom]"
    assert page.locator("#neuron .told").evaluate(box)[1] <= page.locator("#plane").evaluate(box)[0]
    page.select_option("#kind", "1")
    assert page.locator("#units").is_visible()
    page.fill("#units", "12")
    page.click("#train")
    until(lambda: re.search(r" 0 of|中 0 点", page.inner_text("#neuron .told")) is not None)
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
    with running([str(folder / "clip")], Limits(), Access(runs=folder / "no-runs")) as served:
        page = browser.new_page()
        page.goto(served.url)
        page.wait_for_selector("#tab-match:visible")
        shown = [tab.get_attribute("id") for tab in page.locator("[role=tab]").all() if tab.is_visible()]
        assert shown == ["tab-chat", "tab-match", "tab-neuron"]
        page.close()
