"""Pairs out of every source with every fault named; a split that leaks nothing, whatever the order and direction."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from keifu.data.catalogue import catalogue
from keifu.data.text.normalization import normalize
from keifu.data.translation.pairs import Pairs, pair_names, read_pairs, split
from keifu.errors import UserError

SENTENCES = st.text(st.sampled_from("ab AB.。！あア１1é ﾊﾟ"), min_size=1, max_size=6).filter(str.strip)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES), min_size=40, max_size=120)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_table_is_two_columns(tmp_path: Path) -> None:
    found = read_pairs(write(tmp_path / "a.tsv", "\ufeffいち\tone\r\nに \t two\n"))
    assert found.rows == [("いち", "one"), ("に", "two")] and found.languages == ("", "")
    assert read_pairs(tmp_path / "a.tsv", reverse=True).rows == [("one", "いち"), ("two", "に")]


def test_two_files_lie_side_by_side_and_their_names_tell_the_languages(tmp_path: Path) -> None:
    names = write(tmp_path / "a.ja", "いち\nに\n"), write(tmp_path / "b.en", "one\ntwo")
    found = read_pairs(",".join(names))
    assert found.rows == [("いち", "one"), ("に", "two")] and found.languages == ("ja", "en")
    assert read_pairs(", ".join(names), reverse=True).languages == ("en", "ja")
    write(tmp_path / "b.txt", "one\ntwo\n")
    assert read_pairs(f"{names[0]},{tmp_path / 'b.txt'}").languages == ("ja", "")


def test_the_catalogues_pairs_come_in_both_directions(monkeypatch) -> None:
    monkeypatch.setattr(catalogue, "pairs", lambda name: iter([(" は ", "yes"), ("い", f"{name}")]))
    forward, back = read_pairs("tatoeba-ja-en"), read_pairs("tatoeba-en-ja")
    assert forward.rows == [("は", "yes"), ("い", "tatoeba-ja-en")] and forward.languages == ("ja", "en")
    assert back.rows == forward.reversed().rows == read_pairs("tatoeba-ja-en", reverse=True).rows
    assert back.languages == ("en", "ja") and read_pairs("tatoeba-en-ja", reverse=True).rows == forward.rows
    assert {"tatoeba-ja-de", "tatoeba-de-ja"} <= pair_names().keys()


def test_empty_sides_are_counted_and_left_out(tmp_path: Path) -> None:
    found = read_pairs(write(tmp_path / "a.tsv", "a\tb\n \tc\nd\t\n\t\n"))
    assert found.rows == [("a", "b")]
    assert found.left_out == f"3 of 4 pairs of {tmp_path / 'a.tsv'} have an empty side and are left out."
    assert read_pairs(write(tmp_path / "b.tsv", "a\tb\n")).left_out == ""
    with pytest.raises(UserError, match="no pair whose two sides both have text; 2 pairs were read"):
        read_pairs(write(tmp_path / "a.tsv", "a\t\n\tb\n"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a\tb\nno tab here\n", "line 2: there is no tab in 'no tab here'"),
        ("a\tb\nid\tja\ten\n", r"line 2: there are 3 columns \('id', 'ja', 'en'\), and two are needed.*`cut -f 1,2`"),
        (b"a\tb\n\xff\tc\n", "line 2: 0xFF at byte 1 of the line is not UTF-8"),
        ("a\tb\n\nc\td\n", "line 2: there is no tab in ''"),
        ("", "no pair whose two sides both have text; 0 pairs were read"),
    ],
)
def test_a_faulty_table_is_named_with_its_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_pairs(write(tmp_path / "a.tsv", content))


def test_files_of_unequal_length_are_named_with_the_line(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.ja", "1\n2\n3\n4\n5\n"), write(tmp_path / "b.en", "1\n2\n3\n")
    for names in (f"{one},{other}", f"{other},{one}"):
        with pytest.raises(UserError, match=r"b.en ends after line 3, and .*a.ja has 2 lines more: line 4 of one must"):
            read_pairs(names)


def test_a_file_of_bytes_in_a_pair_is_named_with_its_line(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.ja", b"ok\n\xe3\x81\n"), write(tmp_path / "b.en", "1\n2\n")
    with pytest.raises(UserError, match=r"a.ja, line 2: 0xE3 0x81 at byte 1 of the line is not UTF-8"):
        read_pairs(f"{one},{other}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tatoeba-ja-fe", "file of pairs or pair of files 'tatoeba-ja-fe'. Did you mean 'tatoeba-ja-"),
        ("here.tvs", "Did you mean '.*here.tsv'"),
        ("here.tsv,there.en", "no catalogue name, file of pairs or pair of files 'there.en'"),
        ("a,b,c", "a,b,c names 3 files"),
        (".", "is a folder: name the file of pairs in it"),
    ],
)
def test_an_unknown_source_answers_with_the_nearest(tmp_path: Path, monkeypatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.tsv", "a\tb\n")
    with pytest.raises(UserError, match=said):
        read_pairs(name)


def test_what_makes_no_other_sentence_is_taken_out() -> None:
    assert normalize("  Don't, go! ") == normalize("dont go") == "dontgo"
    assert normalize("ﾊﾟﾝ　を、食べる。") == normalize("パンを食べる") == "パンを食べる"
    assert normalize("ＡＢＣ１２") == "abc12" and normalize("e\u0301") == normalize("É") == "é"
    assert normalize("...") == "..." != normalize("!")
    assert normalize("हिन्दी") != normalize("हनद")  # vowel signs are no punctuation


@given(st.text(max_size=12))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.integers(0, 3))
def test_no_part_shares_a_sentence_with_another(pairs: list[tuple[str, str]], seed: int) -> None:
    try:
        found = split(Pairs("p", pairs), seed, held_out=3)
    except UserError as error:
        assert "cannot be split" in str(error)
        return
    parts = found.train, found.validation, found.test
    sides = [{normalize(side) for pair in part for side in pair} for part in parts]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert 1 <= len(found.test) <= 3 and len(found.validation) <= 3
    assert len(found.train) + len(found.validation) + len(found.test) + found.dropped == len(pairs)
    tested = [normalize(side) for pair in found.test for side in set(map(normalize, pair))]
    assert len(tested) == len(set(tested))  # no sentence is tested twice


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.randoms(use_true_random=False))
def test_neither_order_nor_direction_changes_the_split(pairs: list[tuple[str, str]], chance: random.Random) -> None:
    try:
        whole = split(Pairs("p", pairs), held_out=4)
    except UserError:
        return
    shuffled = list(pairs)
    chance.shuffle(shuffled)
    again = split(Pairs("p", shuffled), held_out=4)
    assert (whole.test, whole.validation) == (again.test, again.validation)
    assert sorted(whole.train) == sorted(again.train)
    turned = split(Pairs("p", [(b, a) for a, b in shuffled]), held_out=4)
    for one, other in ((whole.test, turned.test), (whole.validation, turned.validation)):
        # A pair whose mirror is there too is its own mirror image, so either of the two may be held out.
        assert [sorted(pair) for pair in one] == [sorted(pair) for pair in other]
        mirrored = [(a, b) for a, b in one if (b, a) in pairs]
        assert all((b, a) in other for a, b in one if (a, b) not in mirrored)
    assert sorted(whole.train) == sorted((b, a) for a, b in turned.train)


def test_a_pair_and_its_mirror_are_split_alike_in_any_order() -> None:
    pairs = [("A", "B"), ("B", "A"), *((f"{n} ichi", f"{n} one") for n in range(30))]
    for seed in range(40):  # some seeds hold the two out
        one, other = (split(Pairs("p", rows), seed) for rows in (pairs, pairs[::-1]))
        assert (one.test, one.validation) == (other.test, other.validation)


def test_the_split_has_the_sizes_and_says_so() -> None:
    rows = [(f"{n} ichi", f"{n} one") for n in range(500)] + [("0 ichi", "0 one"), ("0 Ichi!", "0 eins")]
    found = split(Pairs("p", rows))
    assert (len(found.validation), len(found.test)) == (50, 50)  # a tenth each, where a thousand would be more
    assert len(found.train) == 402 - found.dropped and found.dropped in (1, 2, 3)
    assert f"{len(found.train)} pairs for training, 50 for validation, 50 for testing" in found.sentence()
    pairs = Pairs("p", rows)
    assert split(pairs, seed=1).test != found.test and split(pairs, held_out=7).test == found.test[:7]


def test_what_cannot_be_parted_is_refused() -> None:
    with pytest.raises(UserError, match="2 distinct pairs cannot be split"):
        split(Pairs("p", [("a", "b"), ("c", "d"), ("a", "b")]))
    with pytest.raises(UserError, match="30 distinct pairs cannot be split .* give more pairs"):
        split(Pairs("p", [("same", f"other {n}") for n in range(30)]))


RECORDS = [{"source": "いち", "target": "one"}, {"source": "に", "target": "two"}]
FILES = {
    "a.csv": "source,target\nいち,one\nに,two\n",
    "b.csv": "id,tgt,src\n1,one,いち\n2,two,に\n",
    "c.jsonl": "\n".join(json.dumps(each) for each in RECORDS),
    "d.json": json.dumps(RECORDS),
    "e.jsonl": '{"ja": "いち", "en": "one"}\n{"ja": "に", "en": "two"}\n',
    "f.jsonl": '{"translation": {"ja": "いち", "en": "one"}}\n{"translation": {"ja": "に", "en": "two"}}\n',
    "g.csv": "ja,en\nいち,one\nに,two\n",
    "h.csv": '"Japanese";"English"\n"いち";"one"\n"に";"two"\n',
    "i.tsv": "Source\tTarget\tremark\nいち\tone\tx\nに\ttwo\ty\n",
}


@pytest.mark.parametrize("name", FILES)
def test_pairs_from_files_of_records(tmp_path: Path, name: str) -> None:
    found = read_pairs(write(tmp_path / name, FILES[name]))
    assert found.rows == [("いち", "one"), ("に", "two")]
    assert found.languages == (("ja", "en") if name in ("e.jsonl", "f.jsonl", "g.csv") else ("", ""))


def test_fields_of_pairs_by_name_and_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("n,before,after\n1,いち,one\n".encode("cp932"))
    assert read_pairs(file, fields=("before", "after"), encoding="cp932").rows == [("いち", "one")]
    assert read_pairs(file, fields=("after", "before"), encoding="cp932").rows == [("one", "いち")]


@pytest.mark.parametrize(
    ("content", "fields", "sentence"),
    [
        ("n,before,after\n1,a,b\n", (None, None), "line 2: which .* There are 'n', 'before', 'after'; .*--source-f"),
        ("n,before,after\n1,a,b\n", ("befor", "after"), "no column .* 'befor'. Did you mean 'before'"),
        ("Hallo,Hello\nWelt,world\n", (None, None), "which fields are the source .* There are 'Hallo', 'Hello'"),
        ("source,target\na,b,c\n", (None, None), "line 2, has 3 cells where the first line has 2"),
    ],
)
def test_tables_whose_sides_are_not_known(tmp_path: Path, content: str, fields: tuple, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_pairs(write(tmp_path / "a.csv", content), fields=fields)


def test_pairs_of_ones_own_for_validation_and_testing() -> None:
    pairs = Pairs("p", [(f"{n} ichi", f"{n} one") for n in range(100)])
    own = Pairs("v", [("3 Ichi!", "three"), ("never", "seen")])
    found = split(pairs, validation=own)
    assert found.validation == own.rows and found.test == split(pairs).test and found.dropped == 1
    assert {*found.train} == {*pairs.rows} - {*found.test} - {pairs.rows[3]}
    both = split(pairs, validation=own, test=Pairs("t", [("4 ichi", "x")]))
    assert both.test == [("4 ichi", "x")] and len(both.train) == 98 and both.dropped == 2
    with pytest.raises(UserError, match="nothing is left to train on"):
        split(own, validation=own, test=own)
