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
    parts = [gzip.compress(path.read_bytes()) for path in sorted(ENGINE.glob("*.js"))]
    if kernel.can_compile():
        parts.append(gzip.compress(kernel.compile_kernel(tmp_path / "kernel.wasm").read_bytes()))
    assert sum(map(len, parts)) <= 32_000


def test_no_module_of_the_engine_is_long() -> None:
    assert [path.name for path in ENGINE.iterdir() if len(path.read_text("utf-8").splitlines()) > 260] == []
