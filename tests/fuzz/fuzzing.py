"""Reads mutants in processes of their own, which may die or hang; says what came of each.

As a program, `python tests/fuzz/fuzzing.py --mutants 10000 [--kind gguf] [--seed 1]` prints the counts and the cases.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

PLACE = Path(__file__).parent
sys.path.insert(0, str(PLACE))

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
    seed: int
    outcome: str
    text: str = ""


def worker(tasks: Any, answers: Any, folder: str) -> None:
    """Reads one mutant after the other."""
    import torch
    from targets import TARGETS

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the whole process)
    while (task := tasks.get()) is not None:
        kind, file, seed = task
        place = Path(folder) / kind
        original = place / file
        kept = original.read_bytes()
        original.write_bytes(mutant(original, seed))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome, text = outcome_of(TARGETS[kind].read, place)
        finally:
            original.write_bytes(kept)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        if more > MEMORY + 2 * len(kept) / 1e6:
            outcome, text = "memory", f"{more:.0f} MB; {text}"
        answers.put((outcome, text))


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

    def read(self, kind: str, file: str, seed: int) -> Case:
        original = Path(self.folder) / kind / file
        kept = original.read_bytes()
        self.tasks.put((kind, file, seed))
        waited = 0.0
        while waited < 6 * SECONDS:  # of an idle machine's time: a busy one is waited for longer
            try:
                return Case(kind, file, seed, *self.answers.get(timeout=0.5))
            except Exception:
                waited += 0.5
                if not self.process.is_alive():
                    break
        outcome = "hang" if self.process.is_alive() else f"died with {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        original.write_bytes(kept)
        self.begin()
        return Case(kind, file, seed, outcome)

    def end(self) -> None:
        self.tasks.put(None)
        self.process.join(10)


def fuzz(count: int, seed: int = 0, kinds: tuple[str, ...] = ()) -> list[Case]:
    """So many mutants over all kinds, or over these, in turns."""
    from targets import TARGETS

    os.environ["PYTHONPATH"] = os.pathsep.join([str(PLACE), *sys.path])
    folder = tempfile.mkdtemp(prefix="keifu-fuzz-")
    chosen = {kind: TARGETS[kind] for kind in kinds or TARGETS}
    for kind, target in chosen.items():
        (Path(folder) / kind).mkdir()
        target.make(Path(folder) / kind)
        whole = outcome_of(target.read, Path(folder) / kind)
        assert whole == ("loaded", ""), f"{kind}, before anything is changed: {whole}"
    # every kind as often as another, and of a kind every file
    names, number_of = list(chosen), len(chosen)
    kinds = tuple(names[number % number_of] for number in range(count))
    turns = [(kind, chosen[kind].files[n // number_of % len(chosen[kind].files)]) for n, kind in enumerate(kinds)]
    fuzzer = Fuzzer(folder)
    try:
        return [fuzzer.read(kind, file, seed + number) for number, (kind, file) in enumerate(turns)]
    finally:
        fuzzer.end()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", default=[])
    options = parser.parse_args()
    cases = fuzz(options.mutants, options.seed, tuple(options.kind))
    for kind in sorted({case.kind for case in cases}):
        found = Counter(case.outcome for case in cases if case.kind == kind)
        print(f"{kind:14} {sum(found.values()):6,}  " + "  ".join(f"{name} {n:,}" for name, n in found.most_common()))
    print(f"{'all':14} {len(cases):6,}  {dict(Counter(case.outcome for case in cases))}")
    for case in cases:
        if case.outcome not in FINE:
            print(f"{case.kind} {case.file} {case.seed}: {case.outcome} {case.text[:200]}")


if __name__ == "__main__":
    main()
