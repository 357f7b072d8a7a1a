"""The engine's tokenizers give keifu's ids: 200 texts for each packaged tokenizer."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import keifu
from keifu.data.tokenizers.tokenizer import Tokenizer

PACKAGED = Path(__file__).parents[2] / "pretrained/src/keifu_pretrained"
HARD = [
    "", " ", "  two  spaces ", "\n\n a\tb\r\n", "I'll don't WE'RE it's 's", "3.14159 and 1,000,000",
    "x\u00a0y\u3000z\u2028w",
    "naïve café Ångström", "ΟΔΟΣ ὈΔΥΣΣΕΎΣ", "Straße İstanbul", "日本語のテキスト。東京タワー",
    "「猫」は、寝ています！？",
    "🙂👩‍👩‍👧‍👦🇯🇵", "e\u0301 e\u0308", "\ufeffbom\ufffd\x00\x07", "a" * 150, "1²③½", "<|im_end|> [MASK] <pad>",
    "$5 + 3 = ^8 `x` ~y |z|", "مرحبا بالعالم", "नमस्ते दुनिया", "한국어 텍스트", "--- ... ___ ###", "\x85next\u200bzero",
]  # fmt: skip
PARTS = [
    *"aeiou tnsrhl.,!?'-()0123456789",
    "the ",
    "of ",
    "ing",
    " and",
    "ée",
    "ü",
    "猫",
    "日本",
    "の",
    "です",
    "🙂",
    "\n",
    "  ",
]


def texts() -> Iterator[str]:
    """Yield 200 texts: the hard ones, and random mixtures."""
    yield from HARD
    chance = random.Random(5)
    for _ in range(200 - len(HARD)):
        yield "".join(chance.choice(PARTS) for _ in range(chance.randrange(1, 60)))


def tokenizer_of(name: str) -> Tokenizer:
    tokenizer = keifu.load(PACKAGED / name)[1]
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", ["gpt-en", "chat-en", "ja-en", "en-ja", "bert-en", "emoji-clip", "emoji", "see"])
@pytest.mark.parametrize("special", [False, True])
def test_ids(engine, name: str, special: bool) -> None:
    if engine.kernel:
        pytest.skip("a tokenizer has no kernel")
    tokenizer, every = tokenizer_of(name), [*texts()]
    found = engine("encode", name, every, {"special": special, "allowSpecial": special})
    expected = tokenizer.encode_batch(every, special=special, allow_special=special)
    different = [text for text, ours, theirs in zip(every, expected, found, strict=True) if ours != theirs]
    assert len(every) == 200 and different == []


@pytest.mark.parametrize("name", ["gpt-en", "ja-en"])
def test_texts_come_back(engine, name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in ("The naïve cat, 猫 and 🙂!", "a  b\nc"):
        assert engine("decode", name, tokenizer.encode(text)) == text
