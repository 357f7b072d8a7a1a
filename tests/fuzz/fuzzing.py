"""Reads mutants in processes of their own, which may die or hang; says what came of each.

As a program, `python tests/fuzz/fuzzing.py --mutants 10000 [--kind gguf] [--seed 1] [--style structure]` prints the
counts and the cases. Styles: bytes (and values of JSON; see mutants.py), structure (see structure.py), and values:
every field of every JSON file with each of a list of values, as many as there are.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple
from unittest.mock import patch

PLACE = Path(__file__).parent
sys.path[:0] = [str(PLACE), str(PLACE.parent)]

import structure  # noqa: E402
from mutants import mutant  # noqa: E402

SECONDS = 10.0
MEMORY = 200  # MB more than before, and twice the file
FINE = ("refused", "loaded")
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["targets"])


class Case(NamedTuple):
    """A mutant: what is fuzzed, which file of it, and the seed; and what came of it."""

    kind: str
    file: str
    style: str
    seed: int
    outcome: str
    text: str = ""


def damage(file: Path, style: str, seed: int) -> None:
    """Change a file in one way of a style."""
    if style == "bytes":
        file.write_bytes(mutant(file, seed))
    elif style == "structure":
        structure.damage(file, seed)
    else:
        file.write_bytes(structure.with_value(file.read_bytes(), seed))


def restore(file: Path, content: bytes) -> None:
    """Restore a file to its content, whatever has replaced it."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def worker(tasks: Any, answers: Any, folder: str) -> None:
    """Read one mutant after the other, and send the outcome of each."""
    import torch
    from targets import TARGETS

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the whole process)
    while (task := tasks.get()) is not None:
        kind, file, style, seed = task
        place = Path(folder) / kind
        original = place / file
        kept = original.read_bytes()
        damage(original, style, seed)
        before, began = memory(), time.process_time()
        try:
            outcome, text = outcome_of(TARGETS[kind].read, place)
        finally:
            restore(original, kept)
        more, seconds = memory("VmHWM") - before, time.process_time() - began
        if more > MEMORY + 2 * len(kept) / 1e6:
            outcome, text = "memory", f"{more:.0f} MB; {text}"
        if seconds > SECONDS:
            outcome, text = "slow", f"{seconds:.0f} s; {text}"
        answers.put((outcome, text))


def memory(of: str = "VmRSS") -> float:
    """Return the MB of this process. "VmRSS" gives those of now, and restarts the peak, which is "VmHWM"."""
    if of == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(of)) / 1000


def outcome_of(read: Any, place: Path) -> tuple[str, str]:
    from keifu.errors import UserError

    try:
        read(place)
    except UserError as error:
        text = str(error)
        return ("refused" if len(text) > 20 else "unclear"), text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return "traceback", f"{type(error).__name__}: {error}"[:300]
    return "loaded", ""


class Fuzzer:
    """A process that reads mutants, and is begun again when it has died or does not answer."""

    def __init__(self, folder: str):
        self.folder = folder
        self.begin()

    def begin(self) -> None:
        self.tasks, self.answers = PROCESSES.Queue(), PROCESSES.Queue()
        self.process = PROCESSES.Process(target=worker, args=(self.tasks, self.answers, self.folder), daemon=True)
        self.process.start()

    def read(self, kind: str, file: str, style: str, seed: int) -> Case:
        original = Path(self.folder) / kind / file
        kept = original.read_bytes()
        self.tasks.put((kind, file, style, seed))
        begun = moved = time.monotonic()
        began = computed = self.seconds()
        while time.monotonic() - begun < 6 * SECONDS:  # a busy machine is waited for
            try:
                return Case(kind, file, style, seed, *self.answers.get(timeout=0.5))
            except Empty:
                now = self.seconds()
                computed, moved = (now, time.monotonic()) if now > computed else (computed, moved)
                if not self.process.is_alive() or now - began > 1.5 * SECONDS or time.monotonic() - moved > SECONDS:
                    break
        outcome = "hang" if self.process.is_alive() else f"died with {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        restore(original, kept)
        self.begin()
        return Case(kind, file, style, seed, outcome)

    def seconds(self) -> float:
        """Return the processor time of the process, in seconds."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.tasks.put(None)
        self.process.join(10)


def tell(case: Case) -> Case:
    """Print a case that has a wrong outcome."""
    if case.outcome not in FINE:
        print(*case[:4], case.outcome, case.text[:300].replace("\n", " "), sep=" | ", flush=True)
    return case


def fuzz(count: int, seed: int, kinds: tuple[str, ...], *styles: str) -> list[Case]:
    """Make so many mutants of each style over all kinds, or over these, in turns; of the style "values" every one."""
    folder = tempfile.mkdtemp(prefix="keifu-fuzz-")
    variables = {"PYTHONPATH": os.pathsep.join([str(PLACE), *sys.path]), "KEIFU_CACHE": f"{folder}/cache"}
    try:
        with patch.dict(os.environ, variables):  # no longer: the folder goes, and other tests have caches of their own
            return _fuzz(folder, count, seed, kinds, styles)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fuzz(folder: str, count: int, seed: int, kinds: tuple[str, ...], styles: tuple[str, ...]) -> list[Case]:
    """Fuzz in a folder, as `fuzz` does."""
    from targets import TARGETS

    chosen = {kind: TARGETS[kind] for kind in kinds or TARGETS}
    for kind, target in chosen.items():
        (Path(folder) / kind).mkdir()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            target.make(Path(folder) / kind)
            whole = outcome_of(target.read, Path(folder) / kind)
        assert whole == ("loaded", ""), f"{kind}, before anything is changed: {whole}"
    turns = {style: _in_turns(chosen, count, seed) for style in styles}
    turns |= {style: _every_value(Path(folder), chosen) for style in styles if style == "values"}
    fuzzer = Fuzzer(folder)
    try:
        return [tell(fuzzer.read(kind, file, style, number)) for style in styles for kind, file, number in turns[style]]
    finally:
        fuzzer.end()


def _in_turns(chosen: dict[str, Any], count: int, seed: int) -> list[tuple[str, str, int]]:
    """Return every kind as often as another, and of a kind every file."""
    kinds = [*chosen]
    turns = [(kinds[number % len(kinds)], number // len(kinds), seed + number) for number in range(count)]
    return [(kind, chosen[kind].files[turn % len(chosen[kind].files)], number) for kind, turn, number in turns]


def _every_value(folder: Path, chosen: dict[str, Any]) -> list[tuple[str, str, int]]:
    """List every place of every JSON file, with every value."""
    files = [(kind, file) for kind, target in chosen.items() for file in target.files if file.endswith(".json")]
    counts = [structure.number_of_values((folder / kind / file).read_bytes()) for kind, file in files]
    return [(*each, number) for each, count in zip(files, counts, strict=True) for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--style", choices=("bytes", "structure", "values"), default="bytes")
    options = parser.parse_args()
    cases = fuzz(options.mutants, options.seed, tuple(options.kind), options.style)
    for kind in sorted({case.kind for case in cases}):
        found = Counter(case.outcome for case in cases if case.kind == kind)
        print(f"{kind:14} {sum(found.values()):6,}  " + "  ".join(f"{name} {n:,}" for name, n in found.most_common()))
    print(f"{'all':14} {len(cases):6,}  {dict(Counter(case.outcome for case in cases))}")


if __name__ == "__main__":
    main()
