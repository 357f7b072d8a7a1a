"""Streamed text: never half a character, the same text as decoding at once, and the same cost for every token."""

import random

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models

from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.streaming import decoding_rule
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

FAMILY = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽"
SPOKEN = f"東京は、{FAMILY} 日本の首都です。 naïve café 麤"


@pytest.fixture(scope="module")
def tokenizers_by_kind(corpus) -> dict[str, Tokenizer]:
    names = {"byte-level": "gpt2-bpe", "sentencepiece": "sentencepiece-32k", "wordpiece": "minilm"}
    learned = {kind: train_tokenizer(kind, [*corpus, SPOKEN], 900) for kind in ("unigram", "characters")}
    return {kind: load_tokenizer(name) for kind, name in names.items()} | learned


KINDS = ["byte-level", "sentencepiece", "wordpiece", "unigram", "characters"]


def pushed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(number) for number in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_no_half_characters_and_the_same_text(kind, tokenizers_by_kind) -> None:
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(SPOKEN, special=True)
    parts = pushed(tokenizer, ids)
    assert not any("\ufffd" in part for part in parts) and parts[-1] == ""
    assert "".join(parts) == tokenizer.decode(ids)
    assert kind == "wordpiece" or "".join(parts) == SPOKEN
    assert "".join(pushed(tokenizer, ids, False)) == tokenizer.decode(ids, skip_special=False)


def test_a_character_comes_with_its_last_byte(tokenizers_by_kind) -> None:
    for kind in ("byte-level", "sentencepiece"):
        tokenizer = tokenizers_by_kind[kind]
        ids = tokenizer.encode("a麤")
        assert len(ids) >= 4, "the ideograph takes three bytes"
        stream = tokenizer.stream()
        assert [stream.push(number) for number in ids[-3:]] == ["", "", "麤"]
        stream = tokenizer.stream()
        assert [stream.push(number) for number in ids[:-1]][-2:] == ["", ""] and "\ufffd" in stream.flush()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(kind, tokenizers_by_kind, data) -> None:
    tokenizer = tokenizers_by_kind[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12))
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "wordpiece", "characters"])
def test_any_ids_decode_as_the_library_does(kind, tokenizers_by_kind) -> None:
    tokenizer, chance = tokenizers_by_kind[kind], random.Random(0)
    for _ in range(500):
        ids = chance.choices(range(tokenizer.vocab_size), k=6)
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)


def test_the_first_space_is_dropped_once(tokenizers_by_kind) -> None:
    tokenizer = tokenizers_by_kind["sentencepiece"]
    for text in ("Hello there", " Hello", "   Hello", ""):
        assert "".join(pushed(tokenizer, tokenizer.encode(text, special=True))) == text
    hello = tokenizer.token_id("▁Hello")
    assert pushed(tokenizer, [tokenizer.bos_id, hello, hello]) == ["", "Hello", " Hello", ""]


def test_each_push_costs_the_same(tokenizers_by_kind, monkeypatch) -> None:
    stream = tokenizers_by_kind["byte-level"].stream()
    asked = []
    token_of = stream._token_of
    monkeypatch.setattr(stream, "_token_of", lambda number: asked.append(number) or token_of(number))
    ids = tokenizers_by_kind["byte-level"].encode(SPOKEN) * 50
    for number in ids:
        stream.push(number)
    assert asked == ids, "each token is looked at once, when it comes"


def library_decoder(decoder) -> tokenizers.Tokenizer:
    words = ["▁a", "▁▁b", "c", "▁", "d</w>", "e", "##f", "g", ".", "'s", "n't", "<0xE3>", "<0x81>", "<0x82>"]
    built = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    if decoder is not None:
        built.decoder = decoder
    return built


@pytest.mark.parametrize(
    "decoder",
    [
        None, decoders.ByteLevel(), decoders.Fuse(), decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never"),
        decoders.WordPiece(), decoders.WordPiece(cleanup=False), decoders.BPEDecoder(), decoders.Replace("▁", " "),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]), decoders.Sequence([decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ],
    ids=lambda decoder: "none" if decoder is None else decoder.__getstate__().decode()[:60],
)  # fmt: skip
def test_every_decoder_is_the_librarys(decoder) -> None:
    tokenizer, chance = Tokenizer(library_decoder(decoder)), random.Random(0)
    for _ in range(300):
        ids = chance.choices(range(tokenizer.vocab_size), k=chance.randrange(6))
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)
        assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


def test_decoders_that_are_not_known_are_named() -> None:
    with pytest.raises(UserError, match="of the kind 'CTC'"):
        Tokenizer(library_decoder(decoders.CTC())).decode([0])
    with pytest.raises(UserError, match="a sequence of CTC, Fuse"):
        decoding_rule({"type": "Sequence", "decoders": [{"type": "CTC"}, {"type": "Fuse"}]})
