"""The library of the native step: from the wheel, or compiled at first use into the cache.

One library serves all instruction sets and chooses among them when it runs. Its name is a hash of the source, the
flags, the system and the kind of machine, in the cache also of the compiler's version, so that a change of any of them
builds anew. A hash of its bytes is in a file next to it: a damaged library is noticed, and built again.
"""

import sys
from pathlib import Path

from keifu import files, folders, locks
from keifu.native import compiler
from keifu.native.compiler import Unavailable

PREBUILT = Path(__file__).parent / "prebuilt"  # of a wheel; packaging/wheel.py makes it

__all__ = ["PREBUILT", "Unavailable", "build", "prebuilt"]


def prebuilt() -> Path | None:
    """Return the wheel's library if there is one, whole and of this source."""
    library = PREBUILT / f"{compiler.source_key()}.so"
    return library if _is_whole(library) else None


def build() -> Path:
    """Return the library of the cache, compiled now if the cache has no complete one.

    One process compiles, others that ask at the same time wait for it. Raises `Unavailable` without a compiler, if it
    fails, and if the cache cannot be written.
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
    beside = library.with_suffix(".sha256")
    return library.exists() and beside.exists() and beside.read_text() == files.sha256(library)
