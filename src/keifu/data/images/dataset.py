"""Image data sets: pixels in one memory-mapped file, captions and labels in an index, a split without leakage, batches.

Axes: picture, height, width, channels (1 or 3) on disk and in numpy; picture (of a batch: row), channels, height, width
in tensors; length (of a caption in tokens), language.
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
from jaxtyping import Int64, UInt8
from torch import Tensor

from keifu.data.batching import Epochs
from keifu.data.catalogue import catalogue
from keifu.data.classification.tables import sorted_labels
from keifu.data.images import sources
from keifu.data.images.augmentation import Augmentation, uniform
from keifu.data.images.io import Fit, ImageItem, fit_image
from keifu.data.images.sources import in_catalogue
from keifu.data.prepared_folders import prepared_folder
from keifu.data.progress import counting
from keifu.errors import UserError, require_known
from keifu.files import plain_file, write_atomic

PIXELS, INDEX = "pixels.bin", "index.json"
CHUNK = 256  # pictures that are read at a time, in parallel
SHOWN = 3  # faults that a note names


class ImageFormat(NamedTuple):
    """The format that images are converted to: the side of a square, the channels, and how they are fitted."""

    size: int | None
    channels: int | None
    fit: Fit


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def _with_advice(fault: str) -> str:
    return f"{fault} Put it right, or take it out of the set."


def _index(items: Sequence[ImageItem], remarked: Mapping[str, list[str]], faults: list[str]) -> dict[str, Any]:
    """What is known of the pictures. remarked: where the pictures are that a remark holds for."""
    classes, notes = list(sorted_labels(item.label for item in items if item.label)), []
    for remark, places in remarked.items():
        more = len(places) > 1
        many = f"{len(places):,} pictures ({places[0]}, ...) are" if more else f"1 picture ({places[0]}) is"
        notes.append(f"{many} {remark}.")
    if faults:
        rest = f" And {len(faults) - SHOWN:,} more." if len(faults) > SHOWN else ""
        notes.append(f"Left out: {len(faults):,}. {' '.join(faults[:SHOWN])}{rest}")
    return {
        "names": [item.name for item in items], "parts": [item.part for item in items], "classes": classes,
        "labels": [classes.index(item.label) if item.label else -1 for item in items],
        "captions": {language: [item.captions[language] for item in items] for language in items[0].captions},
        "groups": groups([item.alike for item in items]), "notes": notes, "faults": faults,
    }  # fmt: skip


def _gone(size: int | None) -> Any:
    raise AssertionError("read already")


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


def _make(source: str | Path, form: ImageFormat, leave_out: bool, folder: Path, facts: Any) -> None:
    """Writes pixels and index into a new folder."""
    items, faults, shape, digest = list[ImageItem](), list[str](), None, hashlib.sha256()
    remarked: dict[str, list[str]] = defaultdict(list)

    def problem(fault: str) -> None:
        if not leave_out:
            raise UserError(_with_advice(fault))
        faults.append(fault)

    folder.mkdir()
    with (folder / PIXELS).open("wb") as file, counting(f"Reading {source}", None, "pictures") as advance:
        for item, found in _read(sources.items(source, problem), form):
            if isinstance(found, str):
                problem(found)
                continue
            pixels, remarks = found
            shape = shape or pixels.shape
            if pixels.shape != shape:
                pixels = _of_shape(pixels, shape, item, items[0])
            content = pixels.tobytes()
            copies = hashlib.blake2b(content, digest_size=16).hexdigest()
            # Without its reader, which may hold the whole file.
            items.append(replace(item, read=_gone, alike=(*item.alike, copies)))
            for remark in remarks:
                remarked[remark].append(item.where)
            digest.update(content)
            file.write(content)
            advance(len(items))
        file.flush()
        os.fsync(file.fileno())
    if not items:
        raise UserError(f"{source} holds no picture that can be used. {' '.join(faults[:SHOWN])}")
    index = _index(items, remarked, faults)
    digest.update(json.dumps(index, sort_keys=True).encode())
    index |= {"shape": [len(items), *(shape or ())], "fingerprint": digest.hexdigest()}
    write_atomic(folder / INDEX, json.dumps(index, ensure_ascii=False) + "\n")


def _of_shape(pixels: np.ndarray, shape: tuple[int, ...], item: ImageItem, first: ImageItem) -> np.ndarray:
    """A picture with the channels of the first one; one of another size is an error."""
    if pixels.shape[:2] != shape[:2]:
        sizes = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, and {first.where} {shape[1]} x {shape[0]}"
        raise UserError(f"{item.where} has {sizes}: give one size for all (--size), such as {min(shape[:2])}.")
    if shape[2] == 1:
        raise UserError(
            f"{item.where} has colours, and {first.where} is grey: say which is wanted (--channels 1 or 3)."
        )
    return np.repeat(pixels, 3, axis=2)


def _read(
    items: Iterator[ImageItem], form: ImageFormat
) -> Iterator[tuple[ImageItem, tuple[np.ndarray, tuple[str, ...]] | str]]:
    """Each picture with its pixels and remarks, or with the sentence that says why there are none."""

    def read(item: ImageItem) -> tuple[np.ndarray, tuple[str, ...]] | str:
        try:
            shot = item.read(form.size)
            return fit_image(shot.image, *form), shot.remarks
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(items, CHUNK)):
            yield from zip(chunk, pool.map(read, chunk), strict=True)


FORMAT = 2  # goes up when the same source would give other bytes than before
PARTS = "", "validation", "test"  # what a source may say of a picture; training is what is left


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Pictures of one size, with what is known of each.

    pixels: uint8 [stored, height, width, channels], memory-mapped; rows: the places there of this set's pictures.
    names: one each, that nothing else in the source has (an emoji, a file's path). captions: by language code ("und"
    where the source does not say which language), one for each picture. labels: places in `classes`, -1 where there is
    none. groups: pictures that say nearly the same (skin tones of one emoji, copies) have the same number. parts: what
    the source itself says of each: "train", "validation", "test" or "". notes: what a person should know. faults: a
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
    parts: tuple[str, ...]
    stored_fingerprint: str
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width, as tensors have them."""
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 that changes with any pixel, caption or label, and with what was chosen."""
        return hashlib.sha256(self.stored_fingerprint.encode() + self.rows.astype("<i8").tobytes()).hexdigest()

    def take(self, places: Sequence[int] | np.ndarray | slice) -> UInt8[Tensor, "picture channels height width"]:
        """The pixels of some pictures, in a tensor of their own."""
        taken = self.pixels[self.rows[places]]
        return torch.from_numpy(np.ascontiguousarray(taken.transpose(0, 3, 1, 2)))

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "picture channels height width"]]:
        """The pixels of all pictures, so many pictures at a time."""
        return (self.take(slice(first, first + size)) for first in range(0, len(self), size))

    def chosen(self, places: Iterable[int] | np.ndarray) -> "ImageDataset":
        """Some of the images, in the given order."""
        chosen = np.array(list(places), np.int64)

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[place] for place in chosen)

        captions = {language: pick(texts) for language, texts in self.captions.items()}
        return replace(
            self, rows=self.rows[chosen], names=pick(self.names), captions=captions, labels=self.labels[chosen],
            groups=self.groups[chosen], parts=pick(self.parts),
        )  # fmt: skip

    def spread(self, count: int) -> "ImageDataset":
        """At most so many, spread over all of them."""
        return self.chosen(sorted({n * len(self) // count for n in range(count if len(self) else 0)}))

    def named(self, names: Iterable[str]) -> "ImageDataset":
        """The pictures that have one of these names: the same emoji in another style."""
        wanted = set(names)
        return self.chosen(place for place, name in enumerate(self.names) if name in wanted)

    def distinct(self) -> "ImageDataset":
        """The first picture of each group: of emoji, those without a skin tone."""
        return self.chosen(np.sort(np.unique(self.groups, return_index=True)[1]))

    def texts(self, language: str | None = None) -> tuple[str, ...]:
        """The captions in a language, or in the first one that there is; none is a `UserError`."""
        if not self.captions:
            raise UserError(f"The pictures of {self.source} have no captions; add them as {', '.join(CAPTIONED)}.")
        wanted = next(iter(self.captions)) if language is None else language
        require_known(f"language of the captions of {self.source}", wanted, self.captions)
        return self.captions[wanted]

    def sentence(self) -> str:
        """What there is, for people."""
        channels, height, width = self.shape
        kind = "grey" if channels == 1 else "colour"
        captions = f", captions in {', '.join(self.captions)}" if self.captions else ""
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"{self.source}: {len(self):,} {kind} pictures of {width} x {height}{captions}{classes}."


CAPTIONED = "metadata.jsonl with file_name and text", "000.txt beside 000.png in a .tar shard"


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Three parts of the same pictures; none shares a group with another."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset

    def sentence(self) -> str:
        """The sizes, for people."""
        sizes = len(self.train), len(self.validation), len(self.test)
        return "{:,} pictures for training, {:,} for validation, {:,} for testing.".format(*sizes)

    def evaluated(self) -> "tuple[ImageDataset, ImageDataset | None]":
        """What was trained on and what was held out; of a set that is held out whole, all of it and None."""
        return (self.train, self.test) if len(self.train) else (self.test, None)


def read_images(
    source: str | Path,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    fit: Fit = "crop",
    leave_out: bool = False,
) -> ImageDataset:
    """The pictures of a source (see `keifu.data.images.sources`), made once and found again while nothing has changed.

    size: the side of the squares they are brought to by `fit`: the middle is cut out ("crop"), white is added ("pad")
    or they are stretched; unset, they must all have one size. channels: 1 for grey, 3 for colour; unset, grey where the
    first picture is. A file that is no picture, is damaged, or has no caption where others do is a `UserError` that
    names it; with `leave_out` it is left out and stands in `faults` and, counted, in `notes`.
    """
    if size is not None and size < 1:
        raise UserError(f"size is {size}, but a picture has at least 1 pixel.")
    settings = {"format": FORMAT, "content": _content(source), "size": size, "channels": channels, "fit": fit}
    make = partial(_make, source, ImageFormat(size, channels, fit), leave_out)
    folder = prepared_folder("pictures", source, settings, make, "pictures")
    index = _read_index(folder)
    if index["faults"] and not leave_out:
        raise UserError(_with_advice(index["faults"][0]))
    pixels = np.memmap(folder / PIXELS, np.uint8, "r", shape=tuple(index["shape"]))
    columns = {column: tuple(index[column]) for column in ("names", "classes", "parts", "notes", "faults")}
    return ImageDataset(
        source=str(source), pixels=pixels, rows=np.arange(len(pixels)), labels=np.array(index["labels"], np.int64),
        groups=np.array(index["groups"], np.int64), stored_fingerprint=index["fingerprint"],
        captions={language: tuple(texts) for language, texts in index["captions"].items()}, **columns,
    )  # fmt: skip


def _content(source: str | Path) -> str:
    """What tells that a source holds the same: of files, their names, sizes and times."""
    if in_catalogue(source):
        return catalogue.identity(str(source))
    root = Path(source).expanduser()
    facts = [(path, plain_file(path).stat()) for path in sources.files(source)]
    return "\n".join(f"{path.relative_to(root) if path != root and path.is_relative_to(root) else path.name}:"
                     f"{stat.st_size}:{stat.st_mtime_ns}" for path, stat in facts)  # fmt: skip


def split(pictures: ImageDataset, share: float = 0.05, seed: int = 0) -> ImageSplit:
    """Holds out the fraction `share` of the groups for testing and as many for validation, of every class its part.

    Which ones, the seed and the pictures' names decide. What the source itself has held out stays so, with the whole
    group of such a picture, and nothing is added to that part.
    """
    if not 0 < share < 0.5:
        raise UserError(f"share is {share}, but the fraction held out for each part must be above 0 and below 0.5.")
    _, firsts, member = np.unique(pictures.groups, return_index=True, return_inverse=True)
    said = np.array([PARTS.index(each) for each in pictures.parts], np.int8)
    part = np.zeros(len(firsts), np.int8)  # of each group: 0 for training, 1 for validation, 2 for testing
    np.maximum.at(part, member, said)
    keys = [hashlib.sha256(f"{seed}\n{pictures.names[place]}".encode()).digest() for place in firsts]
    order = sorted(range(len(firsts)), key=lambda i: (int(pictures.labels[firsts[i]]), keys[i]))
    free = np.array([i for i in order if not part[i]], np.int64)
    for number, shift in ((2, 0.0), (1, 0.5)):
        if number not in said:
            marks = np.floor(np.arange(len(free) + 1) * share + shift)
            part[free[np.diff(marks) > 0]] = number
    return ImageSplit(*(pictures.chosen(np.flatnonzero(part[member] == number)) for number in range(3)))


Tokens = Int64[Tensor, "language picture length"]
HeldTokens = Int64[Tensor, "language held_picture held_length"]


class ImageBatches:
    """The training loop's data, for pictures alone, with classes or with captions.

    A batch has "pictures" uint8 [row, channels, height, width] (see `to_signed` for -1 to 1), "indices" [row], their
    places in the set, "labels" [row] where the set has classes, and "tokens" [row, length] where captions were given as
    tokens, in one of the languages, sampled at each step; "languages" [row] says which.

    An epoch takes every picture once, in an order of its own; `evenly`, one of each group, so that an emoji in many
    skin tones is seen no more often than another; with `hard_negatives` those of a group follow one another, for a loss
    that compares the pictures of a batch. Which one of a group, what a picture looks like by the augmentation, and the
    language of its caption, only the seed, the step and its index decide. Held-out pictures come as they are, and their
    languages take turns.

    training_tokens, held_tokens: [language, picture, length], for the pictures of the two sets.
    """

    def __init__(
        self, training: ImageDataset, held: ImageDataset, batch_size: int, seed: int = 0,
        augmentation: Augmentation | None = None, training_tokens: Tokens | None = None,
        held_tokens: HeldTokens | None = None, *, evenly: bool = False, hard_negatives: bool = False,
    ):  # fmt: skip
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but it must be at least 1.")
        if not len(training):
            raise UserError(f"No picture of {training.source} is for training: all of them are held out.")
        self.training, self.held, self.batch_size, self.seed = training, held, batch_size, seed
        self.evenly, self.hard_negatives = evenly, hard_negatives
        self.augmentation = augmentation or Augmentation()
        self.training_tokens, self.held_tokens = training_tokens, held_tokens
        groups = training.groups if evenly else np.arange(len(training))
        self._members = np.argsort(groups, kind="stable")
        _, self._first, self._sizes = np.unique(groups[self._members], return_index=True, return_counts=True)
        order = partial(_group_order, training.groups, seed) if hard_negatives else None
        self._epochs = Epochs(len(self._first), batch_size, seed, order)
        self.steps_per_epoch = self._epochs.steps

    @cached_property
    def fingerprint(self) -> str:
        """A hash of both sets and of all that the batches depend on."""
        facts = [self.training.fingerprint, self.held.fingerprint, self.batch_size, self.seed, self.augmentation]
        facts += ["evenly"] * self.evenly + ["hard negatives"] * self.hard_negatives
        digest = hashlib.sha256(repr(facts).encode())
        for tokens in (self.training_tokens, self.held_tokens):
            digest.update(b"|" if tokens is None else tokens.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, counted from 0: the same in every process, whatever came before."""
        groups = self._epochs.batch(step)
        turns = uniform(self.seed + 2, step, groups, 1)[:, 0] * self._sizes[groups]
        indices = self._members[self._first[groups] + turns.astype(np.int64)]
        batch = _make_batch(self.training, indices)
        batch["pictures"] = self.augmentation(batch["pictures"], self.seed, step, indices)
        if self.training_tokens is not None:
            drawn = uniform(self.seed + 1, step, indices, 1)[:, 0]
            languages = (drawn * len(self.training_tokens)).astype(np.int64)
            batch |= _caption_tokens(self.training_tokens, indices, languages)
        return batch

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The held-out pictures in batches, always the same; the last may be smaller."""
        for first in range(0, len(self.held), self.batch_size):
            indices = np.arange(first, min(first + self.batch_size, len(self.held)))
            batch = _make_batch(self.held, indices)
            if self.held_tokens is not None:
                batch |= _caption_tokens(self.held_tokens, indices, indices % len(self.held_tokens))
            yield batch


def _group_order(groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch in which the pictures of each group follow one another."""
    random = np.random.default_rng([seed, epoch])
    places = random.permutation(1 + groups.max())[groups]
    return np.lexsort((random.random(len(groups)), places))


def _make_batch(pictures: ImageDataset, indices: np.ndarray) -> dict[str, Tensor]:
    batch = {"pictures": pictures.take(indices), "indices": torch.from_numpy(indices)}
    return batch | ({"labels": torch.from_numpy(pictures.labels[indices])} if pictures.classes else {})


def _caption_tokens(tokens: Tokens, indices: np.ndarray, languages: np.ndarray) -> dict[str, Tensor]:
    which = torch.from_numpy(languages)
    return {"tokens": tokens[which, torch.from_numpy(indices)], "languages": which}
