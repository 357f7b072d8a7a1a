"""Emoji images in two styles (Twemoji, OpenMoji), joined with their names in 14 languages and their groups.

The join is by code points. U+FE0F, which only asks for a coloured glyph, is dropped on both sides.
"""

import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath

from keifu.data.catalogue import catalogue
from keifu.data.images.io import DecodedImage, ImageItem, read_image
from keifu.errors import UserError

ENGLISH = "emoji.json"
TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
TONE_NAMES = re.compile("( (light|medium-light|medium|medium-dark|dark) skin tone)+$")


@dataclass(frozen=True)
class NamedEmoji:
    """An emoji's names by language code, and its group: "Smileys & Emotion", "Food & Drink", ..."""

    names: dict[str, str]
    group: str


@cache
def name_emoji() -> dict[str, NamedEmoji]:
    """Every emoji that has a name and a group, without U+FE0F, in Unicode's order."""
    tables = {_language(path): json.loads(path.read_text(encoding="utf-8")) for path in _name_files()}
    english = {plain(sign): sign for sign in tables["en"]}
    groups = _groups(catalogue.fetch("emoji-groups"))
    return {
        sign: NamedEmoji({code: _words(table[english[sign]]) for code, table in tables.items()}, group)
        for sign, group in groups.items()
        if sign in english
    }


def twemoji() -> Iterator[ImageItem]:
    """Twemoji's drawings of 72 x 72 pixels that have a name."""
    place = catalogue.fetch("twemoji")
    with zipfile.ZipFile(place) as archive:
        yield from _join_names(_members(archive, "72x72", ".png"), lambda data, where, size: read_image(data, where))


def openmoji() -> Iterator[ImageItem]:
    """OpenMoji's drawings of the same names; all are for testing. They are drawn at the size that is asked for."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError("OpenMoji's drawings are SVG and need resvg-py: `pip install 'keifu[svg]'`.") from None

    def drawn(data: bytes, where: str, size: int | None) -> DecodedImage:
        text = gzip.decompress(data).decode()
        side = size or 72
        return read_image(resvg_py.svg_to_bytes(text, width=side, height=side, skip_system_fonts=True), where)

    place = catalogue.fetch("openmoji-svg")
    with zipfile.ZipFile(place) as archive:
        yield from _join_names(_members(archive, "svg", ".svg.gz"), drawn, "test")


def plain(sign: str) -> str:
    """An emoji without U+FE0F."""
    return sign.replace("\ufe0f", "")


def _join_names(members: dict[str, bytes], draw, part: str = "") -> Iterator[ImageItem]:
    """The drawings that have a name, in the order of the names."""
    for sign, known in name_emoji().items():
        if sign in members:
            where = f"{sign} ({known.names['en']})"
            alike = f"signs {TONES.sub('', sign)}", f"name {TONE_NAMES.sub('', known.names['en'])}"
            yield ImageItem(sign, where, partial(draw, members[sign], where), known.names, known.group, alike, part)


def _members(archive: zipfile.ZipFile, folder: str, suffix: str) -> dict[str, bytes]:
    """A drawing's bytes by the emoji that its file name spells in hexadecimal: 1f44b-1f3fd.png."""
    found = {}
    for name in archive.namelist():
        path = PurePosixPath(name)
        if path.parent.name == folder and name.endswith(suffix):
            sign = "".join(chr(int(code, 16)) for code in path.name.removesuffix(suffix).split("-"))
            found[plain(sign)] = archive.read(name)
    return found


def _name_files() -> list[Path]:
    folder = catalogue.fetch("emoji-names")
    return [folder / ENGLISH, *sorted(folder.glob("emoji_*.json"))]


def _language(path: Path) -> str:
    return "en" if path.name == ENGLISH else path.stem.removeprefix("emoji_")


def _words(entry: str | dict[str, str]) -> str:
    """`:waving_hand:` as waving hand; of English an object with more is given."""
    name = entry if isinstance(entry, str) else entry["en"]
    return name.strip(":").replace("_", " ")


def _groups(file: Path) -> dict[str, str]:
    """The group of each emoji of Unicode's emoji-test.txt, in its order."""
    groups, group = {}, ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            sign = "".join(chr(int(code, 16)) for code in line.partition(";")[0].split())
            groups.setdefault(plain(sign), group)
    return groups
