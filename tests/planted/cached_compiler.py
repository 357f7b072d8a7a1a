"""Compile C++ as `COMPILER ARGUMENT ...` does, with the object files of the same preprocessed text kept in a folder.

The native step has a file for each instruction set, and most planted bugs are in one of them: the others are compiled
once. The variable KEIFU_PLANTED_OBJECTS names the folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def compile_cached(command: list[str], kept: Path) -> int:
    """Return the exit status of a compiler's command; an object file is copied from the folder if it is there."""
    if "-c" not in command:
        return subprocess.call(command)
    at = command.index("-o")
    made, inputs = Path(command[at + 1]), command[:at] + command[at + 2 :]
    text = subprocess.run([*inputs, "-E", "-P"], capture_output=True, check=False).stdout
    flags = [word for word in inputs if not word.startswith("-I") and not word.endswith(".cpp")]
    known = kept / f"{hashlib.sha256(repr(flags).encode() + text).hexdigest()}.o"
    if not known.exists():
        if status := subprocess.call(command):
            return status
        unfinished = known.with_suffix(f".{os.getpid()}")
        shutil.copy(made, unfinished)
        unfinished.replace(known)
    shutil.copy(known, made)
    return 0


if __name__ == "__main__":
    sys.exit(compile_cached(sys.argv[1:], Path(os.environ["KEIFU_PLANTED_OBJECTS"])))
