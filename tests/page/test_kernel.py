"""The engine's kernel is compiled by the wheel of the compiler, is small, and says what is missing."""

import gzip
from pathlib import Path

import pytest

from keifu.errors import UserError
from keifu.page import kernel

ENGINE = Path(__file__).parents[2] / "src/keifu/page/engine"


def test_kernel_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "can_compile", lambda: False)
    with pytest.raises(UserError, match=r"pip install '.\[docs\]'"):
        kernel.compile_kernel(tmp_path / "kernel.wasm")
    assert not [*tmp_path.iterdir()]


def test_kernel_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel.can_compile():
        pytest.skip("no compiler for WebAssembly")
    (tmp_path / "kernel.c").write_text("int x = ;", encoding="utf-8")
    monkeypatch.setattr(kernel, "SOURCE", tmp_path / "kernel.c")
    with pytest.raises(UserError, match="cannot be compiled"):
        kernel.compile_kernel(tmp_path / "kernel.wasm")


def test_engine_is_small(tmp_path: Path) -> None:
    """All landmarks together; each file is compressed alone. No page loads them all: see test_budgets.py."""
    kernel.copy_engine(tmp_path)
    sizes = {path.name: len(gzip.compress(path.read_bytes())) for path in tmp_path.iterdir()}
    assert {path.name for path in ENGINE.glob("*.js")} <= {*sizes} and sum(sizes.values()) <= 30_000, sizes


def test_a_copy_of_the_engine_keeps_all_but_inner_comments(tmp_path: Path) -> None:
    kernel.copy_engine(tmp_path)
    for module in ENGINE.glob("*.js"):
        source, copy = (path.read_text("utf-8").splitlines() for path in (module, tmp_path / module.name))
        code = [line for line in source if not line.strip().startswith("//")]
        assert [line for line in copy if not line.startswith("//")] == code
        assert copy[0] == source[0] and copy[0].startswith("// ")


def test_no_module_of_the_engine_is_long() -> None:
    assert [path.name for path in ENGINE.iterdir() if len(path.read_text("utf-8").splitlines()) > 260] == []
