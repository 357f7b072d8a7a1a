"""The native step that MinGW builds for Windows gives the bits of AVX2, in Wine.

Only float32 may differ: its rotary cosines and sines are those of the system's C library.
"""

import shutil
from pathlib import Path

import pytest
from test_arm import FORMATS, build, run

MINGW = "x86_64-w64-mingw32-g++-posix"
WINE = next((path for path in (shutil.which("wine64"), "/usr/lib/wine/wine64") if path and Path(path).exists()), None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which(MINGW), reason="there is no MinGW")
@pytest.mark.skipif(not WINE, reason="there is no Wine")
def test_windows_gives_the_bits_of_avx2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run(build("g++", "x86_64", tmp_path / "x86"))
    if "avx2" not in here:
        pytest.skip("this machine has no AVX2")
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    monkeypatch.setenv("WINEDEBUG", "-all")
    there = run(str(WINE), build(MINGW, "x86_64", tmp_path / "windows"))
    assert there.keys() <= here.keys() and "avx2" in there
    for name, logits in there.items():
        assert len(logits) == FORMATS, name
        differ = {form for form, bits in logits.items() if bits != here[name][form]}
        assert differ <= {"f32"}, name
