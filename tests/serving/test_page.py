"""The page in a real browser, where there is one: it asks its own server alone and obeys no markup of a model."""

import base64
import hashlib
import html
import re
from typing import Any

import httpx
import pytest
from serving_toys import until

from keifu import lineage
from keifu.errors import UserError
from keifu.inference.text.sampling_params import SETTINGS
from keifu.serving.openai.schemas import NUMBERS
from keifu.serving.page import FOLDER, in_language


def test_its_files_come_with_a_policy_that_lets_it_ask_this_server_alone(served: Any) -> None:
    index = httpx.get(served.url)
    assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in index.headers["content-security-policy"]
    parts = re.findall(r'(?:src|href)="(/page/[^"]+)"', index.text)
    assert len(parts) >= 2
    for part in parts:
        found = httpx.get(served.url + part)
        assert found.status_code == 200 and "script-src 'self'" in found.headers["content-security-policy"]
        again = httpx.get(served.url + part, headers={"if-none-match": found.headers["etag"]})
        assert again.status_code == 304 and not again.content
    assert "Did you mean 'style.css'" in httpx.get(f"{served.url}/page/styles.css").json()["error"]["message"]
    assert httpx.get(f"{served.url}/page/..%2Fpage.py").status_code == 404


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_lineage_is_a_page_whose_style_the_policy_allows(served: Any, language: str) -> None:
    assert 'href="/lineage"' in httpx.get(served.url).text
    found = httpx.get(f"{served.url}/lineage", params={"language": language})
    assert found.status_code == 200
    links = re.search(r"</h1>(<p>.*?</p>)", found.text)
    assert links and found.text.replace(links[1], "", 1) == lineage.page(language)
    other = {"en": "ja", "ja": "en"}[language]
    assert f"/lineage?language={other}" in links[1]
    style = re.findall(r"<style>(.*?)</style>", found.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in found.headers["content-security-policy"]
    assert len(style) == 1


def test_the_lineage_is_in_the_browsers_language_and_knows_its_languages(served: Any) -> None:
    assert '<html lang="en">' in httpx.get(f"{served.url}/lineage").text
    for accepted, expected in (("ja-JP,ja;q=0.9,en;q=0.8", "ja"), ("fr, en-GB;q=0.8, ja;q=0.5", "en"), ("de", "en")):
        found = httpx.get(f"{served.url}/lineage", headers={"Accept-Language": accepted})
        assert f'<html lang="{expected}">' in found.text
    assert "Did you mean 'ja'" in httpx.get(f"{served.url}/lineage?language=jp").json()["error"]["message"]


def test_no_file_of_it_names_another_server_or_turns_text_into_markup(served: Any) -> None:
    names = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*")]
    text = "".join(httpx.get(f"{served.url}/page/{name}").text for name in names) + httpx.get(served.url).text
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_each_word_is_there_in_both_languages(served: Any) -> None:
    texts = [httpx.get(f"{served.url}/page/words/{name}.js").text.partition("\n};")[0] for name in ("en", "ja")]
    english, japanese = (set(re.findall(r'(\w+): ["\[]', text)) for text in texts)
    used = re.findall(r'data-(?:text|label|placeholder)="(\w+)"', httpx.get(served.url).text)
    code = "".join(path.read_text("utf-8") for path in FOLDER.rglob("*.js"))
    said = [name for call in re.findall(r"\bsay\(([^{)]*)", code) for name in re.findall(r'"(\w+)"', call)]
    assert english == japanese and {*used, *said} <= english and len(said) > 60


def test_each_setting_has_a_control(served: Any) -> None:
    """Of the range of its row, and with its help text as a tooltip."""
    page = httpx.get(served.url).text
    controls = dict(re.findall(r'<label title="([^"]+)"><span data-setting="(\w+)">', page))
    assert {name: html.unescape(text) for text, name in controls.items()} == {
        name: SETTINGS[name].setting.help for name in NUMBERS
    }
    assert '<input id="top_n_sigma" type="number" min="0" max="1000000" step="any">' in page


def test_its_language_is_known() -> None:
    page = (FOLDER / "index.html").read_bytes()
    assert in_language(page, "") == page != in_language(page, "ja")
    with pytest.raises(UserError, match="KEIFU_LANG.* 'jp'.*Did you mean 'ja'"):
        in_language(page, "jp")


@pytest.mark.parametrize(
    ("language", "word"), [("ja", "会話"), ("en", "Chat"), pytest.param("", "Chat", marks=pytest.mark.slow)]
)
def test_it_begins_in_the_language_that_is_asked_for(served: Any, browser: Any, language: str, word: str) -> None:
    page = browser.new_page()
    body = in_language((FOLDER / "index.html").read_bytes(), language)
    page.route(f"{served.url}/", lambda route: route.fulfill(body=body, content_type="text/html; charset=utf-8"))
    page.goto(served.url)
    page.wait_for_function("document.querySelector('#language').textContent != ''")
    assert page.evaluate("document.documentElement.lang") == (language or "en")
    assert word in page.inner_text("body")
    page.close()


def test_it_is_small() -> None:
    assert sum(len(path.read_text("utf-8").splitlines()) for path in FOLDER.rglob("*.*")) < 2350


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), pytest.param(1280, "light", marks=pytest.mark.slow)])
def test_a_conversation(served: Any, chat: str, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme, locale="en-GB")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(served.url)
    page.wait_for_selector("#model option", state="attached")
    page.select_option("#model", "chat")
    page.click("#show-settings")
    page.fill("#max_tokens", "12")
    page.fill("#temperature", "1")
    page.click("#settings form > button")
    page.fill("#message", "<img src=x onerror=alert(1)> **bold**")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant")
    page.wait_for_selector("#send:visible")
    assert "tokens/s" in page.inner_text("#status")
    assert page.locator("article img").count() == 0 and page.inner_text("article.user strong") == "bold"
    page.click("#show-settings")
    page.check("#probabilities")
    page.click("#settings form > button")
    page.click("article.assistant .tools button:last-child")  # once more, with probabilities
    page.wait_for_selector("article.assistant .tools:has-text('2/2')")
    page.wait_for_selector("article.assistant .token")
    page.focus("article.assistant .text[tabindex]")
    page.keyboard.press("ArrowRight")
    assert page.locator("#alternatives tr").count() >= 5 and "%" in page.inner_text("#alternatives")
    page.click("article.user .tools button:last-child")  # edit
    page.fill(".edit textarea", "Another question")
    page.click(".edit button")
    page.wait_for_selector("#send:visible")
    assert "Another question" in page.inner_text("article.user") and "2/2" in page.inner_text("article.user .tools")
    page.reload()
    page.wait_for_selector("article.assistant")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#language")
    assert page.get_attribute("html", "lang") == "ja" and page.inner_text("#send") == "送信"
    assert errors == []
    context.close()


def test_a_long_answer_can_be_stopped(served: Any, chat: str, browser: Any) -> None:
    page = browser.new_page(locale="en-GB")
    page.goto(served.url)
    page.wait_for_selector("#model option", state="attached")
    page.select_option("#model", "chat")
    page.click("#show-settings")
    page.fill("#temperature", "1")
    page.click("#settings form > button")
    page.fill("#message", "x")
    page.click("#send")
    page.wait_for_selector("article.assistant")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    until(lambda: not served.models.workers["chat"].pending)
    page.close()


def test_text_is_shown_and_never_obeyed(served: Any, browser: Any) -> None:
    page = browser.new_page()
    page.goto(served.url)
    shown = page.evaluate(
        """async (text) => {
          const { formatted } = await import('/page/render.js');
          const box = document.createElement('div');
          box.append(...formatted(text));
          const formulas = [...box.querySelectorAll('.formula')].map((each) => each.textContent);
          const obeyed = box.querySelectorAll('script, img, b').length;
          return [box.textContent, obeyed, box.querySelector('pre').dataset.language, formulas];
        }""",
        "<script>alert(1)</script><img src=x>\n```python\n<b>x</b>\n```\n$a_1 + b$ costs $5 and \\(c\\)",
    )
    assert shown[1:] == [0, "python", ["a_1 + b", "c"]]
    assert "<script>alert(1)</script><img src=x>" in shown[0] and "<b>x</b>" in shown[0]
