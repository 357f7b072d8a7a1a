"""The notebooks: in the percent format, each with text and code, and run from their first cell to their last."""

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.py"))
CELL = re.compile(r"(?m)^# %%( \[markdown\])?$")


def cells(text: str) -> list[tuple[bool, str]]:
    """Whether each cell is text, and its content."""
    parts = CELL.split(text)
    return [(mark is not None, content) for mark, content in zip(parts[1::2], parts[2::2], strict=True)]


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5


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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    runpy.run_path(str(path))
    plt.close("all")
    assert [*tmp_path.iterdir()] == []
