"""Folders: keifu's cache, configuration and packaged files, and names of files in a folder of the user."""

import glob
import logging
import os
from pathlib import Path

from keifu.errors import UserError


def packaged(folder: str) -> Path:
    """Return a data folder: in the package if installed from a wheel, at the root in a checkout. Raises `UserError` if
    it is missing."""
    here = Path(__file__).parent
    for path in (here / folder, here.parents[1] / folder):
        if path.is_dir():
            return path
    raise UserError(f"The folder {folder} is not installed: install keifu from a wheel, or run a checkout.")


def cache() -> Path:
    """Return the folder for downloaded and derived files: `KEIFU_CACHE`, or ~/.cache/keifu."""
    return Path(os.environ.get("KEIFU_CACHE") or "~/.cache/keifu").expanduser()


def place_matplotlib() -> None:
    """Let matplotlib keep its list of fonts in `KEIFU_CACHE` if it cannot write into the home folder. Without that
    variable it makes the list anew each time, in a temporary folder, and does not print the lines that say so."""
    if os.access(Path("~").expanduser(), os.W_OK):
        return
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if folder := os.environ.get("KEIFU_CACHE"):
        os.environ.setdefault("MPLCONFIGDIR", str(Path(folder).expanduser() / "matplotlib"))


def config() -> Path:
    """Return the folder for files that must not be lost with the cache: `KEIFU_CONFIG`, or keifu in XDG_CONFIG_HOME or
    ~/.config."""
    default_folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "keifu"
    return Path(os.environ.get("KEIFU_CONFIG") or default_folder).expanduser()


def neighbours(path: Path, pattern: str = "*") -> list[str]:
    """Return the names of files in the folder of a missing path. The error suggests the nearest of them."""
    return [str(file) for file in path.parent.glob(pattern)]


def matching(source: str | Path) -> list[Path]:
    """List the files of a source, in order: one file, all files in a folder that are not hidden, or those that match a
    pattern."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and not hidden(file.relative_to(path)))
    paths = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
    return sorted(file for file in paths if file.is_file())


def hidden(path: Path) -> bool:
    """Return whether the name of the file, or of one of its parent folders, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)
