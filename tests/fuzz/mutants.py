"""Mutants of every kind of file that keifu reads: bytes changed, cut or repeated, and values of JSON exchanged."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

STRANGE: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), 0.5, "", "a", "../x", "\x1b[31m",
    "é" * 99, [], {}, [[]], [None], {"a": []}, [1, 2, 3], "9" * 5000, ["a"] * 50,
]  # fmt: skip


def changed_bytes(data: bytes, choice: random.Random) -> bytes:
    """Replace, remove or repeat some bytes, or remove all after a position."""
    content = bytearray(data)
    for _ in range(choice.choice((1, 1, 2, 5))):
        place, length = choice.randrange(len(content) or 1), choice.choice((1, 1, 2, 4, 8, 64))
        match choice.randrange(6):
            case 0:
                content[place : place + length] = choice.randbytes(length)
            case 1:
                del content[place : place + length]
            case 2:
                content[place:place] = content[place : place + length]
            case 3:
                number = choice.choice((0, 1, 255, 2**31, 2**32, 2**63, 2**64 - 1))
                content[place : place + 8] = struct.pack("<Q", number)
            case 4:
                content[place : place + 4] = struct.pack("<f", choice.choice((float("nan"), float("inf"), 0.0)))
            case _:
                content = content[:place] if choice.random() < 0.3 else content
    return bytes(content)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return every place inside a JSON value; of long lists and objects the first entries, of deep ones the upper
    ones."""
    if len(path) > 50:
        return [path]
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [path, *(place for key, inner in entries[:40] for place in places_of(inner, (*path, key)))]


def _inside(holder: Any, key: Any) -> Any:
    """Return the inner value, or None if an earlier change has removed it."""
    try:
        return holder[key]
    except (KeyError, IndexError, TypeError):
        return None


def changed_json(data: bytes, choice: random.Random) -> bytes:
    """Change the type, size, name or depth of some values, or remove some."""
    content = json.loads(data)
    for _ in range(choice.choice((1, 1, 1, 2, 4))):
        *path, last = choice.choice(places_of(content)[1:] or [("",)])
        holder = content
        for key in path:
            holder = _inside(holder, key)
        if not (isinstance(holder, dict) or isinstance(holder, list) and isinstance(last, int)):
            continue
        match choice.randrange(5):
            case 0 if isinstance(holder, dict):
                holder.pop(last, None)
            case 1 if isinstance(holder, dict):
                holder[choice.choice(("", "a", "../x", "\x1b[2J", "type"))] = holder.pop(last, None)
            case 2:
                text = json.dumps(content)
                deep = choice.choice((90, 1100, 20_000))
                return text.replace(":", ": " + "[" * deep + "]" * deep + ', "x":', 1).encode()
            case _ if not isinstance(holder, list) or last < len(holder):
                holder[last] = copy.deepcopy(choice.choice(STRANGE))
            case _:
                pass
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def changed_header(data: bytes, choice: random.Random) -> bytes:
    """Change the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = changed_json(data[8 : 8 + length], choice)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutant(file: Path, seed: int) -> bytes:
    """Return one mutant of a file; the same seed gives the same."""
    choice, data = random.Random(f"{file.name} {seed}"), file.read_bytes()
    ways: list[Callable[[bytes, random.Random], bytes]] = [changed_bytes]
    if file.suffix == ".json":
        ways += [changed_json] * 3
    if file.suffix == ".safetensors":
        ways += [changed_header] * 2
    return choice.choice(ways)(data, choice)
