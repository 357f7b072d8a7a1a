"""The build of the native step: once, kept, built again where it was damaged, and a sentence where it cannot be."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keifu import files
from keifu.native import compiler, library as build

SMALL = 'extern "C" int answer() { return 42; }'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a small source, an empty cache and the machine's compiler."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "small.cpp").write_text(SMALL)
    (source / "small.h").write_text("")
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def test_built_once_and_said_in_one_line(capfd) -> None:
    library = build.build()
    assert answer(library) == 42
    assert capfd.readouterr().err.count("\n") == 1
    before = library.stat()
    assert build.build() == library and library.stat() == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("changed", ["small.cpp", "small.h"])
def test_another_source_is_another_library(changed: str) -> None:
    first = build.build()
    (compiler.SOURCE / changed).write_text(SMALL.replace("42", "43") if changed.endswith("cpp") else "// more")
    second = build.build()
    assert second != first and answer(second) == (43 if changed.endswith("cpp") else 42)


@pytest.mark.parametrize("damage", ["cut", "altered", "unmarked"])
def test_a_damaged_library_is_built_again(damage: str, capfd) -> None:
    library = build.build()
    whole = library.read_bytes()
    if damage == "unmarked":
        library.with_suffix(".sha256").unlink()
    else:
        library.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:-9] + b"x" * 9)
    capfd.readouterr()
    assert answer(build.build()) == 42
    assert "Building" in capfd.readouterr().err


def test_two_processes_build_once(tmp_path: Path) -> None:
    program = f"""
import pathlib; from keifu.native import compiler
from keifu.native import library as build
compiler.SOURCE = pathlib.Path({str(compiler.SOURCE)!r}); print(build.build())
"""
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ) for _ in range(3)]
    outputs = [process.communicate() for process in started]
    assert len({path for path, _ in outputs}) == 1 and all(path.strip() for path, _ in outputs)
    assert sum(said.count("Building") for _, said in outputs) == 1


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        build.Unavailable, match=r"needs a C\+\+ compiler, and none of c\+\+, g\+\+, clang\+\+ is there"
    ):
        build.build()
    monkeypatch.setenv("CXX", "nowhere++ -O1")
    with pytest.raises(build.Unavailable, match=r"CXX, nowhere\+\+, is not there"):
        build.build()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (compiler.SOURCE / "small.cpp").write_text("int wrong(")
    with pytest.raises(build.Unavailable, match="did not build it: .*error"):
        build.build()
    assert not list((tmp_path / "cache/native").glob("*.so"))
    broken = tmp_path / "broken++"
    broken.write_text("no program")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unavailable, match="does not run"):
        build.build()
    lines = "ld: final link failed: No space left on device", "collect2: error: ld returned 1 exit status"
    broken.write_text("#!/bin/sh\n" + "".join(f"echo {line} >&2\n" for line in lines) + "exit 1\n")
    with pytest.raises(build.Unavailable, match="did not build it: ld: final link failed: No space left on device"):
        build.build()


def test_cxx_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiler.SOURCE / "small.cpp").write_text(SMALL.replace("42", "MEANING"))
    monkeypatch.setenv("CXX", "c++ -DMEANING=7")
    assert answer(build.build()) == 7


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable, match="cannot be written"):
        build.build()


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the library of a wheel, and hide the compiler."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    library = folder / f"{compiler.source_key()}.so"
    compiler.compile_to(library, compiler.find_compiler())
    library.with_suffix(".sha256").write_text(files.sha256(library))
    monkeypatch.setattr(build, "PREBUILT", folder)
    monkeypatch.setenv("PATH", "")
    return library


def test_the_library_of_a_wheel_needs_no_compiler(shipped: Path) -> None:
    assert build.prebuilt() == shipped and answer(shipped) == 42


@pytest.mark.parametrize("change", ["another source", "damaged", "unmarked"])
def test_the_library_of_a_wheel_must_match(shipped: Path, change: str) -> None:
    if change == "another source":
        (compiler.SOURCE / "small.h").write_text("// more")
    elif change == "damaged":
        shipped.write_bytes(shipped.read_bytes()[:-9] + b"x" * 9)
    else:
        shipped.with_suffix(".sha256").unlink()
    assert build.prebuilt() is None


def test_a_library_that_does_not_load_is_compiled(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped.write_bytes(b"no library")
    shipped.with_suffix(".sha256").write_text(files.sha256(shipped))
    assert build.prebuilt() == shipped
    monkeypatch.setattr(build, "build", lambda: tried.append(1) or shipped)
    tried: list[int] = []
    assert isinstance(build._loaded.__wrapped__(), build.Unavailable) and tried == [1]
