"""Lets the tests of the native step import what they share, and sets the instructions that a test asks for."""

import platform
import sys
from pathlib import Path

import pytest

from keifu.native import library
from keifu.native.build import Unavailable

sys.path.insert(0, str(Path(__file__).parent))


ARM = platform.machine() in ("aarch64", "arm64")
OF_THIS_MACHINE = [name for name in library.INSTRUCTIONS if name == "portable" or name.startswith("neon") == ARM]


@pytest.fixture(params=OF_THIS_MACHINE)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this CPU has, in use."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    try:
        library.open_library()
    except Unavailable as reason:
        pytest.skip(f"no native step with {request.param}: {reason}")
    return request.param
