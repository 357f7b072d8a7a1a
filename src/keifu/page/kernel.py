"""The engine's kernel, compiled for WebAssembly by the compiler of the `ziglang` wheel.

There is no compiled file in the repository. Where the compiler is missing, the engine computes in plain JavaScript.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from keifu.errors import UserError, install

ENGINE = Path(__file__).parent / "engine"
SOURCE = ENGINE / "kernel.c"
TARGET = ("-target", "wasm32-freestanding", "-Os", "-msimd128", "-mbulk-memory", "-nostdlib", "-std=c11", "-Wall")
LINK = ("--no-entry", "--import-memory", "--strip-all", "-z,stack-size=65536", "--export=__heap_base")


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
