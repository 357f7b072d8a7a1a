"""Folders of the cache. Each is built once, by one process, and synced to disk. A damaged folder is built again.

A prepared folder has its facts in index.json, and the sizes and hashes of its files in files.json.
"""

import glob
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from keifu import files, folders, locks
from keifu.errors import UserError
from keifu.untrusted import plain_file, read_json_object

INDEX = "index.json"  # facts about the content of a prepared folder
MANIFEST = "files.json"  # sizes of all files of a prepared folder, and hashes of small files
SOON_READ = 1 << 26  # bytes; larger files are identified by their size only


def build_once(folder: Path, is_whole: Callable[[], bool], make: Callable[[Path], None]) -> Path:
    """Return a folder. If it is not complete, call `make` with a temporary path to write it.

    One process at a time writes, in a new folder next to it. That folder is removed after an error or a crash. All
    files are synced before the folder is renamed. Raises `UserError` for a full disk.
    """
    if is_whole():
        return folder
    with locks.locked(folder):
        for unfinished in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary = TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True)
        with temporary as path, files.disk_space(f"nothing of {folder.name} was kept"):
            if not is_whole():
                new = Path(path, "new")
                make(new)
                for new_path in sorted(new.rglob("*"), reverse=True):
                    files.sync(new_path)
                files.sync(new)
                shutil.rmtree(folder, ignore_errors=True)  # exists only if it was damaged
                new.rename(folder)
                files.sync(folder.parent)
    return folder


def prepared_folder(
    parent: str, source: str | Path, settings: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Return the cache folder `parent`/... for a source prepared with these settings, and its index.

    make: writes files into a new folder, and returns facts. The index has the facts, the source, the settings and their
    fingerprint. A folder with truncated, changed or missing files is built again.
    """
    fingerprint = files.hash_of([json.dumps(settings, sort_keys=True)])
    name = Path(source).stem.replace("*", "") or "text"
    folder = folders.cache() / parent / f"{name}-{fingerprint[:16]}"

    def make_with_index(new: Path) -> None:
        new.mkdir()
        index = {"source": str(source), "fingerprint": fingerprint, "settings": settings, **make(new)}
        (new / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
        manifest = {path.name: _facts(path) for path in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    build_once(folder, lambda: is_undamaged(folder), make_with_index)
    return folder, json.loads((folder / INDEX).read_text(encoding="utf-8"))


def is_undamaged(folder: Path) -> bool:
    """Return whether all files of a prepared folder exist and are unchanged."""
    try:
        manifest = read_json_object(folder / MANIFEST)
        return bool(manifest) and all(_facts(folder / name) == facts for name, facts in manifest.items())
    except (OSError, UserError):
        return False


def _facts(path: Path) -> list[Any]:
    """Return a file's size; for a small file also its SHA-256."""
    size = plain_file(path).stat().st_size
    return [size, files.sha256(path) if size <= SOON_READ else ""]
