"""SentencePiece's files, rebuilt: encoding and decoding are those of the sentencepiece library itself."""

import io
import random

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from keifu.data.catalogue.catalogue import fetch
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.sentencepiece import parse
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

PIECES = st.sampled_from(
    ["a", " ", "  ", "▁", "the", "\n", "東京", "の", "😀", "é", "1", "<s>", "</s>", "<0x41>", "aaa", "\t"]
)
TEXT = st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module")
def mistral() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    path = fetch("sentencepiece-32k")
    return load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


def learn(corpus: list[str], **options) -> bytes:
    """Train a small model with sentencepiece and return its bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus for line in text.splitlines() if line.strip()),
        model_writer=written, minloglevel=2, hard_vocab_limit=False, num_threads=1, **options,
    )  # fmt: skip
    return written.getvalue()


def test_real_model_encodes_as_sentencepiece_does(mistral, texts) -> None:
    ours, reference = mistral
    assert ours.vocab_size == 32000 and (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    for text in texts:
        assert ours.encode(text) == reference.encode(text)
        assert ours.encode(text, special=True) == [1, *reference.encode(text)]
        assert ours.decode(ours.encode(text)) == text == reference.decode(ours.encode(text))


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_any_text_as_sentencepiece_does(mistral, text: str) -> None:
    ours, reference = mistral
    assert ours.encode(text) == reference.encode(text)
    assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(3, 31999)), max_size=8))
def test_any_ids_decode_as_in_sentencepiece(mistral, ids: list[int]) -> None:
    ours, reference = mistral
    if ids and ids[0] != 3 + ord(" "):  # a first space that is spelled as a byte is kept there, and stripped here
        assert ours.decode(ids) == reference.decode(ids)


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, **IDENTITY},
        {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<think>", "[TOOL]"], **IDENTITY},
        {"model_type": "bpe", "control_symbols": ["<|x|>"], "add_dummy_prefix": False, "pad_id": 3},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<think>"], **IDENTITY},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "control_symbols": ["<|x|>"]},
    ],
    ids=str,
)
def test_every_setting_is_followed(options, corpus, texts, tmp_path) -> None:
    data = learn(corpus, vocab_size=700, **options)
    (tmp_path / "tokenizer.model").write_bytes(data)
    ours, reference = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data)
    odd = ["<think> a<think>b", "[TOOL][TOOL] x", "<|x|> <unk></s> <0x41>", "a▁b ▁", "ＡＢＣ ①", "  the  state "]
    for text in texts + odd:
        # `tokenizers` normalises whole grapheme clusters, sentencepiece parts of them
        same = text if "identity" in options.values() else text.replace("\r\n", "\n").replace("\ufe0f", "")
        assert ours.encode(same) == reference.encode(same), same
        if "<unk>" not in [ours.backend.id_to_token(number) for number in ours.encode(same)]:
            assert ours.decode(ours.encode(same)) == reference.decode(ours.encode(same))
    assert (ours.pad_id is not None) == ("pad_id" in options)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_mark_of_a_replaced_character_is_lost(rule: str, kind: str, corpus, tmp_path) -> None:
    """Decomposed kana come from file names of macOS and from PDFs."""
    data = learn(corpus, vocab_size=700, model_type=kind, byte_fallback=True, normalization_rule_name=rule)
    (tmp_path / "tokenizer.model").write_bytes(data)
    ours, reference = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in ("か\u3099", "は\u309a", "？\u0349x", "Ａ\u0301 E\u0301", "½\u0349", "ｶﾞｷ\u0301", "A\u0349b"):
        assert ours.encode(text) == reference.encode(text), ascii(text)


def test_kinds_that_are_not_read_are_named(corpus) -> None:
    for kind, message in (("word", "is a word model"), ("char", "is a character model")):
        with pytest.raises(UserError, match=f"x.model {message}; keifu reads SentencePiece's BPE and Unigram"):
            parse(learn(corpus, vocab_size=300, model_type=kind), "x.model")
    with pytest.raises(UserError, match="puts spaces at the ends of words"):
        parse(learn(corpus, vocab_size=300, model_type="bpe", treat_whitespace_as_suffix=True), "x.model")


def test_a_torn_file_is_refused(corpus) -> None:
    data = learn(corpus, vocab_size=300, model_type="bpe")
    with pytest.raises(UserError, match="x.model is not a SentencePiece model, or it is torn"):
        parse(data[: len(data) // 2], "x.model")
    with pytest.raises(UserError, match="holds no pieces"):
        parse(b"", "x.model")


@pytest.mark.parametrize("bits", [24, pytest.param(60, marks=pytest.mark.slow)])
def test_a_wrong_bit_in_the_table_of_characters_is_a_sentence_or_harmless(bits: int, tmp_path, capfd) -> None:
    data = learn(["the cat sat on the mat", "a dog ran"] * 30, vocab_size=40, model_type="unigram")
    table = parse(data, "x").settings.character_map
    start = data.index(table)
    text = "ｱｶﾞＡ㍿ﬁ½①한" + "".join(map(chr, [*range(0xA0, 0x180), *range(0x3300, 0x33FF), *range(0xFF00, 0xFFF0)]))
    chance = random.Random(0)
    refused = 0
    for _ in range(bits):
        damaged = bytearray(data)
        damaged[start + chance.randrange(4, len(table))] ^= 1 << chance.randrange(8)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            load_tokenizer(tmp_path).encode_batch([*text])
        except UserError as error:
            assert "damaged table of character replacements" in str(error)
            refused += 1
    assert refused > bits / 12 and "panicked" not in capfd.readouterr().err


def test_a_panic_of_the_library_is_a_sentence(monkeypatch, mistral) -> None:
    class PanicException(BaseException):
        """Panic as pyo3 raises it, which is no Exception."""

    def panic(*_, **__) -> None:
        raise PanicException("index out of bounds")

    copy = mistral[0].replace()
    copy.backend = type("Backend", (), {"encode_batch_fast": panic, "get_vocab": dict})()  # pyright: ignore
    monkeypatch.setattr(type(copy), "_spelled", lambda *_: False)
    with pytest.raises(UserError, match="could not be encoded: index out of bounds"):
        copy.encode("a")
