"""The native step made from its source by a C++ compiler, at first use or in a wheel.

Imports the standard library only: the build of a wheel (packaging/wheel.py) loads this file without the package.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCE = Path(__file__).parent / "source"
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 900  # after which a compiler is given up; a file takes about five on a quiet machine
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi")
WINDOWS_FLAGS = ("-static",)  # a library of its own runtime: Windows has none of GCC's
OWN_FLAGS = {  # what the first line of a file for one instruction set begins with, by the kind of machine
    **dict.fromkeys(("x86_64", "AMD64"), "// x86-64 flags: "),
    **dict.fromkeys(("aarch64", "arm64"), "// arm64 flags: "),
}


class Unavailable(Exception):
    """There is no native step on this machine; the message says why, as the end of a sentence."""


def find_compiler() -> list[str]:
    """Return the command of the machine's C++ compiler: CXX, or the first of the usual names."""
    named = shlex.split(os.environ.get("CXX", ""), posix=sys.platform != "win32")
    found = [name for name in (named[:1] or COMPILERS) if shutil.which(name)]
    if not found:
        looked = f"CXX, {named[0]}, is not there" if named else f"none of {', '.join(COMPILERS)} is there"
        raise Unavailable(f"it needs a C++ compiler, and {looked}")
    return [found[0], *named[1:]]


def version_of(compiler: list[str]) -> str:
    """Return the version text of a compiler."""
    return _run(*compiler, "--version").stdout


def source_key(*more: str) -> str:
    """Return a hash of the source, the flags, the system and the kind of machine, and of `more`."""
    key = sha256(repr((*more, FLAGS, sys.platform, platform.machine())).encode())
    for file in sorted(SOURCE.iterdir()):
        key.update(sha256(file.read_bytes().replace(b"\r\n", b"\n")).digest())
    return key.hexdigest()[:16]


def compile_to(library: Path, compiler: list[str]) -> None:
    """Compile the files at the same time and link them; raises `Unavailable` with the compiler's first error."""
    command = [*compiler, *FLAGS]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(SOURCE.glob("*.cpp"))
        objects = [str(Path(folder, source.with_suffix(".o").name)) for source in sources]
        own = [[*own_flags(source, platform.machine()), "-c", str(source), "-o"] for source in sources]
        list(pool.map(lambda flags, to: _checked([*command, *flags, to]), own, objects))
        static = WINDOWS_FLAGS if sys.platform == "win32" else ()
        _checked([*command, *static, "-shared", "-o", str(library), *objects])


def own_flags(source: Path, machine: str) -> list[str]:
    """Return the compiler flags of the instruction set that a file is for."""
    first = source.read_text("utf-8").split("\n", 1)[0]
    begins = OWN_FLAGS.get(machine)
    return first.removeprefix(begins).split() if begins and first.startswith(begins) else []


def _checked(command: list[str]) -> None:
    done = _run(*command)
    if done.returncode:
        causes = re.compile("error|No space left")  # of a full disk the linker says "error" in its last line alone
        said = [line for line in done.stderr.splitlines() if causes.search(line)] or [f"status {done.returncode}"]
        raise Unavailable(f"{command[0]} did not build it: {said[0].strip()}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
