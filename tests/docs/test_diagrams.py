"""The diagrams of the lineage are current, fit their boxes, and are on the pages with alt text in the language."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_site"))

import diagrams  # noqa: E402 # pyright: ignore[reportMissingImports] (its folder is no package)
from landmarks.drawing import WIDTH, Drawing  # noqa: E402 # pyright: ignore[reportMissingImports]

DRAWN = diagrams.lineage_drawings()
PAGES = [path for path in sorted((DOCS / "lineage").glob("*.md")) if path.name.partition(".")[0] != "index"]
PICTURE = re.compile(r"!\[([^\]]+)\]\(\.\./pictures/diagrams/([\w.]+\.svg)\)")
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")


def test_the_files_are_those_that_the_code_draws() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "pictures/diagrams").glob("*.svg")}
    assert found == {name: drawing.svg() for name, drawing in DRAWN.items()}


@pytest.mark.parametrize("name", DRAWN)
def test_text_fits_a_phone(name: str) -> None:
    drawing = DRAWN[name]
    assert drawing.tight == []
    svg = drawing.svg()
    assert f'width="{WIDTH}"' in svg
    assert WIDTH <= 390
    assert min(map(int, re.findall(r"font-size:(\d+)px", svg))) >= 11
    assert "prefers-color-scheme:dark" in svg


def test_text_that_does_not_fit_would_be_seen() -> None:
    drawing = Drawing("ja")
    drawing.box(100, 0, ("a box", "\u3053\u306e\u7bb1\u306b\u306f\u9577\u3059\u304e\u308b\u540d\u524d"), width=100)
    assert drawing.tight


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_has_its_diagram_with_alt_text_in_its_language(path: Path) -> None:
    found = PICTURE.findall(path.read_text(encoding="utf-8"))
    japanese = path.name.endswith(".ja.md")
    assert f"{path.name.partition('.')[0]}{'.ja' if japanese else ''}.svg" in [name for _, name in found]
    assert all(name in DRAWN and name.endswith(".ja.svg") == japanese for _, name in found)
    assert all(bool(JAPANESE.search(alt)) == japanese and len(alt) > 8 for alt, _ in found)
