"""Labelled texts: tables of every kind, what is wrong with them, a split without leaks, batches of similar length."""

import json
import random
from pathlib import Path

import pytest
import torch

from keifu.data.classification import tables
from keifu.data.classification.batches import EncodedTexts, LabelledBatches
from keifu.data.classification.examples import Example, Examples
from keifu.data.classification.tables import read
from keifu.data.padding import length_buckets, pad
from keifu.data.text.normalization import key
from keifu.errors import UserError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufeffid,text,label\r\n1,"one, ""two""\r\nthree",x\r\n\r\n2,four,y\r\n'),
        ("a.csv", 'label;text\nx;"one, ""two""\nthree"\ny;four\n'),
        ("a.csv", 'label\ttext\nx\t"one, ""two""\nthree"\ny\tfour\n'),
        (
            "a.jsonl",
            '{"text": "one, \\"two\\"\\nthree", "label": "x"}\n\n{"label": "y", "text": "four", "more": [1]}\n',
        ),
    ],
)
def test_a_table_is_read_whatever_its_kind(name: str, content: str, tmp_path: Path) -> None:
    table = read(written(tmp_path / name, content))
    assert table.texts == ('one, "two"\nthree', "four") and table.labels == ("x", "y")


def test_in_a_tsv_quotation_marks_are_plain(tmp_path: Path) -> None:
    table = read(written(tmp_path / "a.tsv", 'review\tstars\n"so" good\t10\n" bad\t9\n'), "review", "stars")
    assert table.texts == ('"so" good', '" bad') and table.classes == ("9", "10")


def test_labels_that_are_no_strings_are_written_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a", "label": label}) for label in (1, True, "x")]
    assert read(written(tmp_path / "a.jsonl", "\n".join(lines))).labels == ("1", "True", "x")


def test_the_topics_of_the_summaries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    article = {"title": "Cat", "extract": "An animal.", "description": "Biology", "topic": "Life"}
    file = written(tmp_path / "summaries.json", json.dumps({"Cat": article}))
    monkeypatch.setattr(tables.catalogue, "fetch", lambda name: file)
    row = Example("wiki-summaries, 'Cat'", ("Cat\n\nAn animal.",), "Life")
    assert read("wiki-summaries") == Examples("wiki-summaries", (row,))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "texts,label\na,b\n", r"no column \(in .*a\.csv, line 2\) 'text'\. Did you mean 'texts'"),
        ("a.csv", "text,label\na,b\nc\n", r"line 3, has 1 cells where the first line has 2"),
        ("a.csv", "text,label\na,b\n,c\n", r"line 3: the column 'text' is empty"),
        ("a.csv", "text,label\na,b\nc, \n", r"line 3: the column 'label' is empty"),
        ("a.csv", 'text,label\n"a,b\n', r"cannot be read as a row of a table"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", b"text,label\na,\xff\n", r"line 2: 0xFF"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text"\n', r"line 2: this is no JSON"),
        ("a.jsonl", "[1]\n", r"line 1: this is list, where an object"),
        ("a.jsonl", '{"text": ["a"], "label": "b"}\n', r"line 1: the column 'text' holds a list"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"line 1: the column 'label' is empty"),
        ("a.xlsx", "", r"must end in \.csv, \.tsv, \.jsonl"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        read(written(tmp_path / name, content))


def test_a_name_that_is_no_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'wiki-summaries'"):
        read("wiki-sumaries")
    with pytest.raises(UserError, match="There is no file .*nowhere.csv"):
        read(tmp_path / "nowhere.csv")


TABLE = Examples("t", tuple(Example("", (f"Text {n // 2}{'!' * (n % 2)}",), "abc"[n % 3]) for n in range(200)))


def test_the_held_out_rows_are_as_many_as_asked_and_share_no_text() -> None:
    training, held = TABLE.split(50)
    assert len(held) == 50 and sorted([*training.texts, *held.texts]) == sorted(TABLE.texts)
    said = [{key(text) for text in part.texts} for part in (training, held)]
    assert len(said[1]) == 25 and not said[0] & said[1]  # "Text 1" and "Text 1!" say the same


def test_the_text_alone_decides_who_is_held_out() -> None:
    order = random.Random(0).sample(range(200), 200)
    shuffled = TABLE.subset(order).split(50)[1]
    assert sorted(shuffled.texts) == sorted(TABLE.split(50)[1].texts)
    assert TABLE.split(0)[1].texts == ()
    with pytest.raises(UserError, match="200 of 200 rows cannot be held out"):
        TABLE.split(200)


def test_a_label_is_never_held_out_alone() -> None:
    rare = Examples("t", tuple(Example("", (f"text {n}",), str(n)) for n in range(40)))
    training, held = rare.split(20)
    assert len(training) == 40 and not len(held)


ROWS = [[1] * (1 + n * 7 % 23) + [n + 2] for n in range(53)]
DATA = EncodedTexts(ROWS, list(range(53)))


def batches(seed: int = 3) -> LabelledBatches:
    return LabelledBatches(DATA, EncodedTexts(ROWS[:9], list(range(9))), 8, seed, pad_id=0)


def test_every_epoch_shows_every_row_once_with_its_target_and_in_an_order_of_its_own() -> None:
    data, orders = batches(), []
    assert data.steps_per_epoch == 7
    for epoch in range(3):
        seen = []
        for place in range(7):
            batch = data.batch(7 * epoch + place)
            assert len(batch["targets"]) == (8 if place < 6 else 5)
            for tokens, mask, target in zip(batch["tokens"], batch["mask"], batch["targets"].tolist(), strict=True):
                assert tokens[mask].tolist() == ROWS[target] and not tokens[~mask].any()
                seen.append(target)
        assert sorted(seen) == list(range(53))
        orders.append(tuple(seen))
    assert len(set(orders)) == 3


def test_a_batch_is_a_function_of_the_seed_and_the_step() -> None:
    data = batches()
    late = data.batch(9)
    _ = [data.batch(step) for step in range(20)]
    for name, tensor in batches().batch(9).items():
        assert torch.equal(tensor, late[name])
    assert not torch.equal(batches(4).batch(9)["targets"], late["targets"])


def test_batches_have_little_padding_and_the_largest_holds_the_longest() -> None:
    data = batches()
    padding = [float((~data.batch(step)["mask"]).float().mean()) for step in range(7)]
    assert sum(padding) / 7 < 0.2  # at random it would be about 0.45
    assert int(data.largest()["mask"].sum()) == sum(sorted(map(len, ROWS))[-8:])
    held = [target for batch in data.validation() for target in batch["targets"].tolist()]
    assert sorted(held) == list(range(9))


def test_the_fingerprint_knows_every_id_and_target() -> None:
    changed = [ROWS[:], ROWS[:]]
    changed[0][5] = [*ROWS[5], 1]
    others = [EncodedTexts(changed[0], DATA.targets), EncodedTexts(ROWS, [1, *DATA.targets[1:]])]
    prints = {LabelledBatches(each, EncodedTexts([], []), 8, 0, 0).fingerprint for each in (DATA, *others)}
    assert len(prints) == 3


def test_padding_is_on_the_right_and_a_mask_only_where_it_is_needed() -> None:
    tokens, mask = pad([[5, 6, 7], [8]], pad_id=9)
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask is not None and mask.tolist() == [[True] * 3, [True, False, False]]
    tokens, mask = pad([[5, 6], [7, 8]], pad_id=9)
    assert tokens.tolist() == [[5, 6], [7, 8]] and mask is None


@pytest.mark.parametrize(("tokens", "rows"), [(64, 8), (40, 100), (1, 3), (10_000, 7)])
def test_passes_hold_every_row_once_within_their_limits(tokens: int, rows: int) -> None:
    lengths = [len(row) for row in ROWS]
    found = list(length_buckets(lengths, tokens, rows))
    assert sorted(place for places in found for place in places) == list(range(len(ROWS)))
    for places in found:
        longest = max(lengths[place] for place in places)
        assert len(places) <= rows and (len(places) == 1 or longest * len(places) <= tokens)
    firsts = [lengths[places[0]] for places in found]
    assert firsts == sorted(firsts, reverse=True)
