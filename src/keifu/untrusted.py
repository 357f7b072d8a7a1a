"""Reading files of someone else: whatever is missing, damaged, too large or too deep is a `UserError` that names it."""

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

LARGEST_TEXT = 2**28  # bytes of a JSON, YAML or vocabulary file
SURROGATE = r"\\u[dD][89a-fA-F]"  # an escape of half a character in JSON
DEEPEST = 100  # lists and objects inside each other
LONGEST_PATTERN = 100_000  # characters of a regular expression: some list every word
MOST_VALUES = 2 * 10**7  # in all of them


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
