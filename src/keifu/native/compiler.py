"""Compilation of the native code by a C++ compiler, at first use or for a wheel.

This file imports only the standard library: the build of a wheel (packaging/wheel.py) loads it without the package.
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
SECONDS = 900  # the compiler's time limit; one file takes about five seconds on an idle machine
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi")
WINDOWS_FLAGS = ("-static",)  # link GCC's runtime statically: Windows does not have it
OWN_FLAGS = {  # the prefix of the first line of a file for one instruction set, by machine type
    **dict.fromkeys(("x86_64", "AMD64"), "// x86-64 flags: "),
    **dict.fromkeys(("aarch64", "arm64"), "// arm64 flags: "),
}


class Unavailable(Exception):
    """Error: this machine cannot use the native code. The message is the end of a sentence that gives the reason."""


def find_compiler() -> list[str]:
    """Return the C++ compiler as a command: the environment variable CXX, or the first installed one of `COMPILERS`."""
    words = shlex.split(os.environ.get("CXX", ""), posix=sys.platform != "win32")
    installed = [name for name in (words[:1] or COMPILERS) if shutil.which(name)]
    if not installed:
        looked = f"CXX, {words[0]}, is not there" if words else f"none of {', '.join(COMPILERS)} is there"
        raise Unavailable(f"it needs a C++ compiler, and {looked}")
    return [installed[0], *words[1:]]


def version_of(compiler: list[str]) -> str:
    """Return the compiler's output of `--version`."""
    return _run(*compiler, "--version").stdout


def source_key(*further_words: str) -> str:
    """Return a hash of the source, the flags, the system, the machine type, and the strings `further_words`."""
    key = sha256(repr((*further_words, FLAGS, sys.platform, platform.machine())).encode())
    for file in sorted(SOURCE.iterdir()):
        key.update(sha256(file.read_bytes().replace(b"\r\n", b"\n")).digest())
    return key.hexdigest()[:16]


def compile_to(library: Path, compiler: list[str]) -> None:
    """Compile all source files in parallel and link them. Raises `Unavailable` with the compiler's first error."""
    command = [*compiler, *FLAGS]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(SOURCE.glob("*.cpp"))
        objects = [str(Path(folder, source.with_suffix(".o").name)) for source in sources]
        arguments = [[*own_flags(source, platform.machine()), "-c", str(source), "-o"] for source in sources]
        list(pool.map(lambda flags, to: _checked([*command, *flags, to]), arguments, objects))
        static = WINDOWS_FLAGS if sys.platform == "win32" else ()
        _checked([*command, *static, "-shared", "-o", str(library), *objects])


def own_flags(source: Path, machine: str) -> list[str]:
    """Return the compiler flags of a file's instruction set, from its first line."""
    first = source.read_text("utf-8").split("\n", 1)[0]
    begins = OWN_FLAGS.get(machine)
    return first.removeprefix(begins).split() if begins and first.startswith(begins) else []


def _checked(command: list[str]) -> None:
    done = _run(*command)
    if done.returncode:
        causes = re.compile("error|No space left")  # for a full disk, only the linker's last line has the word "error"
        errors = [line for line in done.stderr.splitlines() if causes.search(line)] or [f"status {done.returncode}"]
        raise Unavailable(f"{command[0]} did not build it: {errors[0].strip()}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
