"""Texts that have broken tokenizers before, for every test of one."""

from typing import Any

import pytest

TEXTS = [
    "Hello, world! It's the year 2024, isn't it?",
    "東京は日本の首都です。私は学生です。カタカナとひらがな、漢字。",
    "def f(x):\n\treturn x ** 2  # square\n\n\nif __name__ == '__main__':\n    print(f(3.14))\n",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇯🇵 and 👍🏽!",
    "  two leading,  two inside, three behind   ",
    "\ttabs\t\tand\u00a0no-break \u3000 wide\u200bzero width\r\nline ends\n\n\n",
    "ÀÉÎÕÜ naïve café Straße İstanbul ﬁne e\u0301",
    "x" * 50 + " " * 30 + "====----aaaaaaa",
    "한국어와 العربية و עברית ไทย हिन्दी",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ∑∫√ ½ ² ٣ Ⅷ",
    "\u0001\u007f control",
    " ",
    "\n",
    "",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return sentences, code, emoji, odd white space, many scripts, and nothing at all."""
    return TEXTS


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Return about 20,000 characters of English, Japanese and code, without two equal paragraphs."""
    import inspect
    import random

    chance = random.Random(0)
    words = sorted({word for word in inspect.getsource(random).split() if word.isalpha()})
    sentences = [" ".join(chance.choices(words, k=12)).capitalize() + "." for _ in range(150)]
    pieces = ["私は", "学生です", "東京", "日本の", "首都", "でした", "を見ました", "猫が", "、", "。"]
    japanese = ["".join(chance.choices(pieces, k=8)) for _ in range(80)]
    return sentences + japanese + inspect.getsource(chance.choices).splitlines(keepends=True)


@pytest.fixture(scope="session")
def smollm2_fields() -> dict[str, Any]:
    """Return the tokenizer's fields of SmolLM2's GGUF file. The gguf package needs two seconds to read them."""
    from keifu.data.catalogue.catalogue import fetch
    from keifu.data.tokenizers.gguf import read_gguf_fields

    return read_gguf_fields(fetch("smollm2"))


@pytest.fixture(scope="session")
def smollm2(smollm2_fields):
    """Return SmolLM2's tokenizer, from its GGUF file."""
    from keifu.data.tokenizers.gguf import gguf_tokenizer

    return gguf_tokenizer(smollm2_fields)
