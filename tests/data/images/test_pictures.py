"""Sets of pictures: where they come from, what is wrong with them, and how they are parted."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from keifu.data.images.dataset import ImageDataset, groups, read_images
from keifu.data.images.splits import split
from keifu.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures_toys import COLOURS, folder, imagefolder, picture, shard  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))


def colour_of(pictures: ImageDataset, place: int) -> tuple[int, ...]:
    return tuple(pictures.take([place])[0, :, 0, 0].tolist())


def test_an_imagefolder(tmp_path: Path) -> None:
    rows = [
        {"file_name": "b.png", "text": " a red one ", "text_ja": "赤", "label": 2, "text_length": 3},
        {"file_name": "deep/a.png", "text": "a green one", "text_ja": "緑", "label": 10},
    ]
    found = read_images(imagefolder(tmp_path / "set", rows))
    assert found.names == ("b.png", "deep/a.png") and found.classes == ("2", "10") and found.labels.tolist() == [0, 1]
    assert found.captions == {"und": ("a red one", "a green one"), "ja": ("赤", "緑")}
    assert found.texts() == ("a red one", "a green one") and found.texts("ja") == ("赤", "緑")
    assert found.shape == (3, 6, 6) and colour_of(found, 1) == (0, 128, 0)
    assert found.sentence().endswith("2 colour pictures of 6 x 6, captions in und, ja, 2 classes.")
    with pytest.raises(UserError, match="no language of the captions of .*set 'jp'. Did you mean 'ja'"):
        found.texts("jp")


def test_metadata_in_csv_and_a_table_in_each_part(tmp_path: Path) -> None:
    content = {}
    for part, colour in (("train", "red"), ("test", "blue")):
        content |= {f"{part}/metadata.csv": f"file_name,caption\nx.png,{colour}\n", f"{part}/x.png": picture(colour)}
    found = read_images(folder(tmp_path / "set", content))
    assert dict(zip(found.names, found.parts, strict=True)) == {"train/x.png": "", "test/x.png": "test"}
    assert split(found).test.texts() == ("blue",)


def test_a_folder_for_each_class_with_parts(tmp_path: Path) -> None:
    names = "train/dogs/1.png", "train/cats/2.png", "val/dogs/3.png", "test/cats/4.png", ".hidden/cats/5.png"
    content = {name: picture(colour) for name, colour in zip(names, COLOURS, strict=False)}
    found = read_images(folder(tmp_path / "set", content))
    assert found.classes == ("cats", "dogs") and len(found) == 4
    parted = split(found)
    assert [part.names for part in (parted.validation, parted.test)] == [("val/dogs/3.png",), ("test/cats/4.png",)]
    assert [found.classes[label] for label in found.labels] == [name.split("/")[1] for name in found.names]


def test_pictures_alone(tmp_path: Path) -> None:
    found = read_images(folder(tmp_path / "set", {"a.png": picture("red"), "b.jpeg": picture("blue"), "x.txt": "?"}))
    assert len(found) == 2 and found.classes == () and found.captions == {} and found.labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="have no captions; add them as metadata.jsonl"):
        found.texts()


def test_shards(tmp_path: Path) -> None:
    shard(tmp_path / "s" / "0.tar", {"a/0.png": picture("red"), "a/0.txt": "red\n", "a/0.cls": "1",
                                     "a/1.cls": "0", "a/1.seg.PNG": picture("blue"), "a/1.txt": "blue"})  # fmt: skip
    shard(tmp_path / "s" / "1.tar", {"0.jpg": picture("black"), "0.json": json.dumps({"caption": "b", "label": 1})})
    for source in (tmp_path / "s", str(tmp_path / "s" / "*.tar")):
        found = read_images(source)
        assert found.names == ("0.tar/a/0", "0.tar/a/1", "1.tar/0") and found.texts() == ("red", "blue", "b")
        assert found.classes == ("0", "1") and found.labels.tolist() == [1, 0, 1]
        assert colour_of(found, 1) == (0, 0, 255)
    assert len(read_images(tmp_path / "s" / "1.tar")) == 1


def test_a_nameless_file_of_a_shard_is_skipped(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {".": "", "/": "x", "0.png": picture("red"), "0.txt": "red"})
    assert read_images(tmp_path / "0.tar").texts() == ("red",)


def test_shards_in_the_folders_of_parts(tmp_path: Path) -> None:
    for part, colour in (("train", "red"), ("test", "blue")):
        shard(tmp_path / "s" / part / "0.tar", {"0.png": picture(colour), "0.txt": colour})
    found = read_images(tmp_path / "s")
    assert dict(zip(found.names, found.parts, strict=True)) == {"train/0.tar/0": "", "test/0.tar/0": "test"}
    assert split(found).test.texts() == ("blue",)


FAULTS = {
    "no picture": ({"b.png": "words"}, r"b.png is not a picture"),
    "cut off": ({"b.png": picture("blue")[:50]}, r"b.png is damaged or cut off"),
    "not there": ({}, r"metadata.jsonl, line 2: there is no picture .*b.png"),
    "not named": ({"b.png": picture("blue"), "c.png": picture("pink")}, r"c.png has no caption: no metadata.jsonl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_picture_is_named_or_left_out_and_counted(fault: str, tmp_path: Path) -> None:
    content, sentence = FAULTS[fault]
    rows = "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in ("a.png", "b.png"))
    source = folder(tmp_path / "set", {"metadata.jsonl": rows, "a.png": picture("red"), **content})
    with pytest.raises(UserError, match=f"{sentence}.*Correct it, or remove it from the data"):
        read_images(source)
    found = read_images(source, leave_out=True)
    assert found.names[0] == "a.png" and len(found.faults) == 1 and re.search(sentence, found.faults[0])
    assert found.notes == (f"Left out: 1. {found.faults[0]}",)
    with pytest.raises(UserError, match=sentence):  # though it is in the cache now
        read_images(source)


def test_a_missing_caption_or_label_is_named(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a", "label": "x"}, {"file_name": "b.png", "text": "  ", "label": "y"},
            {"file_name": "c.png", "text": "c"}]  # fmt: skip
    source = imagefolder(tmp_path / "set", rows)
    with pytest.raises(UserError, match=r"b.png has no caption, and .*a.png has one\."):
        read_images(source)
    assert [fault.rpartition("/")[2][:18] for fault in read_images(source, leave_out=True).faults]
    shard(tmp_path / "s.tar", {"0.png": picture("red"), "0.txt": "red", "1.png": picture("red")})
    with pytest.raises(UserError, match="s.tar, 1 has no caption, and .*s.tar, 0 has one"):
        read_images(tmp_path / "s.tar")
    shard(tmp_path / "t.tar", {"0.txt": "red", "0.cls": "1"})
    with pytest.raises(UserError, match="t.tar, 0 has 0 pictures among .txt, .cls, and one is needed"):
        read_images(tmp_path / "t.tar")
    (tmp_path / "u.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:700])
    with pytest.raises(UserError, match="u.tar is damaged, .*unexpected end of data"):
        read_images(tmp_path / "u.tar")


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("table", ["metadata.jsonl", "inner/metadata.csv"])
def test_a_file_name_cannot_leave_the_folder(tmp_path: Path, absolute: bool, table: str) -> None:
    secret = folder(tmp_path, {"set2/secret.png": picture("red")}) / "set2" / "secret.png"
    name = str(secret) if absolute else f"{'../' * (1 + table.count('/'))}set2/secret.png"
    text = json.dumps({"file_name": name, "text": "x"}) if table.endswith("jsonl") else f"file_name,text\n{name},x\n"
    root = folder(tmp_path / "set", {table: text, "inner/a.png": picture("blue")})
    with pytest.raises(UserError, match=r"line [12]: file_name .*secret.png' leaves the folder .*set; name a picture"):
        read_images(root)


@pytest.mark.parametrize("damage", [b"[]", b"{}", b"", b'{"shape": [1, 2, 3, 4]}'])
@pytest.mark.parametrize("name", ["index.json", "files.json", "pixels.bin"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, name: str, damage: bytes) -> None:
    root = folder(tmp_path / "set", {"a.png": picture("blue"), "b.png": picture("red")})
    first = read_images(root)
    (file,) = (tmp_path / "cache" / "pictures").glob(f"set-*/{name}")
    file.write_bytes(damage)
    again = read_images(root)
    assert again.fingerprint == first.fingerprint and colour_of(again, 1) == (255, 0, 0)


def test_what_a_source_must_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'emojis'. Did you mean 'emoji'"):
        read_images("emojis")
    with pytest.raises(UserError, match="There is no picture in .*set: it holds .md, .txt; pictures end in .png"):
        read_images(folder(tmp_path / "set", {"a.txt": "", "b.md": ""}))
    with pytest.raises(UserError, match="a.txt is one file, and pictures come in a folder"):
        read_images(tmp_path / "set" / "a.txt")
    with pytest.raises(UserError, match="line 1, has no file_name"):
        read_images(folder(tmp_path / "other", {"metadata.jsonl": '{"text": "a"}\n', "a.png": picture("red")}))
    with pytest.raises(UserError, match="size is 0, but"):
        read_images(tmp_path / "set", size=0)


def test_sizes_and_channels(tmp_path: Path) -> None:
    content = {"a.png": picture("red", (6, 4)), "b.png": picture("blue", (4, 6))}
    source = folder(tmp_path / "set", content)
    with pytest.raises(UserError, match="b.png has 4 x 6 pixels, and .*a.png 6 x 4: give one size for all .* as 4"):
        read_images(source)
    assert read_images(source, size=3).shape == (3, 3, 3)
    assert read_images(source, size=3, channels=1).shape == (1, 3, 3)
    padded = read_images(source, size=6, fit="pad").take([0])
    assert (padded[0, :, 0] == 255).all() and (padded[0, 0] == 255).all() and (padded[0, 1, 1:5] == 0).all()


def test_a_second_reading_comes_from_the_disk_until_a_file_changes(tmp_path: Path, capsys) -> None:
    source = folder(tmp_path / "set", {"a.png": picture("red"), "b.png": picture("blue")})
    first = read_images(source)
    assert "Reading" in capsys.readouterr().err
    again = read_images(source)
    assert capsys.readouterr().err == "" and again.fingerprint == first.fingerprint
    (source / "b.png").write_bytes(picture("lightblue"))
    changed = read_images(source)
    assert changed.fingerprint != first.fingerprint and colour_of(changed, 1) == (173, 216, 230)
    damaged = next((tmp_path / "cache" / "pictures").glob("set-*/pixels.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert len(read_images(source)) == 2


def toys(
    names: list[str], alike: list[int] | None = None, labels: list[int] | None = None, parts=(),
    families: list[int] | None = None,
) -> ImageDataset:  # fmt: skip
    count = len(names)
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    labels = labels or [0] * count
    return ImageDataset(
        "toys", pixels, np.arange(count), tuple(names), {"en": tuple(names)}, np.array(labels),
        tuple(map(str, sorted(set(labels)))), np.array(alike or range(count)),
        np.array(families or alike or range(count)), tuple(parts) or ("",) * count, "f",
    )  # fmt: skip


def test_pictures_that_are_alike_stay_together() -> None:
    assert groups([("a",), ("b",), ("a", "c"), ("d",), ("c", "d")]) == [0, 1, 0, 0, 0]
    alike = [place // 3 for place in range(600)]
    parted = split(toys([f"{place}" for place in range(600)], alike), share=0.1)
    sides = [set(part.groups.tolist()) for part in (parted.train, parted.validation, parted.test)]
    assert [len(side) for side in sides] == [160, 20, 20]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_every_class_gives_its_share_and_the_seed_decides_which() -> None:
    whole = toys([f"{place}" for place in range(300)], labels=[place % 3 for place in range(300)])
    parted, again, other = split(whole), split(whole), split(whole, seed=1)
    assert np.bincount(parted.test.labels).tolist() == [5, 5, 5] == np.bincount(parted.validation.labels).tolist()
    assert parted.test.names == again.test.names != other.test.names
    turned = split(whole.subset(range(299, -1, -1)))
    assert set(turned.test.names) == set(parted.test.names)  # the order in the source does not count


def test_what_the_source_held_out_stays_so() -> None:
    parted = split(toys(["a", "b", "c", "d", "e"], [0, 0, 2, 3, 4], parts=("", "test", "", "validation", "")))
    assert (parted.train.names, parted.validation.names, parted.test.names) == (("c", "e"), ("d",), ("a", "b"))
    assert "2 pictures for training, 1 for validation, 2 for testing" in parted.sentence()
    with pytest.raises(UserError, match="share is 0.5"):
        split(parted.train, share=0.5)


def test_relatives_are_held_out_together_and_what_was_held_out_stays() -> None:
    groups, families = [n // 2 for n in range(600)], [n // 6 for n in range(600)]
    whole = toys([f"{n}" for n in range(600)], groups, families=families)
    old, new = split(whole, whole_families=False), split(whole)
    sides = [set(part.families.tolist()) for part in (new.train, new.validation, new.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2]) and all(sides)
    assert len(new.train) + len(new.validation) + len(new.test) == 600
    assert set(old.test.names) < set(new.test.names) and set(new.train.names) < set(old.train.names)
    assert set(new.test.families) == set(old.test.families)
    assert new.clean_test().names == new.test.names
    learned = set(old.train.families)
    near = [name for name, family in zip(old.test.names, old.test.families, strict=True) if family in learned]
    assert len(near) > 10
    assert {*old.clean_test().names} == {*old.test.names} - {*near}


def test_choosing() -> None:
    whole = toys(["a", "b", "c", "d"], [0, 1, 1, 3])
    assert whole.distinct().names == ("a", "b", "d") and whole.with_names(["d", "b", "x"]).names == ("b", "d")
    some = whole.subset([3, 1])
    assert some.take(slice(None))[:, 0, 0, 0].tolist() == [3, 1] and some.captions == {"en": ("d", "b")}
    assert torch.equal(some.subset([1]).take([0]), whole.take([1]))
    assert len({whole.fingerprint, some.fingerprint, some.subset([1, 0]).fingerprint}) == 3
