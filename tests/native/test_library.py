"""The binding's structs are the header's, field by field; the instructions are chosen as the environment says."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from keifu.errors import UserError
from keifu.native import compiler, library

STRUCTS = {
    "KeifuMatrix": library.Matrix,
    "KeifuNorm": library.Norm,
    "KeifuExpert": library.Expert,
    "KeifuLayer": library.Layer,
    "KeifuModelDescription": library.ModelDescription,
    "KeifuBatch": library.Batch,
}


def test_structs_are_the_headers(tmp_path: Path) -> None:
    fields = [(name, field[0]) for name, struct in STRUCTS.items() for field in struct._fields_]
    lines = [f'printf("{s}.{f} %zu %zu\\n", offsetof({s}, {f}), sizeof((({s}*)0)->{f}));' for s, f in fields]
    sizes = [f'printf("{s} %zu\\n", sizeof({s}));' for s in STRUCTS]
    program = f'#include <cstdio>\n#include "keifu_native.h"\nint main() {{ {"".join(lines + sizes)} }}'
    (tmp_path / "sizes.cpp").write_text(program)
    subprocess.run(["c++", f"-I{compiler.SOURCE}", "-o", tmp_path / "sizes", tmp_path / "sizes.cpp"], check=True)
    told = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [getattr(STRUCTS[s], f) for s, f in fields]
    expected = [f"{s}.{f} {each.offset} {each.size}" for (s, f), each in zip(fields, ours, strict=True)]
    assert told == [*expected, *(f"{name} {ctypes.sizeof(struct)}" for name, struct in STRUCTS.items())]


def test_the_instructions_may_be_chosen(opened: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    best = opened.call("best_instructions")
    assert opened.call("instructions") == best
    had = [which for which in range(best + 1) if opened.call("has_instructions", which)]
    assert had[0] == 0 and had[-1] == best
    for which in had:
        monkeypatch.setenv(library.VARIABLE, library.INSTRUCTIONS[which])
        assert library.open_library().call("instructions") == which
    if best + 1 < len(library.INSTRUCTIONS):
        monkeypatch.setenv(library.VARIABLE, library.INSTRUCTIONS[best + 1])
        with pytest.raises(compiler.Unavailable, match="the best that this CPU has is"):
            library.open_library()
    monkeypatch.setenv(library.VARIABLE, "off")
    with pytest.raises(compiler.Unavailable, match="KEIFU_NATIVE is off"):
        library.open_library()
    monkeypatch.setenv(library.VARIABLE, "avx")
    with pytest.raises(UserError, match="no KEIFU_NATIVE called 'avx'. Did you mean 'avx2'"):
        library.open_library()
