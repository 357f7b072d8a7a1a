"""The check of a library on this CPU: does an instruction set compute what the portable one computes?

The library does it in C++ (source/check.cpp): small models with known numbers, one for each weight format. The results
are stored next to the library, or in the cache if its folder is read-only, and hold for this library and this CPU.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from keifu import files, folders
from keifu.errors import UserError

PORTABLE = 0
CPU_LINES = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")  # of Linux's /proc/cpuinfo


class Checks:
    """Results of the checks of one library, by the number of the instruction set.

    call: a function of the library by its name. library: its file. sets: the names of the instruction sets.
    """

    def __init__(self, call: Callable[..., Any], library: Path, sets: tuple[str, ...]):
        self._call, self._library, self._sets = call, library, sets
        self._wrong: dict[int, str] = {PORTABLE: ""}
        self._warned: set[tuple[int, int]] = set()

    def usable(self, which: int, is_forced: bool) -> int:
        """Return the instruction set to use: `which`, or the next best one on this CPU that passes its check.

        A forced set is used although it fails. A set that fails causes one warning, which names it and the format.
        """
        index, wrong = which, []
        while failed := self.wrong_format(index):
            wrong.append(f"{failed} weights with {self._sets[index]}")
            if is_forced:
                break
            index = next(n for n in range(index - 1, -1, -1) if self._call("has_instructions", n))
        if wrong and (which, index) not in self._warned:
            self._warned.add((which, index))
            reason = " because KEIFU_NATIVE names it" if is_forced else ""
            message = f"computes wrong numbers of {' and '.join(wrong)}. keifu uses {self._sets[index]}{reason}."
            print(f"Warning: on this CPU the native step {message}", file=sys.stderr, flush=True)
        return index

    def wrong_format(self, which: int) -> str:
        """Return the first weight format in which an instruction set differs from the portable one; "" if none does."""
        if which not in self._wrong:
            key = _key(self._library)
            stored = _read(self._places(), key).get(self._sets[which])
            self._wrong[which] = self._run(which) if stored is None else stored
            if stored is None:
                self._store(key, which)
        return self._wrong[which]

    def _run(self, which: int) -> str:
        for check in range(self._call("checks")):
            if not 0 <= self._call("check", which, check) <= 1:
                return self._call("check_name", check).decode()
        return ""

    def _places(self) -> list[Path]:
        name = f"{self._library.stem}.checks.json"
        return [self._library.with_name(name), folders.cache() / "native" / name]

    def _store(self, key: str, which: int) -> None:
        for place in self._places():
            with suppress(OSError, UserError):  # read-only or full: the next place, or the check is repeated
                results = _read([place], key) | {self._sets[which]: self._wrong[which]}
                files.write_atomic(place, json.dumps({key: results}))
                return


def _read(places: list[Path], key: str) -> dict[str, str]:
    """Return the stored results of a library and CPU, by instruction set: the failed format, or "" if it passed."""
    for place in places:
        with suppress(OSError, ValueError):
            stored = json.loads(place.read_text("utf-8"))
            results = stored.get(key) if isinstance(stored, dict) else None
            if isinstance(results, dict):
                return {str(name): failed for name, failed in results.items() if isinstance(failed, str)}
    return {}


def _key(library: Path) -> str:
    """Return a hash of the library's bytes and this CPU."""
    windows = os.environ.get("PROCESSOR_IDENTIFIER", "")
    lines = [platform.machine(), platform.release(), windows, files.sha256(library)]
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
        lines += [line for line in first.splitlines() if line.startswith(CPU_LINES)]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]
