"""A library of native code whose x86 instruction sets are emulated, so that any x86-64 CPU can run them.

Each file of kernels is compiled without its -m flags, after the header emulation/emulation.h and the macros that the
compiler would define for these flags.
"""

import ctypes
import hashlib
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keifu.native import compiler
from keifu.native.library import INSTRUCTIONS, Library

HEADER = Path(__file__).parent / "emulation/emulation.h"
X86 = [name for name in INSTRUCTIONS if name.startswith(("avx", "amx"))]
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def emulated_library(folder: Path, source: Path = compiler.SOURCE) -> Library:
    """Compile the portable instruction set and emulations of all x86 sets into a library, and load it.

    Its variables `keifu_planted_NAME` give an instruction set an error in one weight format; -1 means none.
    """
    mask = sum(1 << INSTRUCTIONS.index(name) for name in X86)
    command = [*compiler.find_compiler(), *compiler.FLAGS, f"-DKEIFU_EMULATED={mask}", f"-I{source}"]

    def compile_one(file: Path) -> str:
        made = folder / f"{file.stem}.o"
        name = file.stem.removeprefix("kernels_")
        emulates = name in X86  # -O0: each intrinsic is a function, and to inline them takes longer than to call them
        flags = ["-O0", "-w", "-c", str(_emulating(file, name, folder))] if emulates else ["-O1", "-c", str(file)]
        subprocess.run([*command, *flags, "-o", str(made)], check=True, capture_output=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(source.glob("*.cpp"))))
    library = folder / "emulated.so"
    subprocess.run([*command, "-shared", "-o", str(library), *objects], check=True)
    return Library(str(library))


def fingerprint() -> str:
    """Return a hash of everything that the library is compiled from: sources, emulation, flags and compiler."""
    command = compiler.find_compiler()
    version = subprocess.run([*command, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + repr([command, compiler.FLAGS, X86]).encode())
    for folder in (compiler.SOURCE, HEADER.parent):
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            digest.update(file.read_bytes())
    digest.update(Path(__file__).read_bytes() + Path(compiler.__file__).read_bytes())
    return digest.hexdigest()


def plant(library: Path, name: str, weight_format: int) -> None:
    """Give an instruction set of an emulated library an error in a weight format; -1 removes it."""
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), f"keifu_planted_{name}").value = weight_format


def _emulating(file: Path, name: str, folder: Path) -> Path:
    """Write a source file that emulates the instructions of a file of kernels."""
    macros = [flag.removeprefix("-m").upper().replace("-", "_") for flag in compiler.own_flags(file, "x86_64")]
    lines = [f'#include "{HEADER}"', *(f"#undef __{macro}__\n#define __{macro}__ 1" for macro in macros)]
    lines += [f'extern "C" {{ int keifu_planted_{name} = -1; }}', f"#define KEIFU_PLANTED_ERROR keifu_planted_{name}"]
    emulating = folder / file.name
    emulating.write_text("\n".join([*lines, "#define SET_EMULATED", f'#include "{file}"', ""]))
    return emulating
