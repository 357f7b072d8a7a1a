"""Tokenizers load from every published form, encode as the reference does, and save so that transformers reads them."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from keifu.data.catalogue.catalogue import fetch
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2-bpe")


@pytest.fixture(scope="module")
def gpt2_reference() -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(fetch("gpt2-bpe"))


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return load_tokenizer("minilm")


def reference_ids(reference, text: str) -> list[int]:
    return reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_gpt2_files_encode_as_transformers_does(gpt2, gpt2_reference, texts) -> None:
    assert gpt2.vocab_size == 50257 and gpt2.bos_id == gpt2.eos_id == 50256 and gpt2.pad_id is None
    for text in texts:
        assert gpt2.encode(text) == reference_ids(gpt2_reference, text)
        assert gpt2.decode(gpt2.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_byte_level_gives_any_text_back(gpt2, gpt2_reference, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids == reference_ids(gpt2_reference, text)
    assert gpt2.decode(ids) == text
    assert b"".join(map(gpt2.token_bytes, ids)).decode() == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 50255), max_size=8))
def test_any_ids_decode_as_in_transformers(gpt2, gpt2_reference, ids: list[int]) -> None:
    assert gpt2.decode(ids) == gpt2_reference.decode(ids, clean_up_tokenization_spaces=False)


def test_openai_names_of_the_same_files(gpt2, tmp_path) -> None:
    folder = fetch("gpt2-bpe")
    shutil.copy(folder / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(folder / "merges.txt", tmp_path / "vocab.bpe")
    assert load_tokenizer(tmp_path).encode("tokens, 12 of them") == gpt2.encode("tokens, 12 of them")
    assert load_tokenizer(tmp_path / "encoder.json").eos_id == 50256


def test_bert_directory_and_its_vocabulary_alone(minilm, texts, tmp_path) -> None:
    folder = fetch("minilm")
    reference = AutoTokenizer.from_pretrained(folder)
    alone = load_tokenizer(folder / "vocab.txt")
    for text in texts:
        assert minilm.encode(text) == alone.encode(text) == reference_ids(reference, text)
        wanted = reference(text)["input_ids"]
        assert minilm.encode(text, special=True) == wanted, "as long as it is, padded to nothing, cut nowhere"
        assert minilm.decode(wanted) == reference.decode(wanted, skip_special_tokens=True)
    assert (minilm.pad_id, minilm.bos_id, minilm.token_id("[MASK]"), minilm.max_length) == (0, None, 103, 512)
    shutil.copy(folder / "vocab.txt", tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert "[UNK]" in [load_tokenizer(tmp_path).backend.id_to_token(n) for n in load_tokenizer(tmp_path).encode("Ab")]


@pytest.mark.parametrize("kind, size", [("bpe", 600), ("wordpiece", 500), ("unigram", 700), ("characters", 200)])
@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_saved_directory_is_read_by_transformers(kind, size, model_type, corpus, tmp_path) -> None:
    ours = train_tokenizer(kind, corpus, size, special_tokens=["<|turn|>"])
    if model_type:  # the model's config.json lies in the same directory
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert again.special == ours.special and again.vocab_size == ours.vocab_size == len(theirs)
    assert again.fingerprint == ours.fingerprint and again.stop_ids == ours.stop_ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    for text in ["The state, a seed", "私は学生です、東京。", "    return [x]\n", "  a  b<|turn|>"]:
        if kind == "characters" and set(text) - set("".join(corpus)):
            continue
        ids = ours.encode(text, special=True, allow_special=True)
        assert ids == theirs(text)["input_ids"] == again.encode(text, special=True, allow_special=True)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_end_ids_come_from_generation_config(gpt2, tmp_path) -> None:
    gpt2.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [50256, 11]}')
    again = load_tokenizer(tmp_path)
    assert again.stop_ids == {50256, 11} and again.eos_id == 50256


def test_settings_beside_a_file_count(gpt2, tmp_path) -> None:
    gpt2.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|pad|>"}, "eos_token": "!"}')
    config = {
        "add_bos_token": True,
        "model_max_length": 1024,
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.pad_id == 50257 and again.vocab_size == 50258, "a new special token takes a new id"
    assert again.eos_id == 50256, "tokenizer_config.json goes before special_tokens_map.json"
    assert again.encode("a", special=True) == [50256, 64] and again.max_length == 1024
    assert again.chat_template == "{{ messages }}"


def test_saving_without_a_template_leaves_no_old_one(gpt2, tmp_path) -> None:
    gpt2.with_chat_template("old").save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "old"
    gpt2.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None


def test_text_does_not_spell_special_tokens(gpt2, minilm) -> None:
    assert 50256 not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.decode(gpt2.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert gpt2.encode("a<|endoftext|>b", allow_special=True) == [64, 50256, 65]
    assert 102 not in minilm.encode("a [SEP] b") and 102 in minilm.encode("a [SEP] b", allow_special=True)


def test_a_model_that_would_spell_them_itself_is_kept_from_it(corpus) -> None:
    unigram = train_tokenizer("unigram", corpus, 700, special_tokens=["<|turn|>"])
    inner = json.loads(unigram.backend.to_str())["model"]["vocab"]
    assert "</s>" in [piece for piece, _ in inner], "the model itself knows the spelling"
    for text in ("a</s>b", "<unk>", "<s><|turn|>", "<0x41>"):
        ids = unigram.encode(text)
        assert not unigram.special_ids & set(ids) and unigram.decode(ids) == text


def test_pickling_keeps_everything(gpt2) -> None:
    gpt2.decode([64])
    again = pickle.loads(pickle.dumps(gpt2.with_chat_template("t")))
    assert again.encode("a b<|endoftext|>") == gpt2.encode("a b<|endoftext|>") and again.chat_template == "t"


def test_ids_without_a_token(gpt2) -> None:
    assert gpt2.decode([64, 60000, 65]) == "a\ufffdb"
    with pytest.raises(UserError, match="no token with the id 60000: the ids go from 0 to 50256"):
        gpt2.token_bytes(60000)
    with pytest.raises(UserError, match="no token '<|endoftxt|>'. Did you mean '<|endoftext|>'"):
        gpt2.token_id("<|endoftxt|>")


def test_half_a_surrogate_pair_is_named(gpt2) -> None:
    with pytest.raises(UserError, match=r"U\+D83D, at place 2\) is half a surrogate pair"):
        gpt2.encode("ab\ud83d")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def model_json(vocabulary: dict[str, int]) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("weights.bin", "", "not a kind of tokenizer file that keifu knows"),
        ("tokenizer.json", "{", "is not JSON: Expecting"),
        ("tokenizer.json", b"\xff\xfe", "is not UTF-8 text: byte 0 is 0xff"),
        ("tokenizer.json", "{}", "has no model with a vocabulary"),
        ("tokenizer.json", model_json({"a": 0, "b": 0}), "gives the id 0 to the token 'b', as to 'a'"),
        ("vocab.json", '{"a": [0], "b": 1}', "gives the id \\[0\\] to the token 'a': ids are whole"),
        (
            "tokenizer.json",
            model_json({"a": 0, "b": 2}).replace("[]", '[], "x": 1'),
            "none with the id 1|has a model of type",
        ),
        ("tokenizer.json", '{"model": {"type": "Riddle", "vocab": {"a": 0}}}', "has a model of type 'Riddle' that"),
        ("vocab.json", "[]", "holds no vocabulary"),
        ("vocab.json", '{"a": 0}', "a vocabulary without merges: put merges.txt"),
        ("vocab.txt", "[UNK]\na\na\n", "has the token 'a' twice, in the lines 2 and 3"),
        ("vocab.txt", "a\nb\n", "has no \\[UNK\\]"),
        ("tokenizer.model", b"\x00\x01nonsense", "is not a SentencePiece model, or it is torn"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "looks like tiktoken's list of tokens"),
        ("x.gguf", b"GGUF", "not a GGUF file, or it is torn"),
    ],
)
def test_files_that_cannot_be_read_say_why(name, content, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path, name, content))


def test_merges_of_unknown_tokens_are_named(tmp_path) -> None:
    write(tmp_path, "merges.txt", "#version: 0.2\na b\n")
    with pytest.raises(UserError, match="merges 'a' and 'b', which vocab.json does not have"):
        load_tokenizer(write(tmp_path, "vocab.json", '{"a": 0, "b": 1}'))


def test_places_without_a_tokenizer_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer: none of tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at nowhere: give a directory, a file, or one of .*gpt2-bpe"):
        load_tokenizer("nowhere")


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["<|endoftext|>", "<|", "|>", "endoftext", "Ġ", "<s>", " ", "é", "ab"]), max_size=8)
)
def test_text_that_spells_no_special_token_is_encoded_the_same_without_the_twin(gpt2, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert gpt2._spelled([text]) == ("<|endoftext|>" in text)
    assert gpt2.encode(text) == gpt2._shield.backend.encode(text, add_special_tokens=False).ids


def test_where_text_is_rewritten_before_only_the_twin_can_tell(minilm) -> None:
    assert minilm.backend.normalizer is not None and minilm._spelled(["plain"])
