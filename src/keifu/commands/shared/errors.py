"""Conversion of exceptions into one sentence for the user."""

import re
import tempfile
import traceback
from pathlib import Path

from keifu.errors import UserError, install, printable
from keifu.folders import cache

# Packages of `keifu serve`, and the command that installs them.
HINTS: dict[str, str] = dict.fromkeys(("starlette", "fastapi", "uvicorn", "llguidance"), f": {install('serve')}")


def explain(error: Exception) -> str | None:
    """Return one sentence without line breaks; None if the error is a bug of keifu (see `fault`)."""
    text = None
    match error:
        case UserError():
            text = str(error)
        case ModuleNotFoundError(name=str(name)) if not name.startswith("keifu"):
            text = f"This needs the Python package {name!r}, which is not installed{HINTS.get(name, '')}."
        case OSError():
            text = _system(error)
        case MemoryError() | RuntimeError():
            text = _memory(error)
    return text and printable(re.sub(r"\s+", " ", text).strip())


def fault(error: Exception) -> str:
    """Describe a bug of keifu. Write its traceback to a file that the user can report."""
    with tempfile.NamedTemporaryFile("w", prefix="keifu-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    what = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
    sentences = [
        f"This is a bug in keifu, not your mistake ({what[:300]}).",
        *getattr(error, "__notes__", ()),
        f"Please report it with the command and with {file.name}, which says where it happened (KEIFU_DEBUG=1 shows "
        "that here).",
    ]
    return printable(" ".join(sentences))


def _system(error: OSError) -> str:
    """Return the operating system's error message with the file's name."""
    of_cache = isinstance(error.filename, str) and _holds_cache(Path(error.filename))
    if isinstance(error, FileNotFoundError) and not of_cache:
        gone = "The current folder is not there any more: it was removed or renamed."
        return f"There is no file {str(error.filename)!r}." if error.filename else gone
    reason = error.strerror or str(error) or type(error).__name__
    # the name of the output file, not of its temporary file
    suffix = re.sub(r"\.([^/]+)\.\d+\.part$", r"\1", f": {error.filename}" if error.filename else "")
    if of_cache:
        suffix += "; KEIFU_CACHE names another folder for what keifu keeps"
    return f"{reason}{suffix}."


def _holds_cache(file: Path) -> bool:
    """Return whether a file is in keifu's cache, or is a folder above it."""
    return file == cache() or file in cache().parents or cache() in file.parents


def _memory(error: Exception) -> str | None:
    """Describe a lack of memory reported by Python or by PyTorch (CPU or GPU). Return None for any other error."""
    is_out_of_memory = re.search("out of memory|can't allocate memory|not enough memory", str(error))
    if not is_out_of_memory and not isinstance(error, MemoryError):
        return None
    amount_match = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGT]iB))", str(error))
    amount = f": {_readable(amount_match[1])} more were asked for" if amount_match else ""
    return f"There is not enough memory{amount}; lower the batch, the context length or the model's size."


def _readable(amount: str) -> str:
    return f"{int(amount.split()[0]) / 2**20:,.0f} MiB" if amount.endswith("bytes") else amount
