"""The report before training: every fault found, every count right, for any tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

from keifu.data.text import dataset_report
from keifu.data.text.dataset_report import SCRIPTS, bytes_to_scripts, check_dataset, script_numbers
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer

SAMPLES = {
    "Latin": "aZéßĀ", "Greek": "αΩ", "Cyrillic": "жЯ", "Hiragana": "あん", "Katakana": "アー", "Han": "日々𠮷",
    "Hangul": "한글", "Arabic": "سلام", "Hebrew": "שלום", "Thai": "ไทย", "Indic": "हि", "emoji": "😀☀🇯",
    "common": " 1.,!。、（×\n", "other": "Ա\U00010000",
}  # fmt: skip


class Bytes(Tokenizer):
    """A tokenizer whose ids are bytes."""

    fingerprint = "bytes"

    def __init__(self) -> None:
        self.vocab_size, self.bos_id, self.eos_id = 256, None, None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@pytest.mark.parametrize("script", SAMPLES)
def test_scripts(script: str) -> None:
    text = SAMPLES[script]
    found = script_numbers(np.array([ord(character) for character in text]))
    assert [SCRIPTS[number] for number in found] == [script] * len(text)
    by_byte = bytes_to_scripts(np.frombuffer(text.encode(), dtype=np.uint8))
    assert {SCRIPTS[number] for number in by_byte} == {script} and len(by_byte) == len(text.encode())


def test_broken_bytes_have_scripts_too() -> None:
    for broken in (b"\x81\x81a", b"\xe3\x81", b"\xf0", b"\xffa"):
        assert len(bytes_to_scripts(np.frombuffer(broken, dtype=np.uint8))) == len(broken)


def test_counts_by_script_for_a_byte_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc あい 漢😀", "utf-8")
    report = check_dataset(tmp_path / "a.txt", Bytes())
    counts = {name: (each.bytes, each.tokens) for name, each in report.scripts.items()}
    assert counts == {"Hiragana": (6, 6), "emoji": (4, 4), "Latin": (3, 3), "Han": (3, 3), "common": (2, 2)}
    assert (report.documents, report.characters, report.bytes, report.tokens) == (1, 9, 18, 18)


def test_a_token_of_letters_takes_its_space_along(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("日本語 hello hello hello\n" * 50, "utf-8")
    tokenizer = train_tokenizer("bpe", ["日本語 hello hello\n" * 20], 300)
    report = check_dataset(tmp_path / "a.txt", tokenizer)
    latin = report.scripts["Latin"]
    assert (latin.bytes, latin.tokens) == (50 * 18, 150)  # " hello" is one token
    assert sum(each.tokens for each in report.scripts.values()) == report.tokens
    assert sum(each.bytes for each in report.scripts.values()) == report.bytes


def test_faults_empty_and_repeated_documents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dataset_report, "CHUNK", 5)
    texts = ["one", "two", "one", "", " ", "", "three " * 9, "one"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in texts))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n{"body": "x"}\n')
    (tmp_path / "c.txt").write_bytes(b"\0")
    report = check_dataset(tmp_path, Bytes())
    assert (report.documents, report.empty, report.duplicates, report.n_problems) == (9, 3, 2, 3)
    assert report.lengths == {1: 3, 4: 5, 64: 1}
    file = tmp_path / "a.jsonl"
    assert report.repeats == [f"document {n} of {file} is a copy of document 1 of {file}" for n in (3, 8)]
    places = ["b.jsonl, line 1: 0xFF", "b.jsonl, line 2: there is no field", "c.txt is binary"]
    assert all(place in problem for place, problem in zip(places, report.problems, strict=True))


def test_a_repeated_file_is_named(tmp_path: Path) -> None:
    for name, text in (("a.txt", "x"), ("b.txt", "same"), ("c.txt", "y"), ("d.txt", "same")):
        (tmp_path / name).write_text(text)
    printed = str(check_dataset(tmp_path, Bytes()))
    assert f"\n  document 1 of {tmp_path / 'd.txt'} is a copy of document 1 of {tmp_path / 'b.txt'}\n" in printed


def test_lengths_are_of_whole_documents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dataset_report.sources, "LIMIT", 10)
    (tmp_path / "a.txt").write_text("line\n" * 100)
    assert check_dataset(tmp_path / "a.txt", Bytes()).lengths == {512: 1}


def test_the_printed_report_and_its_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"bad \xff\n" * 30)
    report = check_dataset(tmp_path / "a.txt", Bytes())
    printed = str(report)
    assert "1 documents, 180 characters" in printed and "Latin" in printed and "up to" in printed
    assert "a.txt, line 20: 0xFF" in printed and "line 21" not in printed and "and 10 more faults" in printed
    assert json.loads(json.dumps(report.to_json()))["scripts"]["Latin"]["tokens_per_byte"] == 1


def test_a_clean_text_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good\n")
    assert "No faulty bytes" in str(check_dataset(tmp_path / "a.txt", Bytes()))


def test_an_empty_text_is_reported_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    report = check_dataset(tmp_path / "a.txt", Bytes())
    assert report.problems == [f"There is no text in {tmp_path / 'a.txt'}: it is empty."] and str(report)
