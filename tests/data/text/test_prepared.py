"""Shards that several ranks make: the ids of one, resumable, in bounded memory, and what is damaged is named."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from keifu.commands import data
from keifu.commands.shared.flags import parse_command
from keifu.data.text import prepared
from keifu.data.text.documents import PLAIN
from keifu.data.text.prepared import is_prepared, open_prepared, prepare_files, tokenizer_of
from keifu.data.text.token_shards import prepare
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.recipes.language.pretraining import Text, prepare_text

WORDS = "the small cat saw another small cat on the mat and went home again"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return five files of several documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        lines = [json.dumps({"text": f"{WORDS} {number} {line}"}) for line in range(20 + number)]
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tokenizer():
    return train_tokenizer("bpe", [WORDS] * 5, 300)


def form():
    return type(PLAIN)("text", "utf-8")


@pytest.mark.parametrize("of", [2, 3, 7])
def test_ranks_make_what_one_makes(of: int, source: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
    assert prepare_files(source, tokenizer, one, form()) == 5
    assert sum(prepare_files(source, tokenizer, several, form(), rank, of) for rank in range(of)) == 5
    assert prepare_files(source, tokenizer, several, form(), 0, of) == 0
    shards, others = open_prepared(one, 0.1, "end"), open_prepared(several, 0.1, "end")
    assert np.array_equal(shards.tokens, others.tokens) and np.array_equal(shards.validation, others.validation)
    whole = np.concatenate([shards.tokens, shards.validation]).tolist()
    texts = [f"{WORDS} {number} {line}" for number in range(5) for line in range(20 + number)]
    expected = [token for text in texts for token in (*tokenizer.encode_batch([text])[0], tokenizer.eos_id)][:-1]
    assert whole == expected
    assert len(shards.validation) == pytest.approx(0.1 * len(whole), abs=1)
    spread = open_prepared(one, 0.1)
    assert sorted([*spread.tokens, *spread.validation]) == sorted(whole)
    assert len(spread.validation) == pytest.approx(0.1 * len(whole), abs=5)
    assert spread.index["held_out"]["passages"] > 1 and spread.fingerprint != shards.fingerprint
    assert shards.bytes_per_token == pytest.approx(sum(map(len, texts)) / len(whole), rel=0.02)


def test_a_rank_that_was_killed_goes_on_where_it_was(source: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    real, calls = prepared.token_shards.write, []

    def dies(*arguments) -> list[dict[str, int]]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(prepared.token_shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_files(source, tokenizer, tmp_path, form())
    assert len([*tmp_path.glob("*.json")]) == len([*tmp_path.glob("*.bin")]) == 2
    assert prepare_files(source, tokenizer, tmp_path, form()) == 3


def test_a_recipe_trains_on_a_folder_of_shards(source: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    tokenizer.save(tmp_path / "tokenizer")
    words = ["prepare", str(source), "--tokenizer", str(tmp_path / "tokenizer"), "--text-field", "text"]
    for rank in ("0", "1"):
        shard = ["--rank", rank, "--of", "2", "--output", str(tmp_path / "shards")]
        parse_command(data, [*words, *shard], "keifu data")()
    assert is_prepared(tmp_path / "shards") and not is_prepared(source)
    task = prepare_text(Text(str(tmp_path / "shards")))
    assert task.tokenizer.fingerprint == tokenizer_of(tmp_path / "shards").fingerprint == tokenizer.fingerprint
    assert len(task.shards.tokens) > 1000


def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepared.token_shards, "CHUNK", 1 << 14)
    peaks = []
    for size in (12_000, 36_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        text = tmp_path / f"{size}.txt"
        text.write_text(f"{WORDS}\n" * size)
        tracemalloc.start()
        prepare_files(text, tokenizer, folder, PLAIN)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_what_cannot_be_prepared_is_said(source: Path, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rank 3 is not below --of 3"):
        prepare_files(source, tokenizer, tmp_path, form(), 3, 3)
    prepare_files(source, tokenizer, tmp_path, form(), 0, 5)
    with pytest.raises(UserError, match="shards of another tokenizer"):
        prepare_files(source, train_tokenizer("bpe", ["other words"] * 9, 270), tmp_path, form(), 1, 5)
    (tmp_path / "00000.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="00000.bin is not as long as its index says"):
        open_prepared(tmp_path, 0.1)
    with pytest.raises(UserError, match="needs a folder for the shards: give --output"):
        parse_command(data, ["prepare", str(source)], "keifu data")()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("dtype", None, "00001.json gives None for dtype, and '<u2' is needed: remove both"),
        ("dtype", 0.5, "gives 0.5 for dtype"),
        ("separator", float("inf"), "gives inf for separator"),
        ("vocab_size", 299, "gives 299 for vocab_size, and 292 is needed"),
        ("tokenizer", "x", "gives 'x' for tokenizer"),
        ("bytes", [[]], r"gives \[\[\]\] for bytes, which must be a whole number"),
        ("tokens", True, "gives True for tokens"),
        ("documents", -1, "gives -1 for documents"),
        ("sha256", None, "00001.bin has another hash than its index says"),
        ("sha256", 5, "00001.bin has another hash than its index says"),
    ],
)
def test_a_damaged_index_names_the_field(source, tokenizer, tmp_path, monkeypatch, field, value, sentence) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    prepare_files(source, tokenizer, tmp_path, form())
    index = json.loads((tmp_path / "00001.json").read_text()) | {field: value}
    (tmp_path / "00001.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        open_prepared(tmp_path, 0.1)


def test_damaged_ids_are_noticed(source: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    prepare_files(source, tokenizer, tmp_path, form())
    content = bytearray((tmp_path / "00002.bin").read_bytes())
    content[7] ^= 0x80  # an id that no token has
    (tmp_path / "00002.bin").write_bytes(content)
    with pytest.raises(UserError, match="00002.bin has another hash than its index says: remove both files, and prep"):
        open_prepared(tmp_path, 0.1)
    assert not [*(tmp_path / "cache" / "tokens").glob("[!.]*")]


@pytest.mark.parametrize("name", ["index.json", "training.bin", "validation.bin", "files.json"])
def test_damaged_tokens_in_the_cache_are_made_anew(source, tokenizer, tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    whole = np.array(prepare(source, tokenizer).tokens)
    (file,) = (tmp_path / "cache" / "tokens").glob(f"*/{name}")
    for content in (file.read_bytes()[:-3], b"[]", b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        again = prepare(source, tokenizer)
        assert np.array_equal(again.tokens, whole) and again.index["vocab_size"] == 292
