"""Shards: the right ids in the right part, found again, made anew when anything changed, and never half."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from keifu.data.text import token_shards as text
from keifu.data.text.documents import TextFileFormat
from keifu.data.text.held_out import passages
from keifu.data.text.token_shards import prepare
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

END = 256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))


class Bytes(Tokenizer):
    """A tokenizer whose ids are bytes; it counts how often it is used."""

    vocab_size, bos_id, fingerprint = END + 1, None, "bytes"

    def __init__(self, eos_id: int | None = END):
        self.eos_id = eos_id
        self.calls = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.calls += 1
        return [list(text.encode()) for text in texts]


def folder_of(tmp_path: Path, documents: list[str]) -> Path:
    lines = "\n".join(json.dumps({"text": each}) for each in documents)
    (tmp_path / "texts.jsonl").write_text(lines)
    return tmp_path / "texts.jsonl"


def split(ids: np.ndarray) -> list[str]:
    return "".join("|" if byte == END else chr(byte) for byte in ids).split("|")


def test_the_end_of_one_file_is_held_out_on_request_as_nanogpt_does(tmp_path: Path) -> None:
    content = "".join(chr(0x3042 + n % 50) + "\n" * (n % 7 == 0) for n in range(1003))
    (tmp_path / "a.txt").write_text(content, "utf-8")
    shards = prepare(tmp_path / "a.txt", Bytes(), held_out=0.1, split="end")
    cut = int(len(content) * 0.9)
    assert bytes(shards.tokens.astype(np.uint8)).decode() == content[:cut]
    assert bytes(shards.validation.astype(np.uint8)).decode() == content[cut:]
    assert shards.bytes_per_token == 1 and shards.tokens.dtype == np.uint16
    assert isinstance(shards.tokens, np.memmap)


def test_a_few_documents_keep_their_ends_across_the_cut(tmp_path: Path) -> None:
    source = folder_of(tmp_path, ["aaaa", "", "bbbb", " \n", "cccccccc"])
    shards = prepare(source, Bytes(), held_out=0.25, split="end")
    assert shards.tokens.tolist() == [*b"aaaa", END, *b"bbbb", END, *b"cccc"]
    assert shards.validation.tolist() == [*b"cccc"]
    assert shards.index["training"] == {"tokens": 14, "bytes": 12, "documents": 2}
    assert shards.index["validation"] == {"tokens": 4, "bytes": 4, "documents": 1}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.03])
def test_of_many_documents_whole_ones_are_held_out_all_along(tmp_path: Path, share: float) -> None:
    source = folder_of(tmp_path, [f"document {number}" for number in range(1000)])
    shards = prepare(source, Bytes(), held_out=share)
    train, held = ([int(each.split()[1]) for each in split(part)] for part in (shards.tokens, shards.validation))
    assert sorted(train + held) == list(range(1000)) and train == sorted(train)
    assert abs(len(held) - 1000 * share) <= 1 and np.diff(held).max() < 2 / share
    other = prepare(source, Bytes(), held_out=share, seed=1)
    assert other.validation.tolist() != shards.validation.tolist()


def test_pieces_of_a_long_document_stay_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text.sources, "LIMIT", 10)
    monkeypatch.setattr(text, "CHUNK", 50)
    source = folder_of(tmp_path, [f"{number:03}\n" * 20 for number in range(120)])
    shards = prepare(source, Bytes(), held_out=0.1)
    for part in (shards.tokens, shards.validation):
        assert all(each == each[:4] * 20 for each in split(part))


def diary(tmp_path: Path, logs: int = 21) -> Path:
    """Return a folder of English files and, last by its name, a Japanese one of a third of their size."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(logs):
        (folder / f"log{number:03}.txt").write_text(f"entry {number} of the log\n" * 600)
    (folder / "nikki.txt").write_text("".join(f"8月{day}日、散歩をした。\n" for day in range(120 * logs)), "utf-8")
    return folder


@pytest.mark.parametrize("logs", [21, 120])
def test_every_file_gives_its_share_and_none_is_held_out_whole(tmp_path: Path, logs: int) -> None:
    """A diary in another language, last by its name, was held out as a whole, and never learned."""
    source = diary(tmp_path, logs)
    shards = prepare(source, Bytes(), held_out=0.05)
    train, held = (bytes(id for id in part.tolist() if id < END) for part in (shards.tokens, shards.validation))
    japanese, english = (sum("月".encode() in line for line in part.splitlines()) for part in (train, held))
    assert japanese + english == 120 * logs and 0.03 < english / (120 * logs) < 0.07
    assert all(b"entry %d " % number in train for number in range(logs))
    assert len(held) == pytest.approx(0.05 * (len(train) + len(held)), rel=0.25)
    assert sorted(train.splitlines() + held.splitlines()) == sorted(
        line for path in source.iterdir() for line in path.read_bytes().splitlines()
    )
    facts = shards.index["held_out"]
    assert facts["rule"] == "passages" and facts["files"] == facts["of_files"] == logs + 1
    assert f"from {logs + 1} of {logs + 1} files" in shards.held_out()
    other = prepare(source, Bytes(), held_out=0.05, seed=1)
    assert other.validation.tolist() != shards.validation.tolist()


def test_a_text_without_lines_is_cut_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("か\u3099" * 4000, "utf-8")
    shards = prepare(tmp_path / "a.txt", Bytes())
    assert not bytes(shards.validation.tolist()).decode().startswith("\u3099")
    assert len(shards.validation) == pytest.approx(0.05 * 24_000, rel=0.1)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5])
def test_passages_lie_apart_and_inside_their_documents(share: float) -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        lengths = random.integers(1, 60_000, count).tolist()
        spans = passages(lengths, share)
        edges = np.cumsum([0, *lengths])
        assert all(0 < end - start <= 8192 for start, end in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))
        held = [sum(b - a for a, b in spans if first <= a < end) for first, end in pairwise(edges)]
        assert all(part <= length / 2 for part, length in zip(held, lengths, strict=True))
        assert sum(held) == pytest.approx(share * sum(lengths), rel=0.1, abs=2)


def test_the_ids_of_earlier_versions_have_the_same_fingerprint(tmp_path: Path) -> None:
    """Runs begun before the held-out text was spread over all files go on with what they have learned from."""
    source = folder_of(tmp_path, ["one two three", "four"])
    before = prepare(source, Bytes(), split="end")
    assert before.fingerprint == "5eb69bbf24d738e09481c0a9686663e6c0950cc774effb4d61fb9554df8ed0ab"
    assert prepare(source, Bytes()).fingerprint != before.fingerprint


def test_found_again_while_nothing_has_changed(tmp_path: Path) -> None:
    source, tokenizer = folder_of(tmp_path, ["one two three", "four"]), Bytes()
    first = prepare(source, tokenizer)
    calls = tokenizer.calls
    assert prepare(source, tokenizer).fingerprint == first.fingerprint and tokenizer.calls == calls
    others = [prepare(source, tokenizer, held_out=0.2)]
    tokenizer.fingerprint = "another"
    others.append(prepare(source, tokenizer))
    folder_of(tmp_path, ["one two three", "five"])
    others.append(prepare(source, tokenizer))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    source = folder_of(tmp_path, ["one two three", "four"])
    first = prepare(source, Bytes())
    expected = first.tokens.tolist()
    next((tmp_path / "cache").rglob("training.bin")).write_bytes(b"1")
    assert prepare(source, Bytes()).tokens.tolist() == expected


def test_nothing_is_left_of_a_run_that_breaks_off(tmp_path: Path, monkeypatch) -> None:
    source = folder_of(tmp_path, ["one two three", "four"])

    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, Bytes())
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text, "write", full)
    with pytest.raises(UserError, match="The disk is full"):
        prepare(folder_of(tmp_path, ["one two three"]), Bytes())
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = Bytes(eos_id=70_000)
    tokenizer.vocab_size = 70_001
    shards = prepare(folder_of(tmp_path, ["a", "b", "cc"]), tokenizer, held_out=0.5, split="end")
    assert shards.tokens.dtype == np.uint32 and shards.tokens.tolist() == [97, 70_000, 98]


def test_without_an_end_of_text_token_it_is_said(tmp_path: Path, capfd) -> None:
    shards = prepare(folder_of(tmp_path, ["aa", "bb", "cccc"]), Bytes(eos_id=None), held_out=0.5, split="end")
    assert shards.tokens.tolist() == [*b"aabb"]
    assert "no end-of-text token" in capfd.readouterr().err


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("にほんご" * 100, "utf-8")
    characters = train_tokenizer("characters", ["にほんご"], 20)
    by_byte = prepare(tmp_path / "a.txt", Bytes())
    by_character = prepare(tmp_path / "a.txt", characters)
    assert by_character.bytes_per_token == 3
    assert by_byte.bits_per_byte(8 * math.log(2)) == pytest.approx(8) == by_character.bits_per_byte(24 * math.log(2))


def test_our_own_tokenizer_fits_and_its_ids_come_back(tmp_path: Path) -> None:
    documents = [f"The number {number} 番。\n" for number in range(200)]
    tokenizer = train_tokenizer("bpe", documents, 400)
    assert isinstance(tokenizer, Tokenizer)
    shards = prepare(folder_of(tmp_path, documents), tokenizer)
    held = tokenizer.decode(shards.validation.tolist())
    assert len(held.splitlines()) == 10 and set(held.splitlines(keepends=True)) <= set(documents)


@pytest.mark.parametrize("share", [0.0, 0.6, -1.0])
def test_an_impossible_share_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match=f"held_out is {share}"):
        prepare(folder_of(tmp_path, ["a"]), Bytes(), held_out=share)


def test_a_text_too_short_to_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1 tokens: too short"):
        prepare(folder_of(tmp_path, ["a"]), Bytes())


def test_a_validation_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 20)
    (tmp_path / "b.txt").write_text("xyz" * 5)
    found = prepare(tmp_path / "a.txt", Bytes(), validation=tmp_path / "b.txt")
    assert bytes(found.tokens.tolist()).decode() == "abc" * 20
    assert bytes(found.validation.tolist()).decode() == "xyz" * 5
    alone = prepare(tmp_path / "a.txt", Bytes())
    assert alone.fingerprint != found.fingerprint
    with pytest.raises(UserError, match="b.txt holds the same as"):
        prepare(tmp_path / "b.txt", Bytes(), validation=str(tmp_path / "b.txt"))


def test_another_field_is_another_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,body\n" + "one,two\n" * 10)
    for field, word in ((None, "one"), ("body", "two")):
        found = prepare(tmp_path / "a.csv", Bytes(), form=TextFileFormat(field))
        assert word in bytes([i for i in found.tokens.tolist() if i < 256]).decode()
