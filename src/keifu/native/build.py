"""The build of the native step: by the machine's own C++ compiler, at first use, into the cache.

A library is built for one instruction set. Its name in the cache has a hash of the source, the compiler's version and
the flags, so that a change of any of them builds anew; beside it stands a hash of its bytes, so that a damaged one is
noticed and built again.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache as once
from hashlib import sha256
from pathlib import Path

from keifu import files
from keifu.errors import unknown

VARIABLE = "KEIFU_NATIVE"
SOURCE = Path(__file__).parent / "source"
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # after which a compiler is given up
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16")
INSTRUCTIONS = {  # of each set, the best first: what the compiler may use, and the CPU must have
    "amx": (*_AVX512, "amx-tile", "amx-int8", "amx-bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}


class Unavailable(Exception):
    """There is no native step on this machine; the message says why, as the end of a sentence."""


def instruction_sets(flags: str | None = None) -> list[str]:
    """The sets that this CPU has, the best first; `flags` are the system's words for what it can do."""
    have = set(re.sub("[-_]", "", _cpu_flags() if flags is None else flags).lower().split())
    return [name for name, needed in INSTRUCTIONS.items() if {each.replace("-", "") for each in needed} <= have]


@once
def _cpu_flags() -> str:
    """What the CPU can do, as the system tells it; empty where it does not, or is not an x86."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ""
    told = Path("/proc/cpuinfo")
    if told.exists():
        return next((line for line in told.read_text().splitlines() if line.startswith("flags")), "")
    return _run("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").stdout


def usable_sets() -> list[str]:
    """The instruction sets to try, the best first: KEIFU_NATIVE's alone, or all that this CPU has.

    Raises `Unavailable` where there is to be no native step, or the CPU lacks what was asked for; a word that is none
    of them is a `UserError`.
    """
    wanted, here = os.environ.get(VARIABLE, ""), instruction_sets()
    if not wanted:
        return here
    if wanted == "off":
        raise Unavailable(f"{VARIABLE} is off")
    if wanted not in INSTRUCTIONS:
        raise unknown(f"{VARIABLE} called", wanted, [*INSTRUCTIONS, "off"])
    if wanted not in here:
        raise Unavailable(f"{VARIABLE} is {wanted}, and this CPU has {', '.join(here)} alone")
    return [wanted]


def build(instruction_set: str) -> Path:
    """The library for this set, compiled now where the cache has none that is whole.

    One process compiles, others that ask at the same time wait for it. Raises `Unavailable` without a compiler, where
    it fails, and where the cache cannot be written.
    """
    compiler = _compiler()
    flags = [*FLAGS, *(f"-m{each}" for each in INSTRUCTIONS[instruction_set])]
    key = sha256(repr((_run(*compiler, "--version").stdout, flags)).encode())
    for file in sorted(SOURCE.iterdir()):
        key.update(sha256(file.read_bytes()).digest())
    library = files.cache() / "native" / f"{instruction_set}-{key.hexdigest()[:16]}.so"
    try:
        with files.locked(library):
            if not _is_whole(library):
                print(
                    f"Building the native step for {instruction_set}, once: some seconds.", file=sys.stderr, flush=True
                )
                _compile([*compiler, *flags], library)
    except OSError as error:
        raise Unavailable(f"{library.parent} cannot be written ({error.strerror})") from error
    return library


def _compiler() -> list[str]:
    """The command of the machine's C++ compiler: CXX, or the first of the usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [name for name in (named[:1] or COMPILERS) if shutil.which(name)]
    if not found:
        looked = f"CXX, {named[0]}, is not there" if named else f"none of {', '.join(COMPILERS)} is there"
        raise Unavailable(f"it needs a C++ compiler, and {looked}")
    return [found[0], *named[1:]]


def _is_whole(library: Path) -> bool:
    """Whether the library is there, with the bytes that it was built with."""
    beside = library.with_suffix(".sha256")
    return library.exists() and beside.exists() and beside.read_text() == files.sha256(library)


def _compile(command: list[str], library: Path) -> None:
    with files.replacing(library) as temporary:
        done = _run(*command, "-o", str(temporary), *map(str, sorted(SOURCE.glob("*.cpp"))))
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
            raise Unavailable(f"{command[0]} did not build it: {said[0].strip()}")
    files.write_atomic(library.with_suffix(".sha256"), files.sha256(library))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
