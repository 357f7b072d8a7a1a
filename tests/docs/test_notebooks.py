"""The notebooks: in the percent format, each with text and code, and run from their first cell to their last."""

import importlib.util
import json
import re
import runpy
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.py"))
CELL = re.compile(r"(?m)^# %%( \[markdown\])?$")


def cells(text: str) -> list[tuple[bool, str]]:
    """Return whether each cell is text, and its content."""
    parts = CELL.split(text)
    return [(mark is not None, content) for mark, content in zip(parts[1::2], parts[2::2], strict=True)]


def test_there_are_six() -> None:
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_text_and_code_in_cells(path: Path) -> None:
    found = cells(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8").startswith("# %% [markdown]\n# # ")
    assert len(found) >= 6
    for is_text, content in found:
        lines = [line for line in content.splitlines() if line]
        assert lines
        assert all(line.startswith("#") for line in lines) == is_text
        if not is_text:
            compile(content, str(path), "exec")
    assert any("from keifu" in content or "import keifu" in content for is_text, content in found if not is_text)
    assert any("assert" in content for is_text, content in found if not is_text)


def code(text: str) -> dict:
    """Return a cell of code."""
    return {"cell_type": "code", "source": [text]}


def maker() -> ModuleType:
    """Return the program that makes the .ipynb files."""
    spec = importlib.util.spec_from_file_location("packaging_notebooks", ROOT / "packaging/notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed_names(found: list[dict]) -> list[str]:
    """Return what the cells install that is neither the repository's address nor a folder: names of an index."""
    code = "\n".join("".join(each["source"]) for each in found if each["cell_type"] == "code")
    sources = [words[-1] for words in map(str.split, re.findall(r"pip install (.*)", code))]
    return [source for source in sources if not source.startswith(("git+https://", '"{checkouts'))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_ipynb_is_current(path: Path) -> None:
    text = path.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == maker().made(path), "run `python packaging/notebooks.py`"
    found = json.loads(text)["cells"]
    assert "from a checkout of keifu" in found[0]["source"][0] and "pip install" in found[2]["source"][-1]
    assert installed_names(found) == []
    assert all(cell["outputs"] == [] for cell in found if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in found}) == len(found)


def test_the_badge_opens_the_notebook_once_there_is_an_address() -> None:
    script, address = "# %% [markdown]\n# # A\n# %%\nx = 1\n", "https://github.com/some-owner/keifu"
    named = json.loads(maker().notebook(script, "a", address))["cells"]
    assert "/github/some-owner/keifu/blob/main/examples/notebooks/a.ipynb)" in named[0]["source"][0]
    assert f"git+{address}" in named[2]["source"][-1]
    bare = json.loads(maker().notebook(script, "a", ""))["cells"]
    assert "/github/" not in bare[0]["source"][0] and bare[2]["source"][-1].endswith('--quiet "{checkouts[0]}"')
    assert installed_names([code("%pip install --quiet keifu")]) == ["keifu"]
    assert [cell["source"] for cell in bare[1::2]] == [["# A"], ["x = 1"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_ipynb_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="it executes notebooks")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    document = nbformat.reads(path.with_suffix(".ipynb").read_text(encoding="utf-8"), as_version=4)
    nbformat.validate(document)
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    runpy.run_path(str(path))
    plt.close("all")
    assert [*tmp_path.iterdir()] == []
