"""The picture entries of the catalogue as pictures with captions and labels; knows no cache and no batch."""

import gzip
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from keifu.data import catalogue, emoji
from keifu.data.images import mnist
from keifu.data.picture_files import Shot, read_picture
from keifu.data.picture_item import Item

CLOTHES = "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
PHOTOS = {
    "astronaut": "an astronaut in an orange space suit smiles in front of a flag",
    "brick": "a wall of bricks",
    "camera": "a man in a coat looks through a camera on a tripod",
    "cell": "a living cell under a microscope",
    "chelsea": "the face of a ginger cat",
    "clock_motion": "a clock, blurred by motion",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "old coins in rows on a dark cloth",
    "color": "a wheel of all colours",
    "grass": "grass from above",
    "gravel": "gravel from above",
    "horse": "the black outline of a horse",
    "hubble_deep_field": "many distant galaxies in a dark sky",
    "ihc": "stained tissue under a microscope",
    "logo": "a logo of a snake beside the letters of a name",
    "microaneurysms": "small dark spots in the retina of an eye",
    "moon": "the surface of the moon",
    "motorcycle_left": "a motorcycle in a garage, from the left camera",
    "motorcycle_right": "a motorcycle in a garage, from the right camera",
    "page": "a printed page of a book, unevenly lit",
    "phantom": "a test picture of ellipses for computed tomography",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad at dusk",
    "text": "handwritten lines of mathematics",
}


def _digits() -> Iterator[Item]:
    """MNIST's sample of 5,000."""
    pictures, labels = mnist()
    return _arrays("mnist", pictures.numpy(), labels.tolist(), [str(digit) for digit in range(10)])


def _clothes() -> Iterator[Item]:
    """Fashion-MNIST: 60,000 to train on, then 10,000 to test on, as its authors have parted them."""
    folder = catalogue.fetch("fashion-mnist")
    for prefix, part in (("train", ""), ("t10k", "test")):
        pictures, labels = (read_idx(folder / f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        yield from _arrays(f"fashion-mnist {prefix}", pictures, labels.tolist(), CLOTHES, part)


def _photos() -> Iterator[Item]:
    folder = catalogue.fetch("photos")
    for name, caption in PHOTOS.items():
        (path,) = folder.glob(f"{name}.*")
        yield Item(path.name, str(path), _reader(path), {"en": caption})


def _reader(path: Path) -> Callable[[int | None], Shot]:
    return lambda size: read_picture(path)


def _arrays(
    source: str, pictures: np.ndarray, labels: Iterable[int], classes: Iterable[str], part: str = ""
) -> Iterator[Item]:
    names = list(classes)
    for place, label in enumerate(labels):
        yield Item(f"{source} {place}", f"{source} {place}", _of_array(pictures[place]), label=names[label], part=part)


def _of_array(pixels: np.ndarray) -> Callable[[int | None], Shot]:
    return lambda size: Shot(Image.fromarray(pixels))


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a gzipped file of MNIST's own format: two zeros, the type 8, the axes, their lengths."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


CATALOGUED: dict[str, Callable[[], Iterator[Item]]] = {
    "emoji": emoji.twemoji,
    "openmoji": emoji.openmoji,
    "mnist": _digits,
    "fashion-mnist": _clothes,
    "photos": _photos,
}
