"""Emoji joined with their names, out of tiny archives of the same form; and the other entries with pictures."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keifu.data.catalogue.catalogue import CATALOGUE
from keifu.data.images import catalogued
from keifu.data.images.catalogued import CATALOGUED
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split
from keifu.errors import UserError

SIGNS = {  # file name: English name, Japanese name, group
    "1f44b": ("waving_hand", "手を振る", "People & Body"),
    "1f44b-1f3fd": ("waving_hand_medium_skin_tone", "手を振る:_中間の肌色", "People & Body"),
    "2764": ("red_heart", "赤いハート", "Smileys & Emotion"),
    "1f1f3-1f1f4": ("Norway", "ノルウェー", "Flags"),
    "1f1f8-1f1ef": ("Svalbard_&_Jan_Mayen", "スバールバル", "Flags"),
}
SVG = '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><rect width="72" height="36" fill="#ff0000"/></svg>'


def sign(name: str) -> str:
    return "".join(chr(int(code, 16)) for code in name.split("-"))


@pytest.fixture(autouse=True)
def _archives(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    catalogued.name_emoji.cache_clear()
    # Of names some have U+FE0F; drawings do not.
    full = {name: sign(name) + ("\ufe0f" if name == "2764" else "") for name in SIGNS}
    names = place("emoji-names")
    english = {full[name]: {"en": f":{words[0]}:", "status": 2} for name, words in SIGNS.items()}
    japanese = {full[name]: f":{words[1]}:" for name, words in SIGNS.items()}
    write(names / "emoji.json", json.dumps(english | {"\u2764": {"en": ":red_heart:", "status": 4}}))
    write(names / "emoji_ja.json", json.dumps(japanese | {"\u2764": ":赤いハート:"}))
    codes = {name: name.replace("-", " ").upper() for name in SIGNS}
    lines = [f"# group: {words[2]}\n{codes[name]} ; fully-qualified # x" for name, words in SIGNS.items()]
    write(place("emoji-groups"), "\n".join(["# a comment", "", *lines]))
    with zipfile.ZipFile(made(place("twemoji")), "w") as archive:
        for number, name in enumerate([*SIGNS, "e50a"]):
            colour = 90 if name.startswith("1f1f") else number * 40  # the two flags look the same
            archive.writestr(f"x/assets/72x72/{name}.png", png((colour, 0, 0, 255)))
            archive.writestr(f"x/assets/svg/{name}.svg", SVG)
    with zipfile.ZipFile(made(place("openmoji-svg")), "w") as archive:
        for name in ("1F44B", "2764-FE0F", "E000"):
            archive.writestr(f"x/openmoji/svg/{name}.svg.gz", gzip.compress(SVG.encode()))
            archive.writestr(f"x/openmoji/svg/{name}.svg.zst", b"")
    yield
    catalogued.name_emoji.cache_clear()


def place(name: str) -> Path:
    from keifu.folders import cache

    entry = CATALOGUE[name]
    return cache() / entry.archive.folder / entry.member


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, text: str) -> None:
    made(path).write_text(text, "utf-8")


def png(colour: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (72, 72), colour).save(file, "PNG")
    return file.getvalue()


def test_drawings_are_joined_with_their_names_and_groups() -> None:
    found = read_images("emoji")
    assert found.names == tuple(map(sign, SIGNS)) and len(found) == 5  # e50a has no name
    assert found.texts()[:3] == ("waving hand", "waving hand medium skin tone", "red heart")
    assert found.texts("ja")[1:3] == ("手を振る: 中間の肌色", "赤いハート")
    assert [found.classes[label] for label in found.labels] == [words[2] for words in SIGNS.values()]
    assert found.shape == (3, 72, 72)


def test_skin_tones_and_equal_flags_stay_on_one_side_of_a_split() -> None:
    assert read_images("emoji").groups.tolist() == [0, 0, 2, 3, 3]
    assert read_images("emoji").distinct().texts() == ("waving hand", "red heart", "Norway")


@pytest.mark.parametrize(
    "names",
    [
        ["woman golfing", "man golfing", "person golfing medium-dark skin tone"],
        ["women holding hands", "woman and man holding hands light skin tone dark skin tone", "people holding hands"],
        ["man red hair", "woman light skin tone red hair"],
        ["prince", "princess dark skin tone", "person with crown"],
        ["mermaid", "merman", "merperson"],
        ["Mrs. Claus", "Santa Claus", "Mx Claus"],
        ["kiss", "kiss woman man", "kiss person person light skin tone dark skin tone"],
        ["family", "family man woman girl boy", "family adult child"],
        ["left arrow", "up-down arrow", "right arrow curving left"],
        ["backhand index pointing left", "backhand index pointing down"],
        ["woman walking", "person walking facing right"],
        ["left-facing fist", "right-facing fist"],
        ["three o’clock", "eleven-thirty"],
        ["fast up button", "fast-forward button", "fast reverse button"],
    ],
)
def test_genders_and_directions_are_one_family(names: list[str]) -> None:
    assert len({catalogued.family(name) for name in names}) == 1


def test_other_emoji_are_families_of_their_own() -> None:
    names = [
        "luggage",
        "left luggage",
        "cat",
        "cat face",
        "red heart",
        "green heart",
        "mechanic",
        "farmer",
        "person",
        "kiss",
        "kiss mark",
        "snowman",
        "speech balloon",
        "left speech bubble",
        "raised fist",
        "thumbs up",
        "OK hand",
        "rightwards hand",
        "index pointing up",
        "backhand index pointing up",
        "man’s shoe",
        "woman’s sandal",
    ]
    assert len({catalogued.family(name) for name in names}) == len(names)


def test_a_set_of_emoji_knows_its_families() -> None:
    assert read_images("emoji").families.tolist() == [0, 0, 2, 3, 3]


def test_the_other_style_is_drawn_at_the_size_asked_for_and_held_out() -> None:
    pytest.importorskip("resvg_py")
    found = read_images("openmoji", size=16)
    assert found.texts() == ("waving hand", "red heart") and found.shape == (3, 16, 16)
    assert found.take([0])[0, :, 3, 3].tolist() == [255, 0, 0] and found.take([0])[0, :, 12, 3].tolist() == [255] * 3
    assert len(split(found).test) == 2
    assert found.with_names(read_images("emoji").names).names == found.names


def test_without_resvg_a_sentence_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"are SVG and need resvg-py: pip install '\.\[svg\]' in keifu's checkout"):
        read_images("openmoji")


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


def test_fashion_mnist_keeps_its_own_test_set() -> None:
    for prefix, count in (("train", 40), ("t10k", 4)):
        pictures = np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2) + (prefix == "t10k") * 99
        for kind, values in (("images-idx3", pictures), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            made(place("fashion-mnist") / f"{prefix}-{kind}-ubyte.gz").write_bytes(idx(values))
    found = split(read_images("fashion-mnist"), share=0.1)
    assert found.test.shape == (1, 28, 28) and found.test.take(slice(None))[:, 0, 0, 0].tolist() == [99, 100, 101, 102]
    assert len(found.validation) == 4 and found.test.classes[found.test.labels[3]] == "dress"


def test_every_photo_has_a_caption_and_its_file() -> None:
    for name in CATALOGUE["photos"].captions:
        Image.new("L", (5, 4)).save(made(place("photos") / f"{name}.png"))
    found = read_images("photos", size=4)
    assert len(found) == 24 and found.texts()[4] == "the face of a ginger cat" and len(set(found.texts())) == 24


def test_every_picture_entry_can_be_read() -> None:
    assert {name for name, entry in CATALOGUE.items() if entry.kind == "pictures"} == CATALOGUED.keys()
