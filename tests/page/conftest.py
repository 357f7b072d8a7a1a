"""What the tests of the page share: the engine and the packaged models behind a local server, and Chromium."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from local_server import WAIT, serve

from keifu.page import kernel

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the engine as browsers load it, the packaged models and the harness."""
    place = tmp_path_factory.mktemp("page")
    kernel.copy_engine(place / "engine")
    (place / "models").symlink_to(ROOT / "pretrained/src/keifu_pretrained")
    (place / "harness.js").symlink_to(ROOT / "tests/page/harness.js")
    (place / "index.html").write_text('<!doctype html><link rel="icon" href="data:,">\n', encoding="utf-8")
    return place


@pytest.fixture(scope="session")
def address(folder: Path) -> Iterator[str]:
    yield from serve(folder)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Yield Chromium for the tests of one file."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"], timeout=WAIT
        )
        yield found
        found.close()


class Engine:
    """The engine in a page. `kernel`: whether it computes in WebAssembly, or in plain JavaScript."""

    def __init__(self, page: Any, kernel: bool):
        self.page, self.kernel = page, kernel

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Return the result of a function of harness.js."""
        script = "async ([name, kernel, given]) => (await import('/harness.js'))[name](kernel, ...given)"
        return self.page.evaluate(script, [function, self.kernel, list(arguments)])


@pytest.fixture(scope="module")
def blank(chromium: Any, address: str) -> Any:
    """Return an empty page of the server."""
    page = chromium.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    return page


@pytest.fixture(params=["kernel", "javascript"])
def engine(request: pytest.FixtureRequest, blank: Any) -> Engine:
    """Return the engine with and without its kernel."""
    if request.param == "kernel" and not kernel.can_compile():
        pytest.skip("no compiler for WebAssembly")
    return Engine(blank, request.param == "kernel")
