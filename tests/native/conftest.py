"""Lets the tests of the native step import what they share, and sets the instructions that a test asks for."""

import sys
from pathlib import Path

import pytest

from keifu.native import library
from keifu.native.compiler import Unavailable

sys.path.insert(0, str(Path(__file__).parent))

from native_toys import OF_THIS_MACHINE  # noqa: E402 (the path must be set before)


@pytest.fixture(params=OF_THIS_MACHINE)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return each instruction set that this CPU has, in use."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    try:
        library.open_library()
    except Unavailable as reason:
        pytest.skip(f"no native step with {request.param}: {reason}")
    request.node.user_properties.append(("native", request.param))
    if "weights" in request.node.callspec.params:
        request.node.user_properties.append(("weights", request.node.callspec.params["weights"]))
    return request.param
