"""The x86 instruction sets that this CPU lacks, compiled against an emulation of their instructions.

They compute what the portable set computes, in each weight format, and the bits of the sets that this CPU has.
"""

import pytest
import torch
from emulated import IS_X86, X86, emulated_library
from native_toys import toy

from keifu.native import library as native
from keifu.native.library import INSTRUCTIONS, Library
from keifu.native.model import pack

pytestmark = pytest.mark.skipif(not IS_X86, reason="the emulation is of x86 instruction sets")


def wrong_formats(library: Library, name: str) -> dict[str, float]:
    """Return the weight formats in which an instruction set differs from the portable one."""
    number = INSTRUCTIONS.index(name)
    shares = [library.call("check", number, check) for check in range(library.call("checks"))]
    return {library.call("check_name", i).decode(): share for i, share in enumerate(shares) if not 0 <= share <= 1}


@pytest.fixture(scope="module")
def lacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, list[str]]:
    """Return a library with the x86 instruction sets that this CPU lacks, and their names."""
    loaded = native._loaded()
    assert isinstance(loaded, Library), f"no native step: {loaded}"
    sets = [name for name in X86 if not loaded.call("has_instructions", INSTRUCTIONS.index(name))]
    if not sets:
        pytest.skip("this CPU has every x86 instruction set")
    return emulated_library(sets, tmp_path_factory.mktemp("emulated")), sets


def test_emulated_sets_agree_with_the_portable_one(lacked: tuple[Library, list[str]]) -> None:
    library, sets = lacked
    assert {name: wrong_formats(library, name) for name in sets} == {name: {} for name in sets}


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
def test_emulated_sets_give_the_bits_of_this_cpu(
    kind: str, weights: str, lacked: tuple[Library, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, sets = lacked
    model = toy(kind)
    tokens = torch.randint(0, 101, (1, 40), generator=torch.Generator().manual_seed(2))
    own = pack(model, weights)
    best = INSTRUCTIONS[own.library.call("instructions")]
    expected = own(tokens)
    monkeypatch.setattr(native, "_loaded", lambda: library)
    for name in sets:
        library.call("use_instructions", INSTRUCTIONS.index(name))
        own.library = library
        emulated = own(tokens)
        exact = best != "portable" and (name, weights) != ("amx", "bf16") and (best, weights) != ("amx", "bf16")
        assert torch.equal(emulated, expected) if exact else (emulated - expected).norm() < 0.05 * expected.norm(), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_emulated_set_agrees_with_the_portable_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    library = emulated_library(X86, tmp_path_factory.mktemp("all"))
    assert {name: wrong_formats(library, name) for name in X86} == {name: {} for name in X86}
