"""The library of the native code: taken from the wheel, or compiled at first use and cached.

One library has code for all instruction sets and chooses among them at run time. Its file name is a hash of the source,
the flags, the system and the machine type (in the cache also of the compiler's version), so a change of any of them
causes a new build. A file next to it has the hash of its bytes: a damaged library is detected and built again.
"""

import sys
from pathlib import Path

from keifu import files, folders, locks
from keifu.native import compiler
from keifu.native.compiler import Unavailable

PREBUILT = Path(__file__).parent / "prebuilt"  # only in a wheel; packaging/wheel.py creates it

__all__ = ["PREBUILT", "Unavailable", "build", "prebuilt"]


def prebuilt() -> Path | None:
    """Return the wheel's library if it exists, is undamaged and matches this source; otherwise None."""
    library = PREBUILT / f"{compiler.source_key()}.so"
    return library if _is_whole(library) else None


def build() -> Path:
    """Return the cached library. Compile it if the cache has no undamaged one.

    One process compiles; others wait for it. Raises `Unavailable` if there is no compiler, if compilation fails, or if
    the cache cannot be written.
    """
    command = compiler.find_compiler()
    library = folders.cache() / "native" / f"{compiler.source_key(compiler.version_of(command))}.so"
    try:
        with locks.locked(library):
            if not _is_whole(library):
                print("Building the native step, once: some seconds.", file=sys.stderr, flush=True)
                with files.replacing(library) as temporary:
                    compiler.compile_to(temporary, command)
                files.write_atomic(library.with_suffix(".sha256"), files.sha256(library))
    except OSError as error:
        raise Unavailable(f"{library.parent} cannot be written ({error.strerror})") from error
    return library


def _is_whole(library: Path) -> bool:
    """Return whether the library exists and its bytes have the hash that was stored when it was built."""
    digest = library.with_suffix(".sha256")
    return library.exists() and digest.exists() and digest.read_text() == files.sha256(library)
