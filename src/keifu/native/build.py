"""The build of the native step: by the machine's own C++ compiler, at first use, into the cache.

One library serves all instruction sets and chooses among them when it runs. Its name in the cache is a hash of the
source, the compiler's version, the flags and the kind of machine, so that a change of any of them builds anew; beside
it stands a hash of its bytes, so that a damaged one is noticed and built again.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from keifu import files

SOURCE = Path(__file__).parent / "source"
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # after which a compiler is given up
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi")
OWN_FLAGS = "// x86-64 flags: "  # what the first line of a file for one instruction set begins with


class Unavailable(Exception):
    """There is no native step on this machine; the message says why, as the end of a sentence."""


def build() -> Path:
    """Return the library, compiled now if the cache has no complete one.

    One process compiles, others that ask at the same time wait for it. Raises `Unavailable` without a compiler, where
    it fails, and where the cache cannot be written.
    """
    compiler = _compiler()
    key = sha256(repr((_run(*compiler, "--version").stdout, FLAGS, platform.machine())).encode())
    for file in sorted(SOURCE.iterdir()):
        key.update(sha256(file.read_bytes()).digest())
    library = files.cache() / "native" / f"{key.hexdigest()[:16]}.so"
    try:
        with files.locked(library):
            if not _is_whole(library):
                print("Building the native step, once: some seconds.", file=sys.stderr, flush=True)
                _compile([*compiler, *FLAGS], library)
    except OSError as error:
        raise Unavailable(f"{library.parent} cannot be written ({error.strerror})") from error
    return library


def _compiler() -> list[str]:
    """Return the command of the machine's C++ compiler: CXX, or the first of the usual names."""
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
    """Compile the files in parallel and link them."""
    with files.replacing(library) as temporary, TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        sources = sorted(SOURCE.glob("*.cpp"))
        objects = [str(Path(folder, source.with_suffix(".o").name)) for source in sources]
        own = [[*_own_flags(source), "-c", str(source), "-o"] for source in sources]
        list(pool.map(lambda flags, to: _checked([*command, *flags, to]), own, objects))
        _checked([*command, "-shared", "-o", str(temporary), *objects])
    files.write_atomic(library.with_suffix(".sha256"), files.sha256(library))


def _own_flags(source: Path) -> list[str]:
    """Return the compiler flags of the instruction set that a file is for."""
    first = source.read_text("utf-8").split("\n", 1)[0]
    asked = first.startswith(OWN_FLAGS) and platform.machine() in ("x86_64", "AMD64")
    return first.removeprefix(OWN_FLAGS).split() if asked else []


def _checked(command: list[str]) -> None:
    done = _run(*command)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
        raise Unavailable(f"{command[0]} did not build it: {said[0].strip()}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
