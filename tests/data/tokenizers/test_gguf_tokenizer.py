"""Tokenizers out of GGUF files and into them, as transformers and llama.cpp understand them."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from keifu.data.catalogue.catalogue import fetch
from keifu.data.tokenizers.bpe import CUTS, byte_level_backend
from keifu.data.tokenizers.gguf import gguf_tokenizer, to_gguf_fields
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.streaming import byte_alphabet
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

PIECES = st.sampled_from(
    ["12345", " 99", "3.14", "a", "don't", " the", "\n\n", "\t", "東京", "😀", "½", "é", "<|im_end|>", "_"]
)
TEXT = st.one_of(st.lists(PIECES, max_size=10).map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module")
def reference():
    path = fetch("smollm2")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def original(smollm2) -> tokenizers.Tokenizer:
    """Return the rules of SmolLM2's tokenizer.json, which GGUF only names: single digits, then GPT-2's words."""
    rules = tokenizers.Tokenizer.from_str(smollm2.backend.to_str())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    rules.encode_special_tokens = True
    return rules


@pytest.fixture(scope="module")
def spelled(smollm2) -> set[int]:
    """Return the bytes in SmolLM2's vocabulary. It lacks a few, and drops them like the library."""
    vocabulary = smollm2.backend.get_vocab()
    return {byte for letter, byte in byte_alphabet().items() if letter in vocabulary}


# transformers leaves the splitting of digits out when it reads a GGUF. It shows where white space before a digit joins
# what comes before it: there the original tokenizer and llama.cpp decide, see the next test.
BEFORE_DIGIT = re.compile(r"\s\s(?=\d)|\s(?=[^\x00-\x7f])(?=[²½٣Ⅷ])")


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_on_the_same_file(smollm2, reference, texts) -> None:
    assert smollm2.vocab_size == len(reference) == 49152
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.stop_ids) == (1, 2, 2, {2})
    assert smollm2.chat_template == reference.chat_template
    everyday = [*texts, "In 1969, 3.14 of 12345.", "x = [1, 22, 333]\n1. One\n"]
    for text in (BEFORE_DIGIT.sub("", text) for text in everyday):
        assert smollm2.encode(text) == reference(text, split_special_tokens=True)["input_ids"]
        assert smollm2.encode(text, special=True, allow_special=True) == reference(text)["input_ids"]
        assert smollm2.decode(smollm2.encode(text)) == text
    assert len(smollm2.encode("12345")) == 5, "every digit is a token"


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_smollm2_follows_its_original_rules_on_any_text(smollm2, original, spelled, text: str) -> None:
    assert smollm2.encode(text) == original.encode(text, add_special_tokens=False).ids
    if set(text.encode()) <= spelled:
        assert smollm2.decode(smollm2.encode(text)) == text


def write(fields: dict[str, Any], path: Path) -> Path:
    """Write a GGUF file that has only these fields, and return its path."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@cache
def sentencepiece_fields() -> dict[str, Any]:
    """Return the fields of a tokenizer of SentencePiece."""
    return to_gguf_fields(load_tokenizer("sentencepiece-32k"))


@pytest.mark.parametrize(
    "name", ["smollm2", "gpt2-bpe", pytest.param("sentencepiece-32k", marks=pytest.mark.slow), "bpe", "digits"]
)
def test_what_is_written_is_what_is_read(name, smollm2, corpus, texts, tmp_path) -> None:
    if name in ("bpe", "digits"):
        ours = train_tokenizer("bpe", corpus, 600, special_tokens=["<|turn|>"], split_digits=name == "digits")
        ours = Tokenizer(ours.backend, ours.special, [ours.token_id("<|turn|>")], "{{ messages }}")
    else:
        ours = smollm2 if name == "smollm2" else load_tokenizer(name)
    fields = to_gguf_fields(ours)
    small = ours.vocab_size < 1000  # the others go without the file: the gguf package takes seconds to read one
    again = load_tokenizer(write(fields, tmp_path / "x.gguf")) if small else gguf_tokenizer(fields)
    assert again.special == ours.special and again.stop_ids == ours.stop_ids
    assert again.chat_template == ours.chat_template
    for text in [*texts, "a</s>b<|turn|><|im_end|>"]:
        assert again.encode(text, special=True) == ours.encode(text, special=True)
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def test_fields_are_those_that_llama_cpp_wants(smollm2, smollm2_fields) -> None:
    ours = to_gguf_fields(smollm2)
    assert set(smollm2_fields) <= set(ours)
    for key in smollm2_fields:
        assert ours[key] == smollm2_fields[key] or key.endswith("token_type"), key
    assert ours["tokenizer.ggml.token_type"][:3] == [3, 3, 3] and ours["tokenizer.ggml.token_type"][100] == 1
    sentencepiece = sentencepiece_fields()
    assert sentencepiece["tokenizer.ggml.model"] == "llama" and sentencepiece["tokenizer.ggml.add_space_prefix"] is True
    assert sentencepiece["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6], "unknown, control, control, byte"
    scores = dict(zip(sentencepiece["tokenizer.ggml.tokens"], sentencepiece["tokenizer.ggml.scores"], strict=True))
    assert scores["▁t"] > scores["▁the"] > scores["▁version"], "what is merged first scores highest"


def test_text_begins_with_a_space_unless_the_file_says_otherwise(texts) -> None:
    """Older files of SentencePiece models do not have the key."""
    ours, fields = load_tokenizer("sentencepiece-32k"), {**sentencepiece_fields()}
    assert fields.pop("tokenizer.ggml.add_space_prefix") is True
    again = gguf_tokenizer(fields)
    assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    bare = gguf_tokenizer(fields | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("the") == [ours.token_id("the")] != again.encode("the") == [ours.token_id("▁the")]


@pytest.mark.parametrize("cut", sorted(CUTS))
def test_every_cut_splits_text_and_loses_nothing(cut, texts) -> None:
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(byte_level_backend(alphabet, [], cut))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    fields = to_gguf_fields(tokenizer)
    assert CUTS[fields["tokenizer.ggml.pre"]] == CUTS[cut], "written under a name of the same rules"


def words(cut: str, text: str) -> list[str]:
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(byte_level_backend(alphabet, [], cut))
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    "cut, text, expected",
    [
        ("gpt-2", "I'LL pay 1234 now", ["I", "'", "LL", " pay", " 1234", " now"]),
        ("smollm", "I pay 1234\n\n 5", ["I", " pay", " ", "1", "2", "3", "4", "\n\n ", "5"]),
        ("llama-bpe", "I'LL pay 1234!\n", ["I", "'LL", " pay", " ", "123", "4", "!\n"]),
        ("qwen2", "pay (12)", ["pay", " (", "1", "2", ")"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
    ],
)
def test_cuts_by_example(cut, text, expected) -> None:
    assert words(cut, text) == expected


def minimal(**changes: Any) -> dict[str, Any]:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|e|>"]
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [], "eos_token_id": 256}
    fields |= {"token_type": [1] * 256 + [3]} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def test_defaults_of_llama_cpp() -> None:
    tokenizer = gguf_tokenizer(minimal(pre="llama-bpe", bos_token_id=256))
    assert tokenizer.encode("", special=True) == [256], "this family puts a BOS first unless it is told not to"
    assert (
        gguf_tokenizer(minimal(pre="llama-bpe", bos_token_id=256, add_bos_token=False)).encode("", special=True) == []
    )
    assert gguf_tokenizer(minimal(bos_token_id=256)).encode("", special=True) == []
    assert gguf_tokenizer(minimal(eot_token_id=5)).stop_ids == {256, 5}
    user = gguf_tokenizer(minimal(token_type=[1] * 256 + [4]))
    assert user.encode("a<|e|>")[-1] == 256 and not user.special_ids, "user-defined tokens are text"
    chat = minimal(tokens=[*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>"], eos_token_id=0)
    chat["tokenizer.chat_template"] = "<|im_end|>"
    assert gguf_tokenizer(chat).stop_ids == {0, 256}, "the usual name, written by the template, and none given"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; keifu reads 'gpt2' and 'llama'"),
        ({"model": None}, "holds no tokenizer.ggml.model"),
        ({"merges": None}, "holds no tokenizer.ggml.merges"),
        ({"tokens": ["a", "b", "a"], "token_type": None, "eos_token_id": None}, "'a' twice, with the ids 0 and 2"),
        ({"pre": "smolm"}, "no way of cutting text .* 'smolm'. Did you mean 'smollm'"),
        ({"token_type": [1]}, "257 tokens but 1 entries"),
        ({"eos_token_id": 300}, "eos token has the id 300, but there are only 257 tokens"),
        ({"model": "llama"}, "holds no tokenizer.ggml.scores"),
        (
            {"model": "llama", "tokens": ["a", "a"], "scores": [0, 0], "token_type": None, "eos_token_id": 0},
            "'a' twice",
        ),
    ],
)
def test_fields_that_make_no_tokenizer_say_why(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(minimal(**changes))


def test_tokenizers_that_gguf_cannot_hold_say_why(corpus) -> None:
    for kind, what in (("unigram", "Unigram"), ("wordpiece", "WordPiece"), ("characters", "made of single characters")):
        with pytest.raises(UserError, match=f"this one is {what}: use kind bpe"):
            to_gguf_fields(train_tokenizer(kind, corpus, 900))
    odd = train_tokenizer("bpe", corpus, 400)
    odd.backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    with pytest.raises(UserError, match=r"no name for this tokenizer's way .*\(Punctuation, ByteLevel\)"):
        to_gguf_fields(odd)


@pytest.mark.parametrize("name", ["smollm2", "sentencepiece-32k", "bpe"])
def test_llama_cpp_encodes_alike(name, smollm2, corpus, texts, tmp_path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    bpe = train_tokenizer("bpe", corpus, 600, split_digits=True)
    ours = {"smollm2": smollm2, "bpe": bpe}.get(name) or load_tokenizer(name)
    needed = dict.fromkeys(["context_length", "embedding_length", "block_count", "feed_forward_length"], 64)
    needed |= {"attention.head_count": 4, "vocab_size": ours.vocab_size}
    model = {f"llama.{key}": value for key, value in needed.items()}
    path = write(to_gguf_fields(ours) | model | {"llama.attention.layer_norm_rms_epsilon": 1e-5}, tmp_path / "x.gguf")
    reference = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [*texts, "\n\n  12345 and\r\n 3.14", "a</s>b<|im_end|>"]:
        assert ours.encode(text) == reference.tokenize(text.encode(), add_bos=False, special=False), text
        assert ours.encode(text, special=True) == reference.tokenize(text.encode(), add_bos=True, special=False)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"])
def test_a_chat_begins_with_one_bos_if_the_vocabulary_adds_it(adds: bool, template: str) -> None:
    """llama.cpp, with which the authors of a GGUF file try it, puts the BOS before a template that writes none."""
    backend = train_tokenizer("bpe", ["ab"], 260, special_tokens=["<s>"]).backend
    fields = to_gguf_fields(Tokenizer(backend, {"bos_token": "<s>"}, chat_template=template))
    found = gguf_tokenizer(fields | {"tokenizer.ggml.add_bos_token": adds})
    prompt = found.render_chat([{"role": "user", "content": "ab"}])
    assert prompt.count(found.bos_id) == (adds or "bos_token" in template) and found.decode(prompt) == "ab"
    assert prompt[0] == found.bos_id or not adds
