"""The notebooks of the pages: valid, complete, without a foreign name to install, and run offline from a checkout."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/_site"))

import page_notebooks  # noqa: E402 # pyright: ignore[reportMissingImports] (its folder is no package)

PAGES = page_notebooks.pages()
GITHUB = "https://github.com/some-owner/keifu"
QUICK = "gpt2.md", "ddpm.ja.md", "dpo.md"


def cells(page: Path, repository: str = "") -> list[dict[str, Any]]:
    return json.loads(page_notebooks.notebook(page, repository))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_each_page_of_the_lineage_has_one_in_both_languages() -> None:
    rows = json.loads((ROOT / "docs/lineage/lineage.json").read_text(encoding="utf-8"))
    expected = {f"{row['name']}{ending}" for row in rows for ending in (".md", ".ja.md")}
    assert expected <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_notebook_has_the_blocks_of_its_page_and_needs_no_other_file(page: Path) -> None:
    found, text = cells(page), page.read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    assert [source(cell) + "\n" for cell in found if cell["cell_type"] == "code"][1:] == blocks
    words = "".join(source(cell) for cell in found if cell["cell_type"] == "markdown")
    pictures = {name for cell in found for name in cell.get("attachments", {})}
    assert set(re.findall(r"\]\(attachment:([^)]*)\)", words)) == pictures
    prose = re.sub(r"(?ms)^```.*?^```|`[^`]*`", "", words)
    assert [link for link in re.findall(r"\]\(([^)]*)\)", prose) if not link.startswith(("https:", "attach"))] == []
    assert "<details" not in prose and "data-live" not in prose
    assert len({cell["id"] for cell in found}) == len(found)


@pytest.mark.parametrize("page", PAGES[::8], ids=lambda page: page.name)
def test_a_notebook_is_valid(page: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.reads(page_notebooks.notebook(page, ""), as_version=4))


@pytest.mark.parametrize("repository", ["", GITHUB])
def test_it_installs_the_checkout_or_the_repository(repository: str) -> None:
    install = source(cells(ROOT / "docs/lineage/gpt2.md", repository)[1])
    names = [word for line in re.findall(r"pip install (.*)", install) for word in line.split()[1:]]
    expected = [f"git+{GITHUB}", f"git+{GITHUB}#subdirectory=pretrained"]
    assert names == (expected if repository else ['"{checkouts[0]}"', '"{checkouts[0]}/pretrained"'])
    linked = source(cells(ROOT / "docs/lineage/gpt2.md", repository)[2])
    assert (f"[GPT-1]({GITHUB}/blob/main/docs/lineage/gpt1.md)" in linked) == bool(repository)


@pytest.mark.parametrize(
    "page", [page if page.name in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
    ids=lambda page: page.name,
)  # fmt: skip
def test_the_cells_run_and_print_their_outputs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    space: dict[str, Any] = {}
    for cell in cells(page):
        if cell["cell_type"] == "code":
            code, printed = re.sub(r"(?m)^ *%pip.*$", "        pass", source(cell)), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, space)  # the pages are files of this repository
            assert printed.getvalue() == "".join("".join(output["text"]) for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lineage/gpt2.md", "lineage/ddpm.ja.md", "lineage/dpo.md"])
def test_a_kernel_executes_it(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="it executes notebooks")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    document = nbformat.reads(page_notebooks.notebook(ROOT / "docs" / name, ""), as_version=4)
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [*tmp_path.iterdir()] == []


def test_the_program_writes_those_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["page_notebooks.py", "gpt2", "gpt2.ja", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs/_site/page_notebooks.py"), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2.ipynb", "gpt2.ja.ipynb"]


def test_a_page_of_the_site_links_its_notebook() -> None:
    page = ROOT / "docs/lineage/gpt2.ja.md"
    text = page_notebooks.linked(page.read_text(encoding="utf-8"), page)
    assert '<a href="../notebooks/gpt2.ja.ipynb" download' in text.partition("\n## ")[0]
    assert page_notebooks.address(page) == "ja/notebooks/gpt2.ja.ipynb"
    other = ROOT / "docs/resuming.md"
    assert page_notebooks.linked("# A\n\n## B\n", other) == "# A\n\n## B\n"
