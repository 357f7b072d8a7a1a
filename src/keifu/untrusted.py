"""Reading files that keifu did not write: a file that is missing, damaged, too large or nested too deeply raises a
`UserError` that names it."""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keifu.errors import UserError

LARGEST_TEXT = 2**28  # maximal size in bytes of a JSON, YAML or vocabulary file
SURROGATE = r"\\u[dD][89a-fA-F]"  # JSON escape of half a character
DEEPEST = 100  # maximal nesting of lists and objects
LONGEST_PATTERN = 100_000  # maximal length of a regular expression: some list every word
MOST_VALUES = 2 * 10**7  # maximal number of values in a JSON or YAML file


def as_path(value: Any, what: str) -> Path:
    """Return a path that a caller of the Python interface gives. Raises `UserError`, which names it by `what`, for any
    other value."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{what} is {value!r:.60}, which must be a path as a str or a Path.")
    return Path(value)


def plain_file(path: Path, what: str = "file") -> Path:
    """Return `path` if it is a regular file that this user may read. Else raise `UserError`, also for a folder, pipe,
    device or dangling link."""
    if not path.exists() and not path.is_symlink():
        raise UserError(f"There is no {what} {path}.")
    if not path.is_file():
        other = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "a link that leads nowhere"
        raise UserError(f"{path} is {other}, and a file is needed there.")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{path} cannot be read: you have no permission to read it.")
    return path


def read_text(path: Path) -> str:
    """Return a file's text. Raises `UserError` if it is not UTF-8, or larger than `LARGEST_TEXT`."""
    if (size := plain_file(path).stat().st_size) > LARGEST_TEXT:
        raise UserError(f"{path} has {size:,} bytes, and at most {LARGEST_TEXT:,} are read of a file of this kind.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text: byte {error.start:,} is 0x{byte:02x}.") from None


def parse_json(text: str | bytes, name: Any) -> Any:
    """Parse JSON. name: of the file, for errors. Raises `UserError` if the text is not JSON, or is nested too
    deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{name} is nested more than {DEEPEST} deep.") from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {str(error).rstrip('.')}.") from error
    return _within_limits(value, name, text)


def parse_yaml(text: str, name: Any, loader: Any = None) -> Any:
    """Parse YAML. loader: a class that reads only a part of it.

    Raises `UserError` if the text is not YAML, has a key twice, is nested too deeply, or expands by its aliases beyond
    `MOST_VALUES`.
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """Loader that refuses equal keys. PyYAML's loader silently keeps the last one."""

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
    """Return the content if its depth and number of values are within the limits and its strings are valid Unicode."""
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
    """Raise `UserError` for a regular expression that could take forever: a repeated group with a repetition or
    alternatives inside. Also for one longer than `LONGEST_PATTERN`."""
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
    """Return the content of a JSON file (see `parse_json`)."""
    return parse_json(read_text(path), path)


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Turn exceptions of a block that reads a file into one `UserError` that names the file. Readers and libraries
    raise many types for a damaged file. The original exception stays as the cause, for --verbose."""
    try:
        yield
    except (UserError, ImportError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics of Rust libraries are not subclasses of Exception
        system = isinstance(error, OSError) and error.errno not in (None, errno.ENAMETOOLONG)  # None: an error of gzip
        if system or re.search("out of memory|can't allocate memory", str(error)):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise UserError(f"{path} is damaged, or of a form that keifu does not read ({what}).") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file. Raises `UserError` for any other content."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a JSON object is needed.")
    return content
