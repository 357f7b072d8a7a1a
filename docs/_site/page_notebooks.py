"""A notebook for each page with code: `python docs/_site/page_notebooks.py NAME... --out FOLDER` writes those you name.

The build of the site makes all of them. The cells are the page's own tested blocks with their outputs; pictures are
inside the notebook, so that it needs no other file and no network.
"""

import argparse
import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "packaging"))

import notebooks  # noqa: E402 # pyright: ignore[reportMissingImports] (a program of packaging/)

DOCS = ROOT / "docs"
FOLDERS = ("lineage", "parts")
BLOCK = re.compile(r"(?ms)^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?")  # code and what it prints
FENCE = re.compile(r"(?ms)(^```.*?^```|`[^`\n]+`)")
DETAILS = re.compile(r"(?m)^</?details.*>\n|^<!--.*?-->\n|^<div data-live=.*</div>\n")
SUMMARY = re.compile(r"<summary>(.*?)</summary>")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)(?:\{[^}]*\})?")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
ABOUT = {
    "en": "This notebook is a page of keifu's documentation with its code. Run it from a checkout of keifu.",
    "ja": "keifu のドキュメントの1ページの文章とコードです。keifu のチェックアウトの中で実行してください。",
}
INSTALL = """\
# keifu and its small trained models, if they are not there yet; a GPU is not needed
import importlib.util
"""
FROM_ADDRESS = """
if importlib.util.find_spec("keifu_pretrained") is None:
    %pip install --quiet git+ADDRESS git+ADDRESS#subdirectory=pretrained
"""
FROM_CHECKOUT = """
from pathlib import Path

if importlib.util.find_spec("keifu_pretrained") is None:
    checkouts = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "src/keifu").is_dir()]
    if not checkouts:
        raise ImportError("keifu is not installed. Open this notebook inside a checkout of keifu.")
    %pip install --quiet "{checkouts[0]}"
    %pip install --quiet "{checkouts[0]}/pretrained"
"""
SEED = """
import torch

torch.manual_seed(0)"""


def pages() -> list[Path]:
    """Return the pages with tested code, in both languages."""
    found = [path for folder in FOLDERS for path in sorted((DOCS / folder).glob("*.md"))]
    return [path for path in found if BLOCK.search(path.read_text(encoding="utf-8"))]


def address(page: Path) -> str:
    """Return the path of a page's notebook inside the site."""
    folder = "ja/notebooks" if page.name.endswith(".ja.md") else "notebooks"
    return f"{folder}/{page.stem}.ipynb"


def text_cells(text: str, folder: Path, repository: str) -> list[dict[str, Any]]:
    """Return a cell for the text between two blocks of code, with its pictures inside; none if there is no text."""
    attachments = {}

    def picture(found: re.Match[str]) -> str:
        file = folder / found[2]
        attachments[file.name] = {TYPES[file.suffix]: base64.b64encode(file.read_bytes()).decode()}
        return f"![{found[1]}](attachment:{file.name})"

    def link(found: re.Match[str]) -> str:
        if found[2].startswith("https://"):
            return found[0]
        target = (folder / found[2]).resolve().relative_to(ROOT).as_posix() if not found[2].startswith("#") else ""
        return f"[{found[1]}]({repository}/blob/main/{target})" if repository and target else found[1]

    parts = FENCE.split(text)
    prose = [SUMMARY.sub(r"#### \1", DETAILS.sub("", part)) for part in parts[::2]]
    parts[::2] = [LINK.sub(link, PICTURE.sub(picture, part)) for part in prose]
    text = "".join(parts).strip("\n")
    if not text:
        return []
    cell: dict[str, Any] = {"cell_type": "markdown", "metadata": {}, "source": notebooks.lines(text)}
    return [cell | {"attachments": attachments} if attachments else cell]


def code_cell(code: str, output: str | None) -> dict[str, Any]:
    """Return a cell of code with its output."""
    cell = notebooks.code(code.rstrip("\n"))
    if output:
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": notebooks.lines(output)}]
    return cell


def notebook(page: Path, repository: str) -> str:
    """Return the notebook of a page as JSON. repository: the address of keifu's repository, or nothing."""
    language = "ja" if page.name.endswith(".ja.md") else "en"
    title, _, *rest = page.read_text(encoding="utf-8").split("\n")
    if page.parent.name == "lineage":
        rest = rest[1:]  # without the links to the pages before and after it
    install = FROM_ADDRESS.replace("ADDRESS", repository) if repository else FROM_CHECKOUT
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": notebooks.lines(f"{title}\n\n{ABOUT[language]}")},
        notebooks.code(INSTALL + install + SEED),
    ]
    parts = BLOCK.split("\n".join(rest))
    for text, code, output in zip(parts[::3], [*parts[1::3], None], [*parts[2::3], None], strict=True):
        cells += text_cells(text, page.parent, repository)
        cells += [code_cell(code, output)] if code else []
    for number, each in enumerate(cells):
        each["id"] = f"cell-{number}"
    metadata = {"language_info": {"name": "python"}, "kernelspec": {"display_name": "Python 3", "name": "python3"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def write(site: Path) -> None:
    """Write all notebooks into a site."""
    repository = notebooks.repository()
    for page in pages():
        target = site / address(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(notebook(page, repository), encoding="utf-8")


def linked(markdown: str, page: Path) -> str:
    """Return a page with a link to its notebook below its head, if it has one."""
    if page.parent.name not in FOLDERS or not BLOCK.search(markdown):
        return markdown
    japanese = page.name.endswith(".ja.md")
    words = "このページのノートブック（Jupyter）" if japanese else "This page as a notebook (Jupyter)"
    name = Path(address(page)).name
    link = f'<p class="notebook"><a href="../notebooks/{name}" download="{name}">{words}</a></p>'
    head, stop, rest = markdown.partition("\n## ")
    return f"{head.rstrip()}\n\n{link}\n{stop}{rest}" if stop else markdown


def main() -> None:
    """Write the notebooks of the named pages."""
    names = {page.name.removesuffix(".md"): page for page in pages()}
    parser = argparse.ArgumentParser(description="Write the notebooks of pages of the documentation.")
    parser.add_argument("names", nargs="+", choices=sorted(names), metavar="NAME", help="page, such as gpt2 or gpt2.ja")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the notebooks (default: this one)")
    options = parser.parse_args()
    for name in options.names:
        target = options.out / f"{name}.ipynb"
        target.write_text(notebook(names[name], notebooks.repository()), encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main()
