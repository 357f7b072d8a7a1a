"""Damage that knows the form of a file: fields of JSON, headers of tensors, GGUF's fields, chunks of pictures, members
of archives; and damage to what a file is: a folder, a link, a pipe, one that may not be read."""

import copy
import io
import json
import os
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutants import places_of

Content = bytes
VALUES: list[Any] = [  # what a field may say that is of the wrong kind, or of the right one and cannot be
    -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**6, 10**12, 10**40, -(2**31), 0.0, 0.5, 1.5, -0.1, 1e-320,
    1e308, float("nan"), float("inf"), float("-inf"), True, False, None, "", "0", "16", "nan", "a" * 10_000, "\ud800",
    "\u0000", "ａ", "../../etc/passwd", "{{ 7 * 7 }}", "%s%n", [], [0], [None], ["a"], [[1]], [2**31] * 3, {}, {"a": 1},
    {"type": "a"},
]  # fmt: skip


def number_of_values(data: Content) -> int:
    """Count the files that `with_value` makes of a JSON file."""
    return len(places_of(json.loads(data))[1:]) * len(VALUES)


def with_value(data: Content, number: int) -> Content:
    """Put one value in one position of a JSON file: of all positions and values, the one of this number."""
    content = json.loads(data)
    place, value = divmod(number, len(VALUES))
    return _set(content, places_of(content)[1:][place], VALUES[value])


def _set(content: Any, place: tuple[Any, ...], value: Any) -> Content:
    changed = copy.deepcopy(content)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return json.dumps(changed).encode()


def json_fields(data: Content, choice: random.Random) -> Content:
    """Change a field, exchange two, repeat a key, or use a form that not every parser accepts."""
    content = json.loads(data)
    places = places_of(content)[1:] or [()]
    text = json.dumps(content)
    match choice.randrange(9):
        case 0 | 1 | 2 if places != [()]:
            return _set(content, choice.choice(places), choice.choice(VALUES))
        case 3 if places != [()]:
            one, other = choice.choice(places), choice.choice(places)
            return _set(content, one, _get(content, other))
        case 4:  # the first key of some object once more, with another value
            keys = [*re.finditer(r'[{,] ?("[^"]*"): ', text)]
            found = choice.choice(keys) if keys else None
            twice = json.dumps(choice.choice(VALUES))
            return (
                text[: found.start() + 1] + f"{found[1]}: {twice}, " + text[found.start() + 1 :] if found else text
            ).encode()
        case 5:
            return choice.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n" * 9, b"// a\n")) + data
        case 6:
            return choice.choice(
                (text.replace(",", ",,", 1), text[:-1] + ",}", text * 2, text.replace('"', "'"))
            ).encode()
        case 7:
            deep = choice.choice((99, 101, 990, 100_000))
            return choice.choice(("[" * deep, '{"a":' * deep, "[" * deep + "]" * deep)).encode()
        case _:
            return text.encode(choice.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))


def _get(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


def json_lines(data: Content, choice: random.Random) -> Content:
    """Change one of several lines as `json_fields` does."""
    rows = data.splitlines()
    number = choice.randrange(len(rows))
    rows[number] = json_fields(rows[number], choice).replace(b"\n", b" ")
    return b"\n".join(rows) + b"\n"


def tensors(data: Content, choice: random.Random) -> Content:
    """Return tensors of other shapes, types, names or places, as a header may truly say it."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = choice.choice(names), choice.choice(names)
    entry = header[one]
    match choice.randrange(12):
        case 0:
            same = {"F32": ("I32", "U32"), "F64": ("I64", "U64"), "I64": ("F64",), "F16": ("BF16", "I16")}
            entry["dtype"] = choice.choice(same.get(entry["dtype"], ("U8",)))
        case 1:
            entry["shape"] = entry["shape"][::-1]
        case 2:
            whole = 1
            for size in entry["shape"]:
                whole *= size
            entry["shape"] = choice.choice(([whole], [1, *entry["shape"]], [*entry["shape"], 1], [2, whole // 2]))
        case 3:
            header[one], header[other] = header[other], header[one]
        case 4:
            header[one]["data_offsets"] = header[other]["data_offsets"]
        case 5:
            del header[one]
        case 6:
            header[choice.choice(("a", "", "\x1b[2J", one + "x", "a" * 5000))] = header.pop(one)
        case 7:
            entry["shape"], entry["data_offsets"] = [0, *entry["shape"][1:]], [0, 0]
        case 8:
            entry["shape"] = choice.choice(([2**62, 4], [2**32, 2**32], [-1], [1.0], ["4"], [], [2**64]))
        case 9:
            entry["dtype"] = choice.choice(("F8_E4M3", "F4", "C64", "BOOL", "I8", "f32", "", "F999"))
        case 10:
            start, end = entry["data_offsets"]
            wrong = choice.choice((float("nan"), float("inf"), float("-inf")))
            kinds = {"F32": "<f", "F64": "<d", "F16": "<e"}
            if entry["dtype"] in kinds and end > start:
                made = struct.pack(kinds[entry["dtype"]], wrong)
                body = body[:start] + made + body[start + len(made) :]
        case _:
            header["__metadata__"] = choice.choice(({"format": 1}, {"a": "b" * 10**6}, [], {"format": "tf"}))
    text = json.dumps(header).encode()
    text += b" " * choice.choice((0, 0, 3, 8))
    return struct.pack("<Q", len(text) + choice.choice((0, 0, 0, 0, 1, -1))) + text + body


def gguf_fields(data: Content, choice: random.Random) -> Content:
    """Change the type or value of a field, the length of a string, or the axes of a tensor."""
    content = bytearray(data)
    found = [*re.finditer(rb"[\x01-\x40]\0{7}([a-z_0-9]+(?:\.[a-z_0-9]+)+)", data)]
    name = choice.choice(found)
    after = name.end()
    match choice.randrange(6):
        case 0:
            content[after : after + 4] = struct.pack("<I", choice.choice((*range(14), 255, 2**31)))
        case 1:
            content[after + 4 : after + 8] = struct.pack("<I", choice.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1)))
        case 2:
            content[after + 4 : after + 12] = struct.pack("<Q", choice.choice((0, 1, 3, 2**31, 2**62, 2**64 - 1)))
        case 3:
            content[name.start() : name.start() + 8] = struct.pack("<Q", choice.choice((0, 1, 2**31, 2**63)))
        case 4:
            content[name.start(1) : name.start(1) + 3] = b"abc"
        case _:
            place = choice.choice((4, 8, 16))
            content[place : place + 8] = struct.pack("<Q", choice.choice((0, 1, 2, 10**6, 2**32, 2**63)))
    return bytes(content)


def chunks(data: Content, choice: random.Random) -> Content:
    """Change the content of a PNG's chunks, with correct checksums."""
    parts, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    number = choice.randrange(len(parts))
    kind, content = parts[number]
    match choice.randrange(6):
        case 0:
            sides = choice.choice(((0, 0), (1, 2**31 - 1), (10**5, 10**5), (30_000, 30_000), (2**31, 1)))
            parts[0] = b"IHDR", struct.pack(">II", *sides) + parts[0][1][8:]
        case 1:
            depth = bytes(choice.choice(((16, 2), (1, 3), (8, 6), (4, 0), (9, 9))))
            parts[0] = b"IHDR", parts[0][1][:8] + depth + parts[0][1][10:]
        case 2:
            parts.insert(1, (b"zTXt", b"keifu\0\0" + zlib.compress(b"a" * 200_000_000, 1)))
        case 3:
            parts[number] = kind, bytes(choice.randrange(256) if choice.random() < 0.1 else byte for byte in content)
        case 4:
            del parts[number]
        case _:
            parts.insert(number, choice.choice(parts))
    return data[:8] + b"".join(
        struct.pack(">I", len(inside)) + kind + inside + struct.pack(">I", zlib.crc32(kind + inside))
        for kind, inside in parts
    )


def members(data: Content, choice: random.Random) -> Content:
    """Change the name, kind, size or content of a member of a tar archive."""
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=made, mode="w") as new:
        every = old.getmembers()
        changed = choice.randrange(len(every))
        for number, member in enumerate(every):
            content = old.extractfile(member).read()  # pyright: ignore
            if number == changed:
                match choice.randrange(7):
                    case 0:
                        member.name = choice.choice(
                            ("../a.png", "/a.png", "a", "a/" * 50 + "a.png", "\udcff.png", ".png")
                        )
                    case 1:
                        member.type, member.linkname = tarfile.SYMTYPE, choice.choice(("/etc/passwd", member.name))
                    case 2:
                        member.type = choice.choice((tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"9"))
                    case 3:
                        content = b""
                    case 4:
                        content = choice.choice((b"{", b"[]", b"\xff\xfe", b"{}" * 9, b"null", b'{"caption": 1}'))
                    case 5:
                        new.addfile(member, io.BytesIO(content))
                    case _:
                        member.name = every[0].name
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return made.getvalue()


def lines(data: Content, choice: random.Random) -> Content:
    """Return lines that end otherwise, stand twice, are exchanged, empty, very long, or in another encoding."""
    rows = data.split(b"\n")
    one, other = choice.randrange(len(rows)), choice.randrange(len(rows))
    match choice.randrange(9):
        case 0:
            return data.replace(b"\n", choice.choice((b"\r\n", b"\r", b"\n\n", b"\x0b", "\u2028".encode())))
        case 1:
            rows[one], rows[other] = rows[other], rows[one]
        case 2:
            rows.insert(one, rows[other])
        case 3:
            rows[one] = b""
        case 4:
            rows[one] = choice.choice((b"a" * 300_000, b'"' * 999, b"\t" * 99, b"," * 99, b"&a [*a, *a]", b"- " * 200))
        case 5:
            rows[one] = choice.choice((b"\xff\xfe", b"\0", b"\x1b[2J", "\u202e\ufeff".encode(), b"\xed\xa0\x80"))
        case 6:
            return b"\xef\xbb\xbf" + data
        case 7:
            return data.decode("utf-8", "replace").encode(choice.choice(("utf-16", "cp932", "utf-32")), "replace")
        case _:
            return data * choice.choice((2, 50))
    return b"\n".join(rows)


def sections(data: Content, choice: random.Random) -> Content:
    """Cut off at any place, empty, doubled, or with zeros behind."""
    match choice.randrange(5):
        case 0:
            return b""
        case 1:
            return data + data
        case 2:
            return data + bytes(4096)
        case 3:
            return bytes(len(data))
        case _:
            return data[: int(len(data) * choice.random())]


TEXTS = ".txt", ".jinja", ".csv", ".tsv", ".yaml"
WAYS: dict[str, list[Callable[[Content, random.Random], Content]]] = {
    ".json": [json_fields] * 5 + [lines], ".jsonl": [json_lines] * 3 + [lines], ".safetensors": [tensors] * 5,
    ".gguf": [gguf_fields] * 5, ".png": [chunks] * 4, ".tar": [members] * 4, **dict.fromkeys(TEXTS, [lines] * 3),
}  # fmt: skip


def be_another(file: Path, choice: random.Random) -> None:
    """Replace a file by something that is not a readable file or that has no end."""
    file.unlink()
    match choice.randrange(8):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to(file.name)
        case 2:
            file.symlink_to("nowhere")
        case 3:
            os.mkfifo(file)
        case 4:
            file.symlink_to("/dev/zero")
        case 5:
            file.symlink_to("/dev/null")
        case 6:
            file.symlink_to("..")
        case _:
            pass


def damage(file: Path, seed: int) -> None:
    """Damage a file in one of these ways; the same seed does the same."""
    choice, data = random.Random(f"structure {file.name} {seed}"), file.read_bytes()
    if choice.random() < 0.15:
        be_another(file, choice)
        return
    file.write_bytes(choice.choice([*WAYS.get(file.suffix, []), sections])(data, choice))
