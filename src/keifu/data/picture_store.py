"""The pixels of a source in one file and all else in an index beside it, made once; knows no split and no batch."""

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keifu.data import picture_sources
from keifu.data.archives import making
from keifu.data.picture_files import Fit, fitted
from keifu.data.picture_item import Item
from keifu.data.progress import counting
from keifu.errors import UserError
from keifu.files import write_atomic

PIXELS, INDEX = "pixels.bin", "index.json"
CHUNK = 256  # pictures that are read at a time, in parallel
SHOWN = 3  # faults that a note names


class Form(NamedTuple):
    """What pictures are brought to: the side of a square, the channels, and how."""

    size: int | None
    channels: int | None
    fit: Fit


def open_index(source: str | Path, folder: Path, form: Form, leave_out: bool) -> dict[str, Any]:
    """The index of a folder that holds a source's pictures in that form, made if it is not there."""
    if not _whole(folder):
        with making(folder) as place:
            if not _whole(folder):
                _make(source, place / "new", form, leave_out)
                shutil.rmtree(folder, ignore_errors=True)  # there only when it was damaged
                (place / "new").rename(folder)
    index = _read_index(folder)
    if index["faults"] and not leave_out:
        raise UserError(_with_advice(index["faults"][0]))
    return index


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def _whole(folder: Path) -> bool:
    """Whether both files are there, and the pixels as many as the index says."""
    if not (folder / INDEX).is_file() or not (folder / PIXELS).is_file():
        return False
    return (folder / PIXELS).stat().st_size == int(np.prod(_read_index(folder)["shape"]))


def _with_advice(fault: str) -> str:
    return f"{fault} Put it right, or take it out of the set."


@dataclass
class _Gathered:
    """What is known of the pictures that were read so far, and which of them are alike."""

    items: list[Item] = field(default_factory=list)
    alike: list[tuple[str, ...]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, item: Item, pixels: np.ndarray, remarks: tuple[str, ...]) -> None:
        copies = hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()
        # Without its reader, which may hold the whole file.
        self.items.append(Item(item.name, item.where, _gone, item.captions, item.label, (), item.part))
        self.alike.append((*item.alike, copies))
        for remark in remarks:
            self.remarks[remark].append(item.where)

    def notes(self) -> list[str]:
        found = [_counted(places, remark) for remark, places in self.remarks.items()]
        if self.faults:
            rest = f" And {len(self.faults) - SHOWN:,} more." if len(self.faults) > SHOWN else ""
            found.append(f"Left out: {len(self.faults):,}. {' '.join(self.faults[:SHOWN])}{rest}")
        return found

    def index(self) -> dict[str, Any]:
        items = self.items
        classes = sorted({item.label for item in items if item.label}, key=_by_value)
        languages = items[0].captions
        return {
            "names": [item.name for item in items], "parts": [item.part for item in items], "classes": classes,
            "labels": [classes.index(item.label) if item.label else -1 for item in items],
            "captions": {language: [item.captions[language] for item in items] for language in languages},
            "groups": groups(self.alike), "notes": self.notes(), "faults": self.faults,
        }  # fmt: skip


def _gone(size: int | None) -> Any:
    raise AssertionError("read already")


def _by_value(label: str) -> tuple[bool, int, str]:
    return not label.isdecimal(), int(label) if label.isdecimal() else 0, label


def _counted(places: list[str], remark: str) -> str:
    many = f"1 picture ({places[0]}) is" if len(places) == 1 else f"{len(places):,} pictures ({places[0]}, ...) are"
    return f"{many} {remark}."


def groups(alike: list[tuple[str, ...]]) -> list[int]:
    """A number for each picture; those that share a key, be it through others, have the same, that of the first."""
    owner: dict[str, int] = {}
    parent = list(range(len(alike)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for place, keys in enumerate(alike):
        for key in keys:
            first, other = sorted((root(owner.setdefault(key, place)), root(place)))
            parent[other] = first
    return [root(place) for place in range(len(alike))]


def _make(source: str | Path, folder: Path, form: Form, leave_out: bool) -> None:
    """Writes pixels and index into a new folder."""
    gathered, shape, digest = _Gathered(), None, hashlib.sha256()

    def problem(fault: str) -> None:
        if not leave_out:
            raise UserError(_with_advice(fault))
        gathered.faults.append(fault)

    folder.mkdir()
    with (folder / PIXELS).open("wb") as file, counting(f"Reading {source}", None, "pictures") as advance:
        for item, found in _read(picture_sources.items(source, problem), form):
            if isinstance(found, str):
                problem(found)
                continue
            pixels, remarks = found
            shape = shape or pixels.shape
            if pixels.shape != shape:
                pixels = _of_shape(pixels, shape, item, gathered)
            gathered.add(item, pixels, remarks)
            digest.update(pixels.tobytes())
            file.write(pixels.tobytes())
            advance(len(gathered.items))
        file.flush()
        os.fsync(file.fileno())
    if not gathered.items:
        raise UserError(f"{source} holds no picture that can be used. {' '.join(gathered.faults[:SHOWN])}")
    index = gathered.index()
    digest.update(json.dumps(index, sort_keys=True).encode())
    index |= {"shape": [len(gathered.items), *(shape or ())], "fingerprint": digest.hexdigest()}
    write_atomic(folder / INDEX, json.dumps(index, ensure_ascii=False) + "\n")


def _of_shape(pixels: np.ndarray, shape: tuple[int, ...], item: Item, gathered: _Gathered) -> np.ndarray:
    """A picture with the channels of the first one; one of another size is an error."""
    if pixels.shape[:2] != shape[:2]:
        sizes = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, and {gathered.items[0].where} {shape[1]} x {shape[0]}"
        raise UserError(f"{item.where} has {sizes}: give one size for all (--size), such as {min(shape[:2])}.")
    if shape[2] == 1:
        raise UserError(
            f"{item.where} has colours, and {gathered.items[0].where} is grey: say which is wanted (--channels 1 or 3)."
        )
    return np.repeat(pixels, 3, axis=2)


def _read(items: Iterator[Item], form: Form) -> Iterator[tuple[Item, tuple[np.ndarray, tuple[str, ...]] | str]]:
    """Each picture with its pixels and remarks, or with the sentence that says why there are none."""

    def read(item: Item) -> tuple[np.ndarray, tuple[str, ...]] | str:
        try:
            shot = item.read(form.size)
            return fitted(shot.image, *form), shot.remarks
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(items, CHUNK)):
            yield from zip(chunk, pool.map(read, chunk), strict=True)
