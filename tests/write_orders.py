"""A recorder of how files reach the disk, with the rules that a save must keep to survive a crash at any moment."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

State = tuple[int, int]  # size and time of the last change


def _state(path: Path) -> State:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class Recorder:
    """Calls of fsync and rename below a folder, in order. `problems` has a sentence for each rule that was broken.

    Writes need no recording: a file whose size or time differs from that at its last sync was written after it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synced: dict[int, State] = {}  # by inode
        self.open_folders: set[Path] = set()  # with a rename that is not yet synced
        self.renamed: list[Path] = []
        self.problems: list[str] = []
        self.before_last: set[Path] = set()  # folders that were not yet synced at the last rename
        self._replace = os.replace

    def fsync(self, descriptor: int) -> None:
        """Record a sync, and wait for no disk."""
        found = os.fstat(descriptor)
        self.synced[found.st_ino] = found.st_size, found.st_mtime_ns
        if stat.S_ISDIR(found.st_mode):
            self.open_folders = {path for path in self.open_folders if path.stat().st_ino != found.st_ino}

    def rename(self, source: str | Path, target: str | Path) -> None:
        """Check that everything under the source is synced, and rename it."""
        source, target = Path(source), Path(target)
        if self.folder in target.parents:
            for path in (source, *source.rglob("*")) if source.is_dir() else (source,):
                if path.is_file() and self.synced.get(path.stat().st_ino) != _state(path):
                    self.problems.append(f"{target.name} gets its name before {path.name} is synced")
                if path.is_dir() and path.stat().st_ino not in self.synced:
                    self.problems.append(f"{target.name} gets its name before the folder {path.name} is synced")
            self.renamed.append(target)
        self._replace(source, target)
        if self.folder in target.parents:
            self.before_last = self.open_folders.copy()
            self.open_folders.add(target.parent)

    def check(self, valid: str) -> None:
        """Fail if a rule was broken. valid: name of the file that makes the rest valid."""
        there = [path for path in self.renamed if path.exists()]
        assert there, "nothing was renamed"
        assert there[-1].name == valid and [path.name for path in there].count(valid) >= 1, there
        left = sorted(str(path) for path in self.before_last if path.exists())
        assert not self.problems, self.problems
        assert not left, f"{valid} gets its name before names in {left} are synced"
        assert not [path for path in self.open_folders if path.exists()], "the last name is not synced"


@contextmanager
def recorded(folder: Path) -> Iterator[Recorder]:
    """Record syncs and renames below a folder inside the block."""
    recorder = Recorder(folder)
    patches = {"fsync": recorder.fsync, "rename": recorder.rename, "replace": recorder.rename}
    with mock.patch.multiple(os, **patches):
        yield recorder
