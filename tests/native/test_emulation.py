"""The x86 instruction sets, compiled against an emulation of their instructions, and the library's check of itself.

Sets that this CPU lacks compute what the portable set computes, in each weight format, and the bits of the sets that
this CPU has. A set with a planted error is found, named and replaced.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulated import IS_X86, X86, emulated_library, fingerprint, plant
from native_toys import toy

from keifu.native import library as native
from keifu.native.checks import Checks
from keifu.native.library import INSTRUCTIONS, Library
from keifu.native.model import pack

pytestmark = pytest.mark.skipif(not IS_X86, reason="the emulation is of x86 instruction sets")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """Return the file of a library whose x86 instruction sets are all emulated. It is compiled once for the same source
    and stored in pytest's cache."""
    folder = tmp_path_factory.mktemp("emulated")
    if not pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        return emulated_library(folder).checks._library
    stored = pytestconfig.cache.mkdir("emulated") / f"{fingerprint()}.so"
    if not stored.exists():
        for old in stored.parent.glob("*.so"):
            old.unlink()
        built = emulated_library(folder).checks._library
        part = stored.with_suffix(".part")
        shutil.copy(built, part)
        part.replace(stored)
        return built
    return Path(shutil.copy(stored, folder / "emulated.so"))


@pytest.fixture
def emulated(shared: Path) -> Iterator[Library]:
    """Return the emulated library, without planted errors and stored results."""
    library = Library(str(shared))
    library.call("use_threads", 1)
    shared.with_name("emulated.checks.json").unlink(missing_ok=True)
    yield library
    for name in X86:
        plant(shared, name, -1)


def lacked() -> list[str]:
    """Return the x86 instruction sets that this CPU lacks."""
    loaded = native._loaded()
    had = isinstance(loaded, Library) and [n for n in X86 if loaded.call("has_instructions", INSTRUCTIONS.index(n))]
    return [name for name in X86 if not had or name not in had]


def wrong_formats(library: Library, name: str) -> dict[str, float]:
    """Return the weight formats in which an instruction set differs from the portable one."""
    number = INSTRUCTIONS.index(name)
    shares = [library.call("check", number, check) for check in range(library.call("checks"))]
    return {library.call("check_name", i).decode(): share for i, share in enumerate(shares) if not 0 <= share <= 1}


def test_emulated_sets_agree_with_the_portable_one(
    emulated: Library, record_property: Callable[[str, object], None]
) -> None:
    sets = lacked()
    for name in sets:
        record_property("emulated", name)
    assert {name: wrong_formats(emulated, name) for name in sets} == {name: {} for name in sets}


@pytest.mark.slow
@pytest.mark.parametrize("name", X86)
def test_an_emulated_set_agrees_with_the_portable_one(name: str, emulated: Library) -> None:
    assert wrong_formats(emulated, name) == {}


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
def test_emulated_sets_give_the_bits_of_this_cpu(kind: str, weights: str, emulated: Library) -> None:
    packed = pack(toy(kind), weights)
    tokens = torch.randint(0, 101, (1, 40), generator=torch.Generator().manual_seed(2))
    best = INSTRUCTIONS[packed.library.call("instructions")]
    expected = packed(tokens)
    packed.library = emulated
    for name in lacked():
        emulated.call("use_instructions", INSTRUCTIONS.index(name))
        logits = packed(tokens)
        exact = best != "portable" and (weights != "bf16" or "amx" not in (best, name))
        assert torch.equal(logits, expected) if exact else (logits - expected).norm() < 0.05 * expected.norm(), name


@pytest.mark.parametrize("name", X86)
def test_a_set_with_an_error_is_replaced_by_the_next(
    name: str, emulated: Library, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other sets have passed already, as if their results were stored."""
    number = INSTRUCTIONS.index(name)
    next_best = INSTRUCTIONS[number - 1]
    plant(emulated.checks._library, name, native.BF16)
    emulated.checks._wrong = dict.fromkeys({*range(6)} - {number}, "")
    emulated._functions["best_instructions"] = lambda: number
    monkeypatch.delenv(native.VARIABLE, raising=False)
    model = toy("qwen3")
    tokens = torch.arange(20)[None]
    expected = pack(model, "f32")(tokens)
    monkeypatch.setattr(native, "_loaded", lambda: emulated)
    logits = pack(model, "bf16")(tokens)
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert INSTRUCTIONS[emulated.call("instructions")] == next_best
    warning = f"the native step computes wrong numbers of bf16 weights with {name}. keifu uses {next_best}."
    native.open_library()
    said = capfd.readouterr().err
    assert said.count("Warning") == 1 and warning in said
    stored = json.loads(emulated.checks._library.with_name("emulated.checks.json").read_text())
    assert list(stored.values()) == [{name: "bf16"}]
    monkeypatch.setenv(native.VARIABLE, name)
    assert native.open_library().call("instructions") == number
    assert f"with {name}. keifu uses {name} because KEIFU_NATIVE names it." in capfd.readouterr().err


def results(calls: list[int], library: Path) -> Checks:
    """Return the checks of a library with one instruction set besides the portable one, and count their runs."""

    def call(function: str, *arguments: int) -> float | bytes:
        if function == "check":
            calls.append(arguments[1])
            return 2.0
        return {"checks": 1, "check_name": b"int8", "has_instructions": 1}[function]

    return Checks(call, library, INSTRUCTIONS)


@pytest.mark.parametrize("place", ["beside", "cache", "nowhere"])
def test_the_result_is_stored(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    library = tmp_path / "built/keifu.so"
    library.parent.mkdir()
    library.write_bytes(b"library")
    cache = tmp_path / "cache"
    monkeypatch.setenv("KEIFU_CACHE", str(cache))
    if place != "beside":  # as in a folder that cannot be written, also by root
        (library.parent / "keifu.checks.json").mkdir()
    if place == "nowhere":
        cache.write_text("")
    for _ in range(2):
        assert results(calls, library).usable(1, is_forced=False) == 0
    assert len(calls) == (2 if place == "nowhere" else 1)
    library.write_bytes(b"another library")
    assert results(calls, library).wrong_format(1) == "int8" and len(calls) == (3 if place == "nowhere" else 2)


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_result_is_not_used(damage: str, tmp_path: Path) -> None:
    calls: list[int] = []
    library = tmp_path / "keifu.so"
    library.write_bytes(b"library")
    library.with_name("keifu.checks.json").write_text(damage)
    assert results(calls, library).wrong_format(1) == "int8" and calls


def test_the_check_takes_half_a_second(opened: Library) -> None:
    """Only computing counts, because other processes can have the CPU meanwhile."""
    import time

    start = time.process_time()
    for check in range(opened.call("checks")):
        assert 0 <= opened.call("check", opened.call("best_instructions"), check) <= 1
    assert time.process_time() - start < 0.5 * max(1, opened.call("threads"))
