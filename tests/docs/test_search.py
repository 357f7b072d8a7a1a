"""The search of the site, in Chromium: what a page loads before it is used, and what it finds."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "page"))

from local_server import WAIT, serve

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FOUND = ".md-search-result__item > a"
LOADED = """() => performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
  .map((entry) => [new URL(entry.name).pathname, entry.decodedBodySize])"""
pytestmark = pytest.mark.slow  # the site is built


@pytest.fixture(scope="module")
def browser(site: Path) -> Iterator[Any]:
    """Yield a function that opens a page of the site."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium")
    server = serve(site)
    address = next(server)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=WAIT)

        def opened(path: str, width: int = 1280) -> Any:
            page = chromium.new_page(viewport={"width": width, "height": 800})
            page.set_default_timeout(WAIT)
            page.goto(f"{address}/{path}", wait_until="networkidle")
            return page

        yield opened
        chromium.close()
    next(server, None)


def search(page: Any, words: str) -> list[str]:
    """Type words into the search and return the paths of the pages that it finds."""
    page.locator("[data-md-component=search-query]").click()
    page.keyboard.type(words)
    page.wait_for_selector(FOUND)
    return page.eval_on_selector_all(FOUND, "all => all.map((link) => new URL(link.href).pathname)")


@pytest.mark.parametrize("path", ["resuming.html", "lineage/gpt2.html", "ja/lineage/gpt2.html"])
def test_a_page_loads_no_index_before_a_search(browser: Any, path: str) -> None:
    page = browser(path)
    before = dict(page.evaluate(LOADED))
    assert len(before) > 4 and not [name for name in before if "search_index" in name]
    assert sum(size for name, size in before.items() if "/pictures/" not in name) < 500_000
    search(page, "GPT-2")
    folder = "/ja" if path.startswith("ja/") else ""
    assert f"{folder}/search/search_index.json" in dict(page.evaluate(LOADED))


def test_the_button_of_a_phone_begins_the_search_too(browser: Any) -> None:
    page = browser("resuming.html", width=390)
    with page.expect_response("**/search/search_index.json"):
        page.locator("label.md-header__button[for=__search]").click()


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("resume a run", "/resuming.html"),
        ("continue a run", "/resuming.html"),
        ("GRPO", "/lineage/deepseek_r1.html"),
        ("再開", "/ja/resuming.html"),
    ],
)
def test_the_words_that_people_type_find_their_page_first(browser: Any, words: str, path: str) -> None:
    page = browser("ja/lineage/gpt2.html" if path.startswith("/ja") else "lineage/gpt2.html")
    assert search(page, words)[0] == path


@pytest.mark.parametrize("path", ["lineage/deepseek_r1.html", "lineage/transformer.html", "ja/lineage/ddpm.html"])
def test_a_formula_scrolls_inside_itself_on_a_phone(browser: Any, path: str) -> None:
    page = browser(path, width=390)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    script = """all => all.filter((box) => box.scrollWidth > box.clientWidth + 1)
      .map((box) => getComputedStyle(box).overflowX)"""
    assert set(page.eval_on_selector_all(".formula", script)) <= {"auto"}
