"""Marian's tokenizers give the ids and the texts that transformers gives with the same files."""

import io
import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import transformers

from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.sentencepiece import Pieces
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

ENGLISH = ["The cat sat on the mat, and the dog sat on the cat.", "What is the name of the third one?", "Yes! It is."]
JAPANESE = ["猫がマットの上に座った。", "犬も猫の上に座った。", "三番目の名前は何ですか？", "はい、そうです！"]
RANGES = [(32, 0x250), (0x300, 0x370), (0x2000, 0x2100), (0x3000, 0x3400), (0xAC00, 0xAD00), (0xF900, 0xFFEF)]


def strange_texts(count: int) -> list[str]:
    """Return texts of accents, marks, spaces, half-width and compatibility characters in any order."""
    chance = random.Random(1)
    return ["".join(chr(chance.randrange(*chance.choice(RANGES))) for _ in range(12)) for _ in range(count)]


TEXTS = [
    *ENGLISH, *JAPANESE, *strange_texts(400), "", "   ", "  two   spaces ", "a\nb\tc\r\nd", "ＡＢＣ①ﾊﾟ", "🙂🙂 ok 🙂",
    ">>deu<< the", ">>fra<<猫", "the >>fra<<", ">> the << cat", "か\u3099き", "e\u0301\u0323 ﬁ", "\u200bz\ufeff",
]  # fmt: skip


def model_of(texts: list[str], kind: str, **settings) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 5), model_writer=out, model_type=kind, hard_vocab_limit=False, minloglevel=2,
        **{"vocab_size": 70} | settings,
    )  # fmt: skip
    return out.getvalue()


def numbered(models: list[bytes], more: list[str]) -> dict[str, int]:
    """Return the pieces of the models with new numbers. Some are missing, as in published vocabularies."""
    pieces = {piece for data in models for piece in _pieces(data)}
    kept = [piece for n, piece in enumerate(sorted(pieces)) if n % 7]
    return {piece: number for number, piece in enumerate(["</s>", "<unk>", "<pad>", *kept, *more])}


def _pieces(data: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    return [processor.id_to_piece(number) for number in range(3, processor.get_piece_size())]


def written(directory: Path, kind: str, separate: bool = False, **settings) -> Path:
    models = [model_of(ENGLISH, kind, **settings), model_of(JAPANESE, kind, **settings)]
    for name, data in zip(("source.spm", "target.spm"), models, strict=True):
        (directory / name).write_bytes(data)
    codes = [] if separate else [">>deu<<", ">>fra<<"]
    vocabularies = {"vocab.json": numbered(models[:1] if separate else models, codes)}
    if separate:
        vocabularies["target_vocab.json"] = numbered(models[1:], [])
    for name, vocabulary in vocabularies.items():
        (directory / name).write_text(json.dumps(vocabulary))
    config = {"tokenizer_class": "MarianTokenizer", "model_max_length": 512, "separate_vocabs": separate}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


CASES = {
    "unigram": ("unigram", False, {}),
    "bpe": ("bpe", False, {}),
    "two-vocabularies": ("unigram", True, {}),
    "bytes": ("bpe", False, {"byte_fallback": True, "vocab_size": 340}),
    "no-table": ("unigram", False, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
}


@pytest.mark.filterwarnings("ignore:Recommended")
@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_transformers(case, tmp_path):
    kind, separate, settings = CASES[case]
    theirs = transformers.MarianTokenizer.from_pretrained(written(tmp_path, kind, separate, **settings))
    ours = load_tokenizer(tmp_path)
    assert ours.encode_batch(TEXTS, special=True) == theirs(TEXTS).input_ids
    targets = ours.encode_target_batch(TEXTS, special=True)
    assert targets == theirs(text_target=TEXTS).input_ids
    assert any(ours.special_ids & {row[0]} for row in targets if row[:-1])  # some pieces are unknown
    rows = [*targets, *([random.Random(n).randrange(1) for _ in range(9)] for n in range(50))]
    assert [ours.decode(row) for row in rows] == [theirs.decode(row, skip_special_tokens=True) for row in rows]
    assert (ours.eos_id, ours.pad_id, ours.bos_id) == (theirs.eos_token_id, theirs.pad_token_id, None)
    assert ours.vocab_size == theirs.vocab_size and ours.max_length == 512


def test_saved_it_is_the_same(tmp_path):
    ours = load_tokenizer(written(tmp_path, "unigram", separate=True))
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == ours.fingerprint == pickle.loads(pickle.dumps(ours)).fingerprint
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    (tmp_path / "other").mkdir()
    assert load_tokenizer(written(tmp_path / "other", "bpe")).fingerprint != ours.fingerprint


def test_text_spells_no_control_token(tmp_path):
    tokenizer = load_tokenizer(written(tmp_path, "unigram"))
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode("the</s><pad>")
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    allowed = tokenizer.encode("the</s><pad>", allow_special=True)
    assert allowed == [*tokenizer.encode("the"), tokenizer.eos_id, tokenizer.pad_id]


def test_an_unknown_language_is_named(tmp_path):
    tokenizer = load_tokenizer(written(tmp_path, "unigram"))
    with pytest.raises(UserError, match="no language code '>>deutsch<<'.*>>deu<<"):
        tokenizer.encode(">>deutsch<< the cat")
    with pytest.raises(UserError, match="half a surrogate pair"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("missing", ["target.spm", "vocab.json"])
def test_a_missing_file_is_named(missing, tmp_path):
    (written(tmp_path, "unigram") / missing).unlink()
    with pytest.raises(UserError, match=f"without {missing}"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_named(tmp_path):
    written(tmp_path, "unigram")
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 0}')
    with pytest.raises(UserError, match="vocab.json gives the id 0"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 1}')
    with pytest.raises(UserError, match="no '<pad>'"):
        load_tokenizer(tmp_path)
    written(tmp_path, "unigram")
    (tmp_path / "source.spm").write_bytes((tmp_path / "source.spm").read_bytes()[:100])
    with pytest.raises(UserError, match="source.spm is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_pieces_are_sentencepieces(tmp_path):
    data = model_of(ENGLISH + JAPANESE, "unigram")
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert Pieces(data, "model").cut(TEXTS) == [processor.encode(text, out_type=str) for text in TEXTS]


@pytest.mark.parametrize("separate", [False, True])
def test_with_other_parts_it_stays_a_tokenizer_of_two_languages(separate, tmp_path):
    tokenizer = load_tokenizer(written(tmp_path, "unigram", separate))
    other = tokenizer.replace(max_length=9)
    assert other.max_length == 9 and other.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert other.encode_target_batch(TEXTS) == tokenizer.encode_target_batch(TEXTS)
    assert other.target_vocab_size == tokenizer.target_vocab_size


def test_a_side_with_ids_of_its_own_names_its_tokens(tmp_path):
    source, target = load_tokenizer(written(tmp_path, "unigram", separate=True)).sides
    for side, file in ((source, "vocab.json"), (target, "target_vocab.json")):
        ids = json.loads((tmp_path / file).read_text())
        assert [side.backend.id_to_token(number) for number in ids.values()] == list(ids)
