"""Plant each bug of the index in a copy of the checkout, run the test that must fail, and report the bugs that live.

    python tests/planted/run.py [PART OF A NAME ...] [--jobs N]

The index is the `*.toml` files of this folder. A row has the name of a bug, its file below src/keifu, the old and the
new text, and the test. A bug whose old text is no longer in the file, but once in another file of the same kind, moves
there. A row of the native step may name the one instruction set that has the bug, so that only this one is compiled.
The exit status is 1 if a bug lives, no longer fits or has no test that runs.
"""

import argparse
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from keifu.native import compiler

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "native/source"  # C++, below src/keifu
COPIED = ("src", "tests", "pyproject.toml")  # everything else in the copy is a link
LONGEST = 240.0  # seconds of a test, with the compilation of the native step on a quiet machine
NO_END = 1000  # no exit status of a process
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE)  # of a native step with a bug
# by pytest's exit status; with the others the test did not run
OUTCOMES = {0: "LIVES", 1: "died", NO_END: "no end", **{-number: "died" for number in CRASHES}}


class Bug(NamedTuple):
    """A bug: `old` becomes `new` in a file below src/keifu, and the pytest node `test` fails.

    instructions: the instruction set of the native step that has the bug; "": all that include the file.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    instructions: str = ""


def read_index(folder: Path) -> list[Bug]:
    """Return the bugs of all index files of a folder."""
    tables = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))]
    return [Bug(name, **row) for table in tables for name, row in table.items()]


def find(bug: Bug, package: Path) -> Path | None:
    """Return the file that has the old text of a bug exactly once: its own, or the only other one of the same kind."""
    own = package / bug.file
    if own.is_file() and own.read_text(encoding="utf-8").count(bug.old) == 1:
        return own
    others = [path for path in sorted(package.rglob(f"*{own.suffix}")) if path != own]
    fitting = [path for path in others if path.read_text(encoding="utf-8").count(bug.old) == 1]
    return fitting[0] if len(fitting) == 1 else None


class Copy:
    """A copy of the checkout, in which bugs are planted one after the other. objects: the folder of compiled C++."""

    def __init__(self, folder: Path, objects: Path) -> None:
        self.folder, self.package = folder, folder / "src" / "keifu"
        self.environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
        paths = os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.environment |= {"PYTHONPATH": paths, "KEIFU_PLANTED_OBJECTS": str(objects)}
        self.edits = 0
        for path in ROOT.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy(path, folder)
            elif not path.name.startswith("."):
                (folder / path.name).symlink_to(path)

    def run(self, tests: Sequence[str], native: bool = False) -> tuple[int, str]:
        """Return pytest's exit status (or NO_END) and output for some tests. native: whether they compile
        the native step of this copy, into a cache of its own."""
        options = ("-x", "--no-header", "-p", "no:cacheprovider", "-m", "not gpu")
        command = [sys.executable, "-m", "pytest", *options, *tests]
        environment = self.environment | (self.native_environment() if native else {})
        limit = LONGEST * max(1, len(tests) / 4)
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return NO_END, f"no end after {limit:.0f} s"
        return done.returncode, done.stdout + done.stderr

    def native_environment(self) -> dict[str, str]:
        """Return the variables that let the copy compile with kept object files, and load nothing from the caches."""
        cached = [sys.executable, str(self.folder / "tests/planted/cached_compiler.py"), *compiler.find_compiler()]
        return {"CXX": shlex.join(cached), "KEIFU_CACHE": str(self.folder / "cache")}

    def plant(self, bug: Bug) -> tuple[str, str]:
        """Return how a bug ended, and the output of its test."""
        path = find(bug, self.package)
        if path is None:
            return "no longer fits", f"{bug.file} does not have this text once:\n{bug.old}"
        text = path.read_text(encoding="utf-8")
        changed = {path: text.replace(bug.old, bug.new)}
        if bug.instructions:
            kernels = self.package / SOURCE / f"kernels_{bug.instructions}.cpp"
            changed[path] = f"#ifdef KEIFU_PLANTED\n{changed[path]}\n#else\n{text}\n#endif\n"
            changed[kernels] = kernels.read_text(encoding="utf-8").replace("\n", "\n#define KEIFU_PLANTED\n", 1)
        originals = {path: path.read_text(encoding="utf-8") for path in changed}
        for each, planted in changed.items():
            self.write(each, planted)
        status, output = self.run([bug.test], is_native(bug))
        for each, original in originals.items():
            self.write(each, original)
        return OUTCOMES.get(status, "test did not run"), output

    def write(self, path: Path, text: str) -> None:
        """Write a file with a time of its own: Python compares times in whole seconds with those of compiled files."""
        self.edits += 1
        path.write_text(text, encoding="utf-8")
        moment = time.time() + 10 * self.edits
        os.utime(path, (moment, moment))


def is_native(bug: Bug) -> bool:
    """Return whether a bug is in the C++ of the native step."""
    return bug.file.startswith(SOURCE)


def work(
    waiting: "queue.SimpleQueue[Bug | None]", finished: "queue.SimpleQueue[tuple[Bug, str, str, float]]", objects: Path
) -> None:
    """Plant bugs from a queue in a copy until it gives None."""
    with tempfile.TemporaryDirectory(prefix="keifu-planted-") as folder:
        copy = Copy(Path(folder), objects)
        while bug := waiting.get():
            begin = time.monotonic()
            finished.put((bug, *copy.plant(bug), time.monotonic() - begin))


def check_without_bugs(bugs: Sequence[Bug], objects: Path) -> bool:
    """Return whether all tests pass while no bug is planted, and print the output of one that does not."""
    for native in (True, False):
        tests = list(dict.fromkeys(bug.test for bug in bugs if is_native(bug) == native))
        if not tests:
            continue
        with tempfile.TemporaryDirectory(prefix="keifu-planted-") as folder:
            status, output = Copy(Path(folder), objects).run(tests, native)
        if status:
            print(f"{output}\nThe tests fail without a bug: mend that first.")
            return False
    return True


def main() -> int:
    """Plant the bugs and print a line for each. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names or files of the bugs to plant; none: all")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--unchecked", action="store_true", help="do not first run the tests without bugs")
    options = parser.parse_args()
    bugs = read_index(Path(__file__).parent)
    bugs = [bug for bug in bugs if not options.names or any(part in f"{bug.name} {bug.file}" for part in options.names)]
    with tempfile.TemporaryDirectory(prefix="keifu-objects-") as objects:
        return run(bugs, options.jobs, not options.unchecked, Path(objects))


def run(bugs: Sequence[Bug], jobs: int, checked: bool, objects: Path) -> int:
    """Plant the bugs, `jobs` at a time, and print a line for each. Return the exit status."""
    begin = time.monotonic()
    if checked and not check_without_bugs(bugs, objects):
        return 1
    waiting, finished = queue.SimpleQueue[Bug | None](), queue.SimpleQueue[tuple[Bug, str, str, float]]()
    for bug in sorted(bugs, key=lambda bug: not is_native(bug)):  # those take the longest
        waiting.put(bug)
    for _ in range(jobs):
        waiting.put(None)
        threading.Thread(target=work, args=(waiting, finished, objects)).start()
    results = []
    for _ in bugs:
        bug, outcome, output, seconds = finished.get()
        results.append((bug, outcome))
        failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")]
        print(f"{outcome:16} {seconds:5.1f} s  {bug.name} ({bug.file})", *failed[:1], flush=True)
        if outcome != "died":
            print("    " + "\n    ".join(output.strip().splitlines()[-12:]), flush=True)
    died = sum(outcome == "died" for _, outcome in results)
    print(f"{died} of {len(bugs)} planted bugs died, in {time.monotonic() - begin:.0f} s.")
    for bug, outcome in results:
        if outcome != "died":
            print(f"  {outcome}: {bug.name}, {bug.file}, {bug.test}")
    return int(died < len(bugs))


if __name__ == "__main__":
    sys.exit(main())
