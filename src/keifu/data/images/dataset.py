"""Image data sets: pixels in one memory-mapped file; captions, labels and groups in an index.

Axes: picture, height, width, channels (1 or 3) on disk and in numpy; picture (in a batch: row), channels, height, width
in tensors.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.classification.examples import sorted_labels
from keifu.data.images import sources
from keifu.data.images.catalogued import CATALOGUED
from keifu.data.images.io import Fit, ImageItem, fit_image
from keifu.data.prepared_folders import prepared_folder
from keifu.data.progress import counting
from keifu.errors import UserError, require_known
from keifu.files import hash_of
from keifu.untrusted import plain_file

PIXELS = "pixels.bin"
Pixels = UInt8[Tensor, "picture channels height width"]
Decoded = tuple[np.ndarray, tuple[str, ...]]  # pixels of a picture, and remarks
CHUNK = 256  # number of pictures that are read in parallel
SHOWN = 3  # number of bad pictures that a note names


class ImageFormat(NamedTuple):
    """Format that images are converted to: the side of a square, the channels, and how they are fitted."""

    size: int | None
    channels: int | None
    fit: Fit


def _with_advice(fault: str) -> str:
    return f"{fault} Correct it, or remove it from the data."


def _index(items: Sequence[ImageItem], remarked: Mapping[str, list[str]], faults: list[str]) -> dict[str, Any]:
    """Return the facts about the pictures. remarked: for each remark the names of its pictures."""
    classes = list(sorted_labels(item.label for item in items if item.label))
    notes = []
    for remark, paths in remarked.items():
        many = f"{len(paths):,} pictures ({paths[0]}, ...) are" if len(paths) > 1 else f"1 picture ({paths[0]}) is"
        notes.append(f"{many} {remark}.")
    if faults:
        omission = f" And {len(faults) - SHOWN:,} more." if len(faults) > SHOWN else ""
        notes.append(f"Left out: {len(faults):,}. {' '.join(faults[:SHOWN])}{omission}")
    return {
        "names": [item.name for item in items], "parts": [item.part for item in items], "classes": classes,
        "labels": [classes.index(item.label) if item.label else -1 for item in items],
        "captions": {language: [item.captions[language] for item in items] for language in items[0].captions},
        "groups": groups([item.alike for item in items]), "notes": notes, "faults": faults,
    }  # fmt: skip


def _already_read(size: int | None) -> Any:
    raise AssertionError("The picture was read already.")


def groups(alike: list[tuple[str, ...]]) -> list[int]:
    """Return the group of each picture: the index of the group's first picture. Pictures with a common key, directly or
    through others, are one group."""
    owner: dict[str, int] = {}
    parent = list(range(len(alike)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for index, keys in enumerate(alike):
        for key in keys:
            first, other = sorted((root(owner.setdefault(key, index)), root(index)))
            parent[other] = first
    return [root(index) for index in range(len(alike))]


def _make(source: str | Path, form: ImageFormat, leave_out: bool, folder: Path) -> dict[str, Any]:
    """Write the pixels into a new folder. Return the facts about the pictures."""
    items, faults = list[ImageItem](), list[str]()
    shape = None
    digest = hashlib.sha256()
    remarked: dict[str, list[str]] = defaultdict(list)

    def problem(fault: str) -> None:
        if not leave_out:
            raise UserError(_with_advice(fault))
        faults.append(fault)

    with (folder / PIXELS).open("wb") as file, counting(f"Reading {source}", None, "pictures") as advance:
        for item, decoded in _read(sources.items(source, problem), form):
            if isinstance(decoded, str):
                problem(decoded)
                continue
            pixels, remarks = decoded
            shape = shape or pixels.shape
            if pixels.shape != shape:
                pixels = _of_shape(pixels, shape, item, items[0])
            content = pixels.tobytes()
            copies = hashlib.blake2b(content, digest_size=16).hexdigest()
            # drop the reader, which may keep a whole file in memory
            items.append(replace(item, read=_already_read, alike=(*item.alike, copies)))
            for remark in remarks:
                remarked[remark].append(item.where)
            digest.update(content)
            file.write(content)
            advance(len(items))
    if not items:
        raise UserError(f"{source} holds no picture that can be used. {' '.join(faults[:SHOWN])}")
    index = _index(items, remarked, faults)
    digest.update(json.dumps(index, sort_keys=True).encode())
    families = groups([(*item.alike, *item.relatives) for item in items])
    return index | {"shape": [len(items), *(shape or ())], "fingerprint": digest.hexdigest(), "families": families}


def _of_shape(pixels: np.ndarray, shape: tuple[int, ...], item: ImageItem, first: ImageItem) -> np.ndarray:
    """Convert a picture's channels to those of the first one. Raises `UserError` for another size."""
    if pixels.shape[:2] != shape[:2]:
        sizes = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, and {first.where} {shape[1]} x {shape[0]}"
        raise UserError(f"{item.where} has {sizes}: give one size for all (--size), such as {min(shape[:2])}.")
    if shape[2] == 1:
        both = f"{item.where} has colours, and {first.where} is grey"
        raise UserError(f"{both}: say which is wanted (--channels 1 or 3).")
    return np.repeat(pixels, 3, axis=2)


def _read(items: Iterator[ImageItem], form: ImageFormat) -> Iterator[tuple[ImageItem, Decoded | str]]:
    """Yield each picture with its pixels and remarks, or with an error sentence if it cannot be read."""

    def read(item: ImageItem) -> Decoded | str:
        try:
            decoded = item.read(form.size)
            return fit_image(decoded.image, *form), decoded.remarks
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(items, CHUNK)):
            yield from zip(chunk, pool.map(read, chunk), strict=True)


FORMAT = 3  # increased when the same source would give other bytes
PARTS = "", "validation", "test"  # parts that a source may state; "" is training


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Pictures of one size with their captions, labels and groups.

    pixels: uint8 [stored, height, width, channels], memory-mapped. rows: indices of this set's pictures in `pixels`.
    names: unique in the source (an emoji, a file's path). captions: by language code ("und" if unknown), one for each
    picture. labels: indices into `classes`, -1 for none. groups: pictures with nearly the same content (skin tones of
    one emoji, copies) have the same number. families: larger groups that join relatives (genders and directions of one
    emoji). parts: the part stated by the source: "validation", "test" or "". notes: sentences for the user. faults: a
    sentence for each picture that was left out.
    """

    source: str
    pixels: np.ndarray
    rows: np.ndarray
    names: tuple[str, ...]
    captions: dict[str, tuple[str, ...]]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    families: np.ndarray
    parts: tuple[str, ...]
    stored_fingerprint: str
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width, in the order of tensors."""
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of pixels, captions, labels and the selection."""
        return hash_of([self.stored_fingerprint, self.rows.astype("<i8").tobytes()])

    def take(self, indices: Sequence[int] | np.ndarray | slice) -> Pixels:
        """Copy the pixels of these pictures into a tensor."""
        return torch.from_numpy(np.ascontiguousarray(self.pixels[self.rows[indices]].transpose(0, 3, 1, 2)))

    def batches(self, size: int) -> Iterator[Pixels]:
        """Yield the pixels of all pictures, `size` pictures at a time."""
        return (self.take(slice(first, first + size)) for first in range(0, len(self), size))

    def subset(self, indices: Iterable[int] | np.ndarray) -> "ImageDataset":
        """Return a data set of these pictures, in the given order."""
        rows = np.array(list(indices), np.int64)

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[index] for index in rows)

        captions = {language: pick(texts) for language, texts in self.captions.items()}
        return replace(
            self, rows=self.rows[rows], names=pick(self.names), captions=captions, labels=self.labels[rows],
            groups=self.groups[rows], families=self.families[rows], parts=pick(self.parts),
        )  # fmt: skip

    def spread(self, count: int) -> "ImageDataset":
        """Return at most `count` pictures, evenly spaced over the set."""
        return self.subset(sorted({n * len(self) // count for n in range(count if len(self) else 0)}))

    def with_names(self, names: Iterable[str]) -> "ImageDataset":
        """Return the pictures with one of these names, for example the same emoji in another style."""
        wanted_names = set(names)
        return self.subset(index for index, name in enumerate(self.names) if name in wanted_names)

    def distinct(self) -> "ImageDataset":
        """Return the first picture of each group; for emoji, those without a skin tone."""
        return self.subset(np.sort(np.unique(self.groups, return_index=True)[1]))

    def texts(self, language: str | None = None) -> tuple[str, ...]:
        """Return the captions in a language, by default the first language. Raises `UserError` if there are none."""
        if not self.captions:
            raise UserError(f"The pictures of {self.source} have no captions; add them as {', '.join(CAPTIONED)}.")
        caption_language = next(iter(self.captions)) if language is None else language
        require_known(f"language of the captions of {self.source}", caption_language, self.captions)
        return self.captions[caption_language]

    def sentence(self) -> str:
        """Describe the set in a sentence."""
        channels, height, width = self.shape
        colours = "grey" if channels == 1 else "colour"
        captions = f", captions in {', '.join(self.captions)}" if self.captions else ""
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"{self.source}: {len(self):,} {colours} pictures of {width} x {height}{captions}{classes}."


CAPTIONED = "metadata.jsonl with file_name and text", "000.txt next to 000.png in a .tar shard"


def read_images(
    source: str | Path,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    fit: Fit = "crop",
    leave_out: bool = False,
) -> ImageDataset:
    """Read the pictures of a source (see `keifu.data.images.sources`). The result is cached until the source changes.

    size: side in pixels of the square that `fit` makes: the middle is kept ("crop"), white is added ("pad") or the
    picture is stretched ("stretch"). Without a size, all pictures must have one size. channels: 1 for grey, 3 for
    colour; by default those of the first picture. Raises `UserError`, with the file's name, for a file that is not a
    picture, is damaged, or lacks a caption that others have. With `leave_out` it is instead skipped, listed in `faults`
    and counted in `notes`.
    """
    if size is not None and size < 1:
        raise UserError(f"size is {size}, but a picture has at least 1 pixel.")
    settings = {"format": FORMAT, "content": _content(source), "size": size, "channels": channels, "fit": fit}
    make = partial(_make, source, ImageFormat(size, channels, fit), leave_out)
    folder, index = prepared_folder("pictures", source, settings, make)
    if index["faults"] and not leave_out:
        raise UserError(_with_advice(index["faults"][0]))
    pixels = np.memmap(folder / PIXELS, np.uint8, "r", shape=tuple(index["shape"]))
    texts = "names", "classes", "parts", "notes", "faults"
    columns: dict[str, Any] = {column: tuple(index[column]) for column in texts}
    captions = {language: tuple(texts) for language, texts in index["captions"].items()}
    columns |= {column: np.array(index[column], np.int64) for column in ("labels", "groups", "families")}
    return ImageDataset(
        source=str(source), pixels=pixels, rows=np.arange(len(pixels)), captions=captions,
        stored_fingerprint=index["fingerprint"], **columns,
    )  # fmt: skip


def _content(source: str | Path) -> str:
    """Return a string that changes with the source: for files, with their names, sizes and times."""
    if source in CATALOGUED:
        return catalogue.identity(str(source))
    root = Path(source).expanduser()
    facts = [(path, plain_file(path).stat()) for path in sources.files(source)]
    return "\n".join(f"{path.relative_to(root) if path != root and path.is_relative_to(root) else path.name}:"
                     f"{stat.st_size}:{stat.st_mtime_ns}" for path, stat in facts)  # fmt: skip
