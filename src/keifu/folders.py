"""Folders: keifu's cache, configuration and packaged files, and names of files in a folder of the user."""

import os
from pathlib import Path

from keifu.errors import UserError


def packaged(folder: str) -> Path:
    """Return a folder that a wheel has in the package and a checkout at its root; a `UserError` if neither is."""
    here = Path(__file__).parent
    for path in (here / folder, here.parents[1] / folder):
        if path.is_dir():
            return path
    raise UserError(f"The folder {folder} is not installed: install keifu from a wheel, or run a checkout.")


def cache() -> Path:
    """Return the folder for everything that is fetched or derived: `KEIFU_CACHE`, or ~/.cache/keifu."""
    return Path(os.environ.get("KEIFU_CACHE") or "~/.cache/keifu").expanduser()


def config() -> Path:
    """Return the folder for what must outlive the cache: `KEIFU_CONFIG`, or keifu in XDG_CONFIG_HOME or ~/.config."""
    usual = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "keifu"
    return Path(os.environ.get("KEIFU_CONFIG") or usual).expanduser()


def neighbours(path: Path, pattern: str = "*") -> list[str]:
    """Return the files next to a path that is missing, to suggest the nearest name."""
    return [str(file) for file in path.parent.glob(pattern)]


def hidden(path: Path) -> bool:
    """Return whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)
