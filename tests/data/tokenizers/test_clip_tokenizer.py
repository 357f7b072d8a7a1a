"""CLIP's tokenizer gives transformers' ids, from OpenAI's file, from two files and from a tokenizer.json."""

import json
from pathlib import Path

import pytest
import transformers

from keifu.data.tokenizers.bpe import learn, vocabulary_of
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

TEXTS = [
    "a photo of a cat", "  Two   SPACES\tand\na line ", "It's the cat's; they'll, we've, I'd, you're O'Neill's.",
    "naïve café, ﬁne", "e\u0301 decomposed", "東京タワーと桜🌸", "👨‍👩‍👧‍👦 family 🏳️‍🌈", "Ελλάδα ΣΊΣΥΦΟΣ", 
    "İstanbul", "Straße",    "日本語の文章です。", "مرحبا بالعالم", "हिन्दी में", "1234 5.6e7 ½ ²",
    "don't!!! ### ...", "", " ", "\u3000全角\u3000",
    "🫠🪿", "A​B zero width", "한국어 문장", "x" * 70, "co-operate_under score", "&amp; <b>tags</b>", "안녕😀!?",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    try:
        return load_tokenizer("clip-bpe")
    except (UserError, OSError) as error:
        pytest.skip(f"CLIP's merges cannot be had here: {error}")


def theirs(clip: Tokenizer) -> transformers.CLIPTokenizer:
    described = clip.description()["model"]
    return transformers.CLIPTokenizer(vocab=described["vocab"], merges=[tuple(pair) for pair in described["merges"]])


def test_published_sizes_and_ids(clip) -> None:
    assert clip.vocab_size == 49_408 and (clip.bos_id, clip.eos_id, clip.pad_id) == (49_406, 49_407, 49_407)
    assert clip.encode("a photo of a cat", special=True) == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_ids_are_transformers_ids(clip) -> None:
    reference = theirs(clip)
    assert clip.encode_batch(TEXTS, special=True) == reference(TEXTS).input_ids
    marked = "a <|endoftext|> b"
    assert clip.encode(marked, special=True, allow_special=True) == reference(marked).input_ids
    assert clip.encode(marked, special=True).count(49_407) == 1  # text cannot end a caption


def test_text_comes_back_in_lower_case_with_single_spaces(clip) -> None:
    reference = theirs(clip)
    for text in ["A Photo of a  CAT", "東京タワー🌸 and more", "it's 12"]:
        ids = clip.encode(text, special=True)
        assert clip.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_saved_and_two_files_are_the_same(clip, tmp_path) -> None:
    clip.save(tmp_path / "one")
    assert load_tokenizer(tmp_path / "one").fingerprint == clip.fingerprint
    model, two = clip.description()["model"], tmp_path / "two"
    two.mkdir()
    (two / "vocab.json").write_text(json.dumps(model["vocab"]))
    (two / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    assert load_tokenizer(two).fingerprint == clip.fingerprint
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert again(TEXTS).input_ids == clip.encode_batch(TEXTS, special=True)


def test_what_is_not_openai_s_file(tmp_path: Path) -> None:
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="not a gzip file"):
        load_tokenizer(file)


def test_ids_follow_from_the_merges() -> None:
    vocabulary = vocabulary_of([("a", "b</w>"), ("c", "ab</w>")])
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["cab</w>"] == 513
    assert vocabulary["<|endoftext|>"] == 515 == len(vocabulary) - 1


def test_merges_are_learned_from_names() -> None:
    names = ["grinning face", "face with tears", "waving hand", "にっこり笑う", "手を振る", "にっこり"] * 5
    tokenizer = learn(names, 540)
    assert 514 < tokenizer.vocab_size <= 540 and tokenizer.eos_id == tokenizer.vocab_size - 1
    ids = tokenizer.encode("Grinning  FACE にっこり ß", special=True)
    assert tokenizer.decode(ids) == "grinning face にっこり ß"
    assert len(tokenizer.encode("face")) < len("face")
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    with pytest.raises(UserError, match="at least 514"):
        learn(names, 500)


def test_japanese_is_merged_to_characters_and_no_further() -> None:
    tokenizer = learn(["waving hand", "手を振る", "手を振る人", "o型"] * 50, 4000)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("手を振る人 waving o型")]
    assert pieces == ["手", "を", "振", "る", "人", "waving", "o", "型"]
