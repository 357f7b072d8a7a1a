"""The engine of the page as browsers load it: modules without their inner comments, and a kernel for WebAssembly.

The compiler of the `ziglang` wheel compiles the kernel; there is no compiled file in the repository. Where the compiler
is missing, the engine computes in plain JavaScript.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

from keifu.errors import UserError, install

PAGE = Path(__file__).parent
ENGINE = PAGE / "engine"
SOURCE = ENGINE / "kernel.c"
TARGET = ("-target", "wasm32-freestanding", "-Os", "-msimd128", "-mbulk-memory", "-nostdlib", "-std=c11", "-Wall")
LINK = ("--no-entry", "--import-memory", "--strip-all", "-z,stack-size=65536", "--export=__heap_base")


HEAD = re.compile(r"(?://.*\n)*")  # the comment at the top of a module
COMMENT = re.compile(r"(?m)^ *//.*\n")  # lines that are comments


def copy_page(out: Path) -> None:
    """Copy the live elements and the engine into the folder `out`, with the kernel if it can be compiled."""
    shutil.copytree(PAGE / "live", out / "live", dirs_exist_ok=True)
    copy_engine(out / "engine")


def copy_engine(out: Path) -> None:
    """Copy the engine into the folder `out`, with the kernel if it can be compiled. Comments stay in the source; a
    copy keeps the one at the top of each module."""
    out.mkdir(parents=True, exist_ok=True)
    for module in ENGINE.glob("*.js"):
        text = module.read_text(encoding="utf-8")
        end = len(HEAD.match(text)[0])  # pyright: ignore[reportOptionalSubscript] (it also matches nothing)
        (out / module.name).write_text(text[:end] + COMMENT.sub("", text[end:]), encoding="utf-8")
    if can_compile():
        compile_kernel(out / "kernel.wasm")


def can_compile() -> bool:
    """Return whether the compiler is installed."""
    return importlib.util.find_spec("ziglang") is not None


def compile_kernel(out: Path) -> Path:
    """Compile kernel.c to the file `out` and return it. Raises `UserError` if the compiler is missing or fails."""
    if not can_compile():
        raise UserError(f"The compiler for WebAssembly is missing: {install('docs')} installs it.")
    command = [sys.executable, "-m", "ziglang", "cc", *TARGET, *(f"-Wl,{option}" for option in LINK)]
    done = subprocess.run([*command, "-o", str(out), str(SOURCE)], capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        raise UserError(f"kernel.c cannot be compiled: {done.stderr.strip()[:400]}")
    return out
