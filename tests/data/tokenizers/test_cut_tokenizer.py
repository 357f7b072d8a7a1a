"""A byte-level BPE that is cut to its first merges: what it encodes, its files, and what cannot be cut."""

import random
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import models, processors

from keifu.data.tokenizers.bpe import first_merges, ids_of_cut, keep_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
WORDS = "the small brown dog and the other dog saw a small house near the brown river"


@pytest.fixture(scope="module")
def whole() -> Tokenizer:
    """Return a tokenizer whose chat template writes a word that is merged last."""
    text = [WORDS] * 40 + ["user assistant"] * 2
    learned = train_tokenizer("bpe", text, 400, ["<|im_start|>", "<|im_end|>"])
    return learned.with_chat_template(TEMPLATE).replace(stop_ids=[learned.token_id("<|im_end|>")])


def test_any_text_comes_back(whole: Tokenizer) -> None:
    cut, ids = keep_tokens(whole, first_merges(whole, 20))
    assert 256 + 20 < cut.vocab_size < whole.vocab_size
    drawn = random.Random(1)
    texts = ["".join(chr(drawn.choice([*range(0x20, 0x300), *range(0x3040, 0x9000)])) for _ in range(60))]
    longer = 0
    for text in [*texts, WORDS, f"  {WORDS}\n\t{WORDS[::-1]}\n"]:
        assert cut.decode(cut.encode(text)) == text
        assert "".join(whole.decode([ids[token]]) for token in cut.encode(WORDS)) == WORDS
        longer += len(cut.encode(text)) > len(whole.encode(text))
    assert longer
    assert [ids[token] for token in cut.encode("the dog")] == whole.encode("the dog")


def test_what_the_chat_template_writes_is_encoded_as_before(whole: Tokenizer) -> None:
    cut, ids = keep_tokens(whole, first_merges(whole, 20))
    talk = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the dog"}]
    found, mask = cut.render_turns(talk)
    assert ([ids[token] for token in found], mask) == whole.render_turns(talk)
    assert {ids[token] for token in cut.stop_ids} == whole.stop_ids
    plain, _ = keep_tokens(whole, first_merges(whole.with_chat_template(None), 20))
    assert len(plain.encode("assistant")) > len(cut.encode("assistant"))


def test_merges_that_a_text_uses_most_stay(whole: Tokenizer) -> None:
    uses = Counter(whole.encode("the brown river near the brown river"))
    for count in (12, 20):
        kept = first_merges(whole, count, uses)
        cut, ids = keep_tokens(whole, kept)
        last = max(uses, key=lambda token: (uses[token], -token))
        assert whole.backend.id_to_token(last) in kept
    assert [ids[token] for token in cut.encode("the brown river")] == whole.encode("the brown river")
    first, _ = keep_tokens(whole, first_merges(whole, 20))
    assert len(first.encode("the brown river")) > len(cut.encode("the brown river"))


def test_saved_files_give_transformers_the_same_ids(whole: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(whole.backend.to_str())
    start = ("<|im_start|>", backend.token_to_id("<|im_start|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|im_start|>:0 $A", special_tokens=[start])
    cut, _ = keep_tokens(whole.replace(backend=backend), first_merges(whole, 33))
    cut.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (WORDS, "<|im_start|>user: hello<|im_end|>", "日本 🎉"):
        assert theirs(text)["input_ids"] == cut.encode(text, special=True, allow_special=True)
    assert theirs.decode(cut.encode(WORDS)) == WORDS


def test_a_cut_is_recognised_by_its_merges(whole: Tokenizer) -> None:
    kept = first_merges(whole, 20)
    cut, ids = keep_tokens(whole, kept)
    assert ids_of_cut(whole, cut) == ids
    assert ids_of_cut(cut, whole) is None
    other = train_tokenizer("bpe", ["red green blue"] * 9, 270, ["<|im_start|>", "<|im_end|>"])
    assert ids_of_cut(whole, other) is None
    backend = tokenizers.Tokenizer.from_str(whole.backend.to_str())
    backend.add_special_tokens(["<|image|>"])
    more = whole.replace(backend=backend)  # as chat models have more than their base
    assert ids_of_cut(more, whole) is None
    with pytest.raises(UserError, match=r"without its '<\|image\|>'"):
        keep_tokens(more, kept)
    plain, fewer = (
        Tokenizer(tokenizers.Tokenizer(models.BPE(vocabulary, []))) for vocabulary in ({"a": 0, "b": 1}, {"a": 0})
    )
    assert ids_of_cut(plain, fewer) is None


def test_what_cannot_be_cut_is_refused(whole: Tokenizer) -> None:
    merges = len(whole.description()["model"]["merges"])
    assert keep_tokens(whole, first_merges(whole, merges))[0].backend.to_str() == whole.backend.to_str()
    with pytest.raises(UserError, match=f"has {merges} merges, not 9,999"):
        first_merges(whole, 9999)
    pieces = train_tokenizer("wordpiece", [WORDS] * 9, 99)
    with pytest.raises(UserError, match="Only a byte-level BPE"):
        first_merges(pieces, 5)
    backend = tokenizers.Tokenizer.from_str(whole.backend.to_str())
    backend.post_processor = processors.RobertaProcessing(("<|im_end|>", 1), ("<|im_start|>", 0))
    with pytest.raises(UserError, match="RobertaProcessing around a text"):
        keep_tokens(whole.replace(backend=backend), first_merges(whole, 5))
