"""Files: atomic writing (a crash leaves the old file or the new one, never a part), hashing, JSON, and the cache."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from keifu.errors import UserError

FULL = {errno.ENOSPC: "disk", errno.EDQUOT: "quota"}  # what has no space left, by the system's error number
LEFT = re.compile(r"\..+\.\d+\.part|\.tmp\w{6}")  # temporary files of `replacing`, and of the package safetensors
LARGEST_TEXT = 2**28  # bytes of a JSON, YAML or vocabulary file
SURROGATE = r"\\u[dD][89a-fA-F]"  # an escape of half a character in JSON
DEEPEST = 100  # lists and objects inside each other
LONGEST_PATTERN = 100_000  # characters of a regular expression: some list every word
MOST_VALUES = 2 * 10**7  # in all of them
HUB: dict[str, str] = {}  # the hub ids that this process has read, and the revision of each
LEARNED: dict[str, Any] = {}  # by name, the learned tokenizers that were asked for; the run that begins next keeps them
KEPT = "state/tokenizer"  # where, in its folder
WINDOWS = os.name == "nt"  # it opens no folders, syncs only files that may be written, and keeps open files


@contextmanager
def disk_space(what: str) -> Iterator[None]:
    """Turn a full disk or quota in a block that writes into a `UserError` that says what became of the work."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"The {FULL[error.errno]} is full: {what}; free some space.") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path next to `path`; after the block it is synced to disk and renamed over `path`.

    On any error the temporary file is removed and `path` keeps its old content. A full disk is a `UserError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_space(f"{path} was not written and its old content is kept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask wants it; some libraries write files of mode 0600
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors as safetensors with the usual mode; the system's errors are `OSError`s, as for other files."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # its text carries the system's error number
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file at once (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_file(path: Path, what: str = "file") -> Path:
    """Return the path of a file that is there and can be read to an end. A folder, a pipe, a device, a link that leads
    nowhere, and a file that this user may not read are `UserError`s too."""
    if not path.exists() and not path.is_symlink():
        raise UserError(f"There is no {what} {path}.")
    if not path.is_file():
        other = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "a link that leads nowhere"
        raise UserError(f"{path} is {other}, and a file is needed there.")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{path} cannot be read: you have no permission to read it.")
    return path


def read_text(path: Path) -> str:
    """Return a file's text; one that is not UTF-8, or larger than any text that keifu reads whole, is a `UserError`."""
    if (size := plain_file(path).stat().st_size) > LARGEST_TEXT:
        raise UserError(f"{path} has {size:,} bytes, and at most {LARGEST_TEXT:,} are read of a file of this kind.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text: at byte {error.start:,} stands 0x{byte:02x}.") from None


def parse_json(text: str | bytes, name: Any) -> Any:
    """Parse JSON; `name` is the file's in errors. Text that is not JSON, or is nested too deeply, is a `UserError`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{name} is nested more than {DEEPEST} deep.") from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {str(error).rstrip('.')}.") from error
    return _within_limits(value, name, text)


def parse_yaml(text: str, name: Any, loader: Any = None) -> Any:
    """Parse YAML, or by `loader` a part of it; a `UserError` for text that is not YAML, has a key twice, is nested too
    deeply, or grows by its references to more than any file that keifu reads, is a `UserError`."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """YAML's own keeps the last of equal keys and says nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
                if count > 1:
                    raise UserError(f"{name} has the key {key!r} {count} times in one place: give each its own name.")
            return super().construct_mapping(node, deep)

    try:
        return _within_limits(yaml.load(text, loader or UniqueKeys), name, text)  # nosec B506
    except RecursionError:
        raise UserError(f"{name} is nested more than {DEEPEST} deep.") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot be read: it is neither YAML nor JSON ({reason}).") from error


def _within_limits(content: Any, name: Any, text: str | bytes) -> Any:
    """Return the content if it is neither too deep nor too large to walk through, and its strings are valid Unicode."""
    level, depth, count = [content], 0, 0
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth, count = depth + 1, count + sum(map(len, level))
        if depth > DEEPEST:
            raise UserError(f"{name} is nested more than {DEEPEST} deep.")
        if count > MOST_VALUES:
            raise UserError(f"{name} holds more than {MOST_VALUES:,} values.")
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    if re.search(SURROGATE, text) if isinstance(text, str) else re.search(SURROGATE.encode(), text):
        try:
            json.dumps(content, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{name} holds {half}, which is half of a character: no text has it alone.") from None
    return content


def check_pattern(pattern: str, name: str) -> None:
    """Refuse a regular expression of someone else that could take forever: a repeated group that holds a repetition or
    alternatives, and one that is longer than any in use."""
    plain = re.sub(r"\[(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", pattern))
    groups = [False]
    for token in re.finditer(r"\(\?[!=:<a-z-]*|[(|+*]|\{\d+,\d*\}|\)(\{\d|[+*])?", plain):
        if token[0].startswith("("):
            groups.append(False)
            continue
        inside = groups.pop() if token[0].startswith(")") and len(groups) > 1 else False
        if inside and token[1]:
            raise UserError(f"{name} has a regular expression that could take forever: {pattern[:100]!r}.")
        groups[-1] |= inside or not token[0].startswith(")") or bool(token[1])
    if len(pattern) > LONGEST_PATTERN:
        raise UserError(f"{name} has a regular expression of {len(pattern):,} characters.")


def read_json(path: Path) -> Any:
    """Return a JSON file's content (see `parse_json`)."""
    return parse_json(read_text(path), path)


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Turn errors of a block that reads a file of someone else into a `UserError`: whatever a reader, or a library
    inside it, raises because the file is damaged becomes one `UserError` that names the file. The cause stays with it,
    for --verbose."""
    try:
        yield
    except (UserError, ImportError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        system = isinstance(error, OSError) and error.errno not in (None, errno.ENAMETOOLONG)  # None: gzip's own
        if system or re.search("out of memory|can't allocate memory", str(error)):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise UserError(f"{path} is damaged, or of a form that keifu does not read ({what}).") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; anything else is a `UserError`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a JSON object is needed.")
    return content


def check_output(path: Path, option: str, folder: bool) -> None:
    """Refuse a place where no file, or no folder, could be written: before the work, not after it."""
    if path.exists() and path.is_dir() != folder:
        kinds = ("file", "folder") if folder else ("folder", "file")
        raise UserError(f"{option} {path} is a {kinds[0]}, and a {kinds[1]} is to be written: give another name.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() and there != path:
        raise UserError(f"{option} {path} cannot be written: {there} is a file.")
    parent = there if there.is_dir() else there.parent
    try:
        with tempfile.TemporaryFile(dir=parent):  # asks the file system too: permissions do not say all
            pass
    except OSError as error:
        reason = f"no file can be made in {parent} ({error.strerror})"
        raise UserError(f"{option} {path} cannot be written: {reason}.") from None


def packaged(folder: str) -> Path:
    """Return a folder that a wheel has in the package and a checkout at its root; a `UserError` where neither is."""
    here = Path(__file__).parent
    for path in (here / folder, here.parents[1] / folder):
        if path.is_dir():
            return path
    raise UserError(f"The folder {folder} is not installed: install keifu from a wheel, or run a checkout.")


def neighbours(path: Path, pattern: str = "*") -> list[str]:
    """Return the files next to a path that is missing, to suggest the nearest name."""
    return [str(file) for file in path.parent.glob(pattern)]


def hidden(path: Path) -> bool:
    """Return whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def cache() -> Path:
    """Return the folder for everything that is fetched or derived: `KEIFU_CACHE`, or ~/.cache/keifu."""
    return Path(os.environ.get("KEIFU_CACHE") or "~/.cache/keifu").expanduser()


def config() -> Path:
    """Return the folder for what must outlive the cache: `KEIFU_CONFIG`, or keifu in XDG_CONFIG_HOME or ~/.config."""
    usual = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "keifu"
    return Path(os.environ.get("KEIFU_CONFIG") or usual).expanduser()


def remove_left(directory: Path) -> None:
    """Remove the temporary files that a dead process left in a directory and below; nobody else may write there."""
    for path in [*directory.rglob(".*")]:
        if LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def listed(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [listed(inner) for inner in value] if isinstance(value, tuple) else value
