"""GPT-1's vocabulary and merges, whose words end in `</w>`, encode and decode as transformers' tokenizer does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, OpenAIGPTTokenizer

from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

WORDS = ["the", "then", "hen", "lower", "new", "newest", "é", "naïve", "東京", "it", "'", "s", ",", ".", "!", "12"]
TEXTS = [
    "The newest hen, then!", "It's LOWER  than\tthe\nhen.", "Naïve É é", "東京 the 京都", "unknown Ω words ☃", "", "  ",
    "a<unk>b </w> the</w>", "12 34", "the hen .",
]  # fmt: skip
TEXT = st.text(st.sampled_from("thenlowrsénaïv東京'., !\n12ΩT") | st.characters(exclude_categories=["Cs"]), max_size=40)


def merges(word: str) -> Iterator[tuple[str, str]]:
    """Yield the merges that build a word from its left. The last piece has the end-of-word mark."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for n in range(1, len(pieces)):
        yield "".join(pieces[:n]), pieces[n]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpt1")
    pairs = list(dict.fromkeys(pair for word in WORDS for pair in merges(word)))
    letters = sorted(set("".join(WORDS)))
    tokens = ["<unk>", *letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    (path / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(dict.fromkeys(tokens))}))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]))
    return path


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> OpenAIGPTTokenizer:
    return OpenAIGPTTokenizer.from_pretrained(folder)


def reference(theirs: OpenAIGPTTokenizer, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_as_transformers_does(ours, theirs, text) -> None:
    ids = ours.encode(text)
    assert ids == reference(theirs, text)
    assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_is_encoded_as_in_transformers(ours, theirs, text) -> None:
    ids = ours.encode(text)
    assert ids == reference(theirs, text)
    decoder = ours.stream(skip_special=False)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_words_are_whole_lower_case_and_marked(ours) -> None:
    tokens = [ours.backend.id_to_token(n) for n in ours.encode("The Newest het Ω")]
    assert tokens == ["the</w>", "newest</w>", "he", "t</w>", "<unk>"]
    assert ours.decode(ours.encode("The newest hen , it")) == "the newest hen , it"
    assert ours.special == {"unk_token": "<unk>"} and ours.eos_id is None


def test_saved_it_is_read_by_both(ours, theirs, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "openai-gpt"}')
    ours.save(tmp_path)
    again, reread = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == ours.fingerprint and again.special == ours.special
    for text in TEXTS:
        assert again.encode(text) == reference(reread, text) == reference(theirs, text)


def test_word_ends_by_other_rules_are_refused(folder, tmp_path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(
        json.dumps({token.replace("<unk>", "<|end|>"): n for token, n in vocabulary.items()})
    )
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text())
    with pytest.raises(UserError, match="marks the ends of words by </w> as GPT-1 does, but has no <unk>"):
        load_tokenizer(tmp_path)
