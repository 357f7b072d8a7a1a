"""Sets of pictures as bytes on disk, memory-mapped, with captions, labels and a split without leaks; knows no model.

Axes: picture, height, width, channels (1 or 3) on disk and in numpy; picture, channels, height, width in tensors.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from keifu.data import catalogue, picture_sources, picture_store
from keifu.data.picture_files import Fit
from keifu.data.picture_sources import in_catalogue
from keifu.errors import UserError, unknown

__all__ = ["Pictures", "Split", "in_catalogue", "read_pictures", "split"]

FORMAT = 1  # goes up when the same source would give other bytes than before
PARTS = "", "validation", "test"  # what a source may say of a picture; training is what is left


@dataclass(frozen=True, eq=False)
class Pictures:
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

    def chosen(self, places: Iterable[int] | np.ndarray) -> "Pictures":
        """Some of the pictures, in the order asked for."""
        chosen = np.array(list(places), np.int64)

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[place] for place in chosen)

        captions = {language: pick(texts) for language, texts in self.captions.items()}
        return replace(
            self, rows=self.rows[chosen], names=pick(self.names), captions=captions, labels=self.labels[chosen],
            groups=self.groups[chosen], parts=pick(self.parts),
        )  # fmt: skip

    def spread(self, count: int) -> "Pictures":
        """At most so many, spread over all of them."""
        return self.chosen(sorted({n * len(self) // count for n in range(count if len(self) else 0)}))

    def named(self, names: Iterable[str]) -> "Pictures":
        """The pictures that have one of these names: the same emoji in another style."""
        wanted = set(names)
        return self.chosen(place for place, name in enumerate(self.names) if name in wanted)

    def distinct(self) -> "Pictures":
        """The first picture of each group: of emoji, those without a skin tone."""
        return self.chosen(np.sort(np.unique(self.groups, return_index=True)[1]))

    def texts(self, language: str | None = None) -> tuple[str, ...]:
        """The captions in a language, or in the first one that there is; none is a `UserError`."""
        if not self.captions:
            raise UserError(f"The pictures of {self.source} have no captions; add them as {', '.join(CAPTIONED)}.")
        wanted = next(iter(self.captions)) if language is None else language
        if wanted not in self.captions:
            raise unknown(f"language of the captions of {self.source}", wanted, self.captions)
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
class Split:
    """Three parts of the same pictures; none shares a group with another."""

    train: Pictures
    validation: Pictures
    test: Pictures

    def sentence(self) -> str:
        """The sizes, for people."""
        sizes = len(self.train), len(self.validation), len(self.test)
        return "{:,} pictures for training, {:,} for validation, {:,} for testing.".format(*sizes)


def read_pictures(
    source: str | Path,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    fit: Fit = "crop",
    leave_out: bool = False,
    cache_dir: str | Path | None = None,
) -> Pictures:
    """The pictures of a source (see `picture_sources`), made once and found again while nothing has changed.

    size: the side of the squares they are brought to by `fit`: the middle is cut out ("crop"), white is added ("pad")
    or they are stretched; unset, they must all have one size. channels: 1 for grey, 3 for colour; unset, grey where the
    first picture is. A file that is no picture, is damaged, or has no caption where others do is a `UserError` that
    names it; with `leave_out` it is left out and stands in `faults` and, counted, in `notes`.
    """
    if size is not None and size < 1:
        raise UserError(f"size is {size}, but a picture has at least 1 pixel.")
    if in_catalogue(source):
        content = catalogue.identity(str(source))
    else:
        root = Path(source).expanduser()
        facts = [(path, path.stat()) for path in picture_sources.files(source)]
        content = "\n".join(f"{path.relative_to(root) if path != root and path.is_relative_to(root) else path.name}:"
                            f"{stat.st_size}:{stat.st_mtime_ns}" for path, stat in facts)  # fmt: skip
    settings = {"format": FORMAT, "content": content, "size": size, "channels": channels, "fit": fit}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    name = Path(source).stem.replace("*", "") or "pictures"
    folder = Path(cache_dir or catalogue.cache() / "pictures") / f"{name}-{key[:16]}"
    index = picture_store.open_index(source, folder, picture_store.Form(size, channels, fit), leave_out)
    pixels = np.memmap(folder / picture_store.PIXELS, np.uint8, "r", shape=tuple(index["shape"]))
    columns = {column: tuple(index[column]) for column in ("names", "classes", "parts", "notes", "faults")}
    return Pictures(
        source=str(source), pixels=pixels, rows=np.arange(len(pixels)), labels=np.array(index["labels"], np.int64),
        groups=np.array(index["groups"], np.int64), stored_fingerprint=index["fingerprint"],
        captions={language: tuple(texts) for language, texts in index["captions"].items()}, **columns,
    )  # fmt: skip


def split(pictures: Pictures, share: float = 0.05, seed: int = 0) -> Split:
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
    return Split(*(pictures.chosen(np.flatnonzero(part[member] == number)) for number in range(3)))
