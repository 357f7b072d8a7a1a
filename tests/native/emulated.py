"""A library of native code whose x86 instruction sets are emulated, so that any x86-64 CPU can run them.

Each file of kernels is compiled without its -m flags, after the header emulation/emulation.h and the macros that the
compiler would define for these flags.
"""

import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keifu.native import compiler
from keifu.native.library import INSTRUCTIONS, Library

HEADER = Path(__file__).parent / "emulation/emulation.h"
X86 = [name for name in INSTRUCTIONS if name.startswith(("avx", "amx"))]
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def emulated_library(sets: list[str], folder: Path, source: Path = compiler.SOURCE, planted: str = "") -> Library:
    """Compile the portable instruction set and emulations of `sets` into a library, and load it.

    planted: definitions by which the emulated files, and no others, contain an error.
    """
    mask = sum(1 << INSTRUCTIONS.index(name) for name in sets)
    command = [*compiler.find_compiler(), *compiler.FLAGS, f"-DKEIFU_EMULATED={mask}", f"-I{source}"]

    def compile_one(file: Path) -> str:
        made = folder / f"{file.stem}.o"
        flags = ["-c", str(file)]
        if file.stem.removeprefix("kernels_") in sets:
            flags = ["-O1", "-w", *planted.split(), "-c", str(_emulating(file, folder))]
        subprocess.run([*command, *flags, "-o", str(made)], check=True, capture_output=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(source.glob("*.cpp"))))
    library = folder / "emulated.so"
    subprocess.run([*command, "-shared", "-o", str(library), *objects], check=True)
    return Library(str(library))


def _emulating(file: Path, folder: Path) -> Path:
    """Write a source file that emulates the instructions of a file of kernels."""
    names = [flag.removeprefix("-m").upper().replace("-", "_") for flag in compiler.own_flags(file, "x86_64")]
    lines = [f'#include "{HEADER}"', *(f"#undef __{name}__\n#define __{name}__ 1" for name in names)]
    emulating = folder / file.name
    emulating.write_text("\n".join([*lines, "#define SET_EMULATED", f'#include "{file}"', ""]))
    return emulating
