"""Sources of images with captions and labels, read one by one: the catalogue, folders, and WebDataset shards.

A source is one of:
- the name of a catalogue entry;
- a folder with metadata.jsonl or metadata.csv (Hugging Face's imagefolder): `file_name`, captions in `text` or
  `caption` (`text_ja`, `caption_ja`, ... for further languages), and `label`, where there are such columns;
- a folder with a subfolder for each class, or with images alone;
- WebDataset shards: a .tar file, a folder of them or a pattern such as "shards/*.tar". Files whose names are equal up
  to the first dot belong together: 000.png with 000.txt (a caption), 000.cls (a label), 000.json (both).

Folders called train, validation and test at the top level define the split.

Emoji in two styles (Twemoji, OpenMoji) are joined by code points with their names in 14 languages and their groups.
U+FE0F, which only asks for a coloured glyph, is dropped on both sides.
"""

import glob
import gzip
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from keifu.data.catalogue import catalogue
from keifu.data.images.io import UNSTATED, DecodedImage, ImageItem, mnist, read_image
from keifu.data.records import read_records
from keifu.data.text.text_files import Problem
from keifu.errors import UserError, unknown
from keifu.files import hidden, parse_json, plain_file, reading

TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
TONE_NAMES = re.compile("( (light|medium-light|medium|medium-dark|dark) skin tone)+$")
CLOTHES = "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"


def _digits() -> Iterator[ImageItem]:
    """MNIST's sample of 5,000."""
    pictures, labels = mnist()
    return _arrays("mnist", pictures.numpy(), labels.tolist(), "0123456789")


def _clothes() -> Iterator[ImageItem]:
    """Fashion-MNIST: 60,000 to train on, then 10,000 to test on, as its authors split them."""
    folder = catalogue.fetch("fashion-mnist")
    for prefix, part in (("train", ""), ("t10k", "test")):
        pictures, labels = (read_idx(folder / f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        yield from _arrays(f"fashion-mnist {prefix}", pictures, labels.tolist(), CLOTHES, part)


def _photos() -> Iterator[ImageItem]:
    folder = catalogue.fetch("photos")
    for name, caption in catalogue.CATALOGUE["photos"].captions.items():
        (path,) = folder.glob(f"{name}.*")
        yield _item(path, folder, {"en": caption}, None)


def _arrays(
    source: str, pictures: np.ndarray, labels: Sequence[int], classes: Sequence[str], part: str = ""
) -> Iterator[ImageItem]:
    for place, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        name = f"{source} {place}"
        yield ImageItem(name, name, partial(_of_array, pixels), label=classes[label], part=part)


def _of_array(pixels: np.ndarray, size: int | None) -> DecodedImage:
    return DecodedImage(Image.fromarray(pixels))


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a gzipped file of MNIST's own format: two zeros, the type 8, the axes, their lengths."""
    with reading(path), gzip.open(plain_file(path)) as file:
        content = file.read(LARGEST_IDX)
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@cache
def name_emoji() -> dict[str, tuple[dict[str, str], str]]:
    """Every emoji that has a name and a group, without U+FE0F, in Unicode's order: its names by language code, and its
    group, such as "Smileys & Emotion" or "Food & Drink"."""
    folder = catalogue.fetch("emoji-names")
    files = {"en": folder / "emoji.json"} | {
        p.stem.removeprefix("emoji_"): p for p in sorted(folder.glob("emoji_*.json"))
    }
    tables = {language: json.loads(path.read_text(encoding="utf-8")) for language, path in files.items()}
    english = {_plain(sign): sign for sign in tables["en"]}
    groups = _emoji_groups(catalogue.fetch("emoji-groups"))
    return {
        sign: ({code: _words(table[english[sign]]) for code, table in tables.items()}, group)
        for sign, group in groups.items()
        if sign in english
    }


def _twemoji() -> Iterator[ImageItem]:
    """Twemoji's drawings of 72 x 72 pixels that have a name."""
    return _join_names("twemoji", "72x72", ".png", lambda data, where, size: read_image(data, where))


def _openmoji() -> Iterator[ImageItem]:
    """OpenMoji's drawings of the same names; all are for testing. They are drawn at the size that is asked for."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError("OpenMoji's drawings are SVG and need resvg-py: `pip install 'keifu[svg]'`.") from None

    def drawn(data: bytes, where: str, size: int | None) -> DecodedImage:
        text = gzip.decompress(data).decode()
        side = size or 72
        return read_image(resvg_py.svg_to_bytes(text, width=side, height=side, skip_system_fonts=True), where)

    return _join_names("openmoji-svg", "svg", ".svg.gz", drawn, "test")


def _plain(sign: str) -> str:
    """An emoji without U+FE0F."""
    return sign.replace("\ufe0f", "")


def _join_names(entry: str, folder: str, suffix: str, draw, part: str = "") -> Iterator[ImageItem]:
    """The drawings of an archive that have a name, in the order of the names.

    The name of a drawing's file spells its emoji in hexadecimal: 1f44b-1f3fd.png.
    """
    drawings = {}
    with zipfile.ZipFile(catalogue.fetch(entry)) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.parent.name == folder and name.endswith(suffix):
                drawings[_spelled(path.name.removesuffix(suffix).split("-"))] = archive.read(name)
    for sign, (names, group) in name_emoji().items():
        if sign in drawings:
            where = f"{sign} ({names['en']})"
            alike = f"signs {TONES.sub('', sign)}", f"name {TONE_NAMES.sub('', names['en'])}"
            yield ImageItem(sign, where, partial(draw, drawings[sign], where), names, group, alike, part)


def _spelled(codes: Iterable[str]) -> str:
    """The emoji of these code points in hexadecimal, without U+FE0F."""
    return _plain("".join(chr(int(code, 16)) for code in codes))


def _words(entry: str | dict[str, str]) -> str:
    """`:waving_hand:` as waving hand; of English an object with more is given."""
    name = entry if isinstance(entry, str) else entry["en"]
    return name.strip(":").replace("_", " ")


def _emoji_groups(file: Path) -> dict[str, str]:
    """The group of each emoji of Unicode's emoji-test.txt, in its order."""
    groups, group = {}, ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            groups.setdefault(_spelled(line.partition(";")[0].split()), group)
    return groups


CATALOGUED: dict[str, Callable[[], Iterator[ImageItem]]] = {
    "emoji": _twemoji,
    "openmoji": _openmoji,
    "mnist": _digits,
    "fashion-mnist": _clothes,
    "photos": _photos,
}


SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"
LARGEST_MEMBER, LARGEST_IDX = 2**28, 2**30  # bytes of one file in an archive, and of MNIST's format, unpacked
METADATA = "metadata.jsonl", "metadata.csv"
PARTS = {
    "train": "", "training": "", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
LANGUAGE = re.compile(r"(?:text|caption)(?:_([a-z]{2}))?")


def items(source: str | Path, problem: Problem) -> Iterator[ImageItem]:
    """All pictures of a source in a fixed order, unread.

    `problem` is called with a sentence for each one that is not as the first one is: without its caption (in one of its
    languages) or label, named and not there, or there and not named. If it returns, that picture is left out.
    """
    first: ImageItem | None = None
    for item in _all(source, problem):
        first = first or item
        if lacking := _lacking(item, first):
            problem(f"{item.where} has no {lacking}, and {first.where} has one.")
        else:
            yield item


def files(source: str | Path) -> list[Path]:
    """The files of a source that is not in the catalogue, in order; none is a `UserError`."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise UserError(f"{path} is one file, and pictures come in a folder or in .tar shards: name its folder.")
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and not hidden(file.relative_to(path)))
    if found := sorted(Path(name) for name in glob.glob(str(path), recursive=True) if name.endswith(".tar")):
        return found
    beside = [str(path.with_name(each.name)) for each in path.parent.glob("[!.]*")] if path.parent.is_dir() else []
    raise unknown("folder of pictures, .tar shard or catalogue entry", str(source), [*CATALOGUED, *beside])


def in_catalogue(source: str | Path) -> bool:
    """Whether a source is the name of a picture entry of the catalogue."""
    return isinstance(source, str) and source in CATALOGUED


def _all(source: str | Path, problem: Problem) -> Iterator[ImageItem]:
    if in_catalogue(source):
        return CATALOGUED[str(source)]()
    found, root = files(source), Path(source).expanduser()
    shards = [path for path in found if path.suffix.lower() == ".tar"]
    pictures = [path for path in found if path.suffix.lower() in SUFFIXES]
    tables = [path for path in found if path.name in METADATA]
    if shards:
        return _shards(shards, root, problem)
    if not pictures and not tables:
        others = sorted({path.suffix or path.name for path in found})[:8]
        holds = f"holds {', '.join(others)}" if others else "is empty"
        raise UserError(f"There is no picture in {source}: it {holds}; pictures end in {', '.join(SUFFIXES)}.")
    return _from_tables(root, tables, pictures, problem) if tables else _by_folder(root, pictures)


def _lacking(item: ImageItem, first: ImageItem) -> str:
    """What the first picture has and this one has not, in words."""
    for language in first.captions:
        if not item.captions.get(language):
            return "caption" if language == UNSTATED else f"caption in {language!r}"
    return "label" if first.label and not item.label else ""


def _from_tables(root: Path, tables: list[Path], pictures: list[Path], problem: Problem) -> Iterator[ImageItem]:
    """The pictures that the tables name, each beside its table; those that none names are faults."""
    named = set()
    for table in tables:
        for where, cells in read_records(table):
            if not isinstance(name := cells.get("file_name"), str):
                raise UserError(f"{where}, has no file_name: it names the picture, beside {table.name}.")
            path = table.parent / name
            named.add(path)
            if path.is_file():
                yield _item(path, root, _captions(cells), _text(cells.get("label")))
            else:
                problem(f"{where}: there is no picture {path}.")
    for path in pictures:
        if path not in named:
            problem(f"{path} has no caption: no {tables[0].name} names it.")


def _by_folder(root: Path, pictures: list[Path]) -> Iterator[ImageItem]:
    """Pictures by class, where all lie in folders that are not parts; otherwise without any label."""
    inner = [_inside(path, root) for path in pictures]
    classes = all(len(parts) > 1 for parts in inner)
    for path, parts in zip(pictures, inner, strict=True):
        yield _item(path, root, {}, parts[0] if classes else None)


def _item(path: Path, root: Path, captions: dict[str, str], label: str | None) -> ImageItem:
    name, part = _placed(path, root)
    return ImageItem(name, str(path), lambda size: read_image(path), captions, label, part=part)


def _placed(path: Path, root: Path) -> tuple[str, str]:
    """A file's name in its set, and the part that its folder at the head of the set says."""
    relative = path.relative_to(root) if path.is_relative_to(root) else path
    return relative.as_posix(), PARTS.get(relative.parts[0].lower(), "") if len(relative.parts) > 1 else ""


def _inside(path: Path, root: Path) -> tuple[str, ...]:
    """A path's parts below the folders that part the set."""
    parts = path.relative_to(root).parts
    return parts[1:] if len(parts) > 1 and parts[0].lower() in PARTS else parts


def _shards(paths: list[Path], root: Path, problem: Problem) -> Iterator[ImageItem]:
    for path in paths:
        name, part = _placed(path, root if root.is_dir() else path.parent)
        with reading(path), tarfile.open(plain_file(path)) as archive:
            plain = (member for member in archive if member.isfile())
            for key, members in groupby(plain, lambda member: _key(member.name)[0]):
                contents = {_key(member.name)[1]: _content(archive, member) for member in members}
                if item := _sample(f"{name}/{key}", f"{path}, {key}", contents, part, problem):
                    yield item


def _key(name: str) -> tuple[str, str]:
    """The key of a sample and the extension of its file: a/000 and .png of a/000.png."""
    path = PurePosixPath(name)
    stem, dot, rest = path.name.partition(".")
    return str(path.with_name(stem or path.name)), (dot + rest).lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > LARGEST_MEMBER or member.issparse():
        what = f"{member.name} with {member.size:,} bytes"
        raise UserError(f"{archive.name} holds {what}, and at most {LARGEST_MEMBER:,} are read of one file.")
    opened = archive.extractfile(member)
    assert opened
    return opened.read()


def _sample(name: str, where: str, contents: dict[str, bytes], part: str, problem: Problem) -> ImageItem | None:
    """The picture among the files of a sample, with what the others say of it."""
    pictures = [data for kind, data in contents.items() if kind.endswith(SUFFIXES)]
    if len(pictures) != 1:
        problem(f"{where} has {len(pictures)} pictures among {', '.join(contents)}, and one is needed.")
        return None
    try:
        cells = parse_json(contents.get(".json", b"{}"), "its .json")
        words = {kind: contents[kind].decode().strip() for kind in (".txt", ".cls") if kind in contents}
    except ValueError as error:
        problem(f"{where}: its .json, .txt or .cls cannot be read: {error}.")
        return None
    captions = _captions(cells if isinstance(cells, dict) else {})
    captions |= {UNSTATED: words[".txt"]} if ".txt" in words else {}
    label = words.get(".cls") or _text(cells.get("label") if isinstance(cells, dict) else None)
    return ImageItem(name, where, lambda size: read_image(pictures[0], where), captions, label, part=part)


def _captions(cells: dict[str, Any]) -> dict[str, str]:
    """The captions among a record's fields, by language."""
    found = {}
    for column, value in cells.items():
        if (named := LANGUAGE.fullmatch(column)) and (text := _text(value)):
            found[named[1] or UNSTATED] = text
    return found


def _text(value: Any) -> str | None:
    """A cell as a person wrote it; None where it is empty."""
    return None if value is None else str(value).strip() or None
