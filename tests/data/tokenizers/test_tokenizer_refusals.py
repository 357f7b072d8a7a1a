"""Damaged files of a tokenizer: ids and templates of the wrong type are refused with the file and the value."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from keifu.data.tokenizers.chat_template import compile_template
from keifu.data.tokenizers.gguf import gguf_tokenizer, to_gguf_fields
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.sentencepiece import SentencePiece, SentencePieceSettings, backend_from_pieces
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", ["the cat sat on the mat"], 270)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": "2"}, "gives '2' for eos_token_id, which must be ids of tokens"),
        ("generation_config.json", {"eos_token_id": [0, -1]}, "which must be ids of tokens"),
        ("generation_config.json", {"eos_token_id": 1.0}, "gives 1.0 for eos_token_id"),
        ("tokenizer_config.json", {"bos_token": 3}, "gives 3 for bos_token, which must be a token's text"),
        ("tokenizer_config.json", {"chat_template": 7}, "has a chat_template that is no text"),
        ("vocab.json", {"a": 0, "b": 0}, "gives the id 0 to the token 'b', as to 'a': ids are whole numbers from 0 on"),
        ("vocab.json", {"a": "0"}, "gives the id '0' to the token 'a': ids are whole numbers from 0 on, and unique"),
    ],
)
def test_files_of_the_wrong_type_are_refused(
    tokenizer: Tokenizer, file: str, content: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    if file == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 3}, r"tokenizer.json has the vocabulary 3, which must map tokens to ids\.$"),
        ({"vocab": [3]}, r"tokenizer.json has the vocabulary \[3\]"),
        ({"merges": [5]}, r"has the merge 5, which must be two tokens\.$"),
        ({"merges": [["t", "zz"]]}, r"merges 't' and 'zz', which its vocabulary does not have\.$"),
        ({"continuing_subword_prefix": "\0\0\0"}, r"merges 't' and 'h', which its vocabulary does not have\.$"),
    ],
)
def test_damage_within_a_tokenizer_json_is_named(
    tokenizer: Tokenizer, changes: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["model"] |= {"merges": [["t", "h"]], **changes}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("version", "9.0", "has the version '9.0'"),
        ("normalizer", "x", "has the normalizer 'x'"),
        (
            "pre_tokenizer",
            {"type": "Foo"},
            "has a pre_tokenizer of type 'Foo' that cannot be read",
        ),
        ("decoder", [1], r"has the decoder \[1\]"),
        ("added_tokens", [5], r"has the added_tokens \[5\]"),
        ("dropout", 7.0, "has a model whose dropout is 7.0"),
        ("merges", 5, "has a model whose merges is 5"),
        ("unk_token", 5, "has a model whose unk_token is 5"),
    ],
)
def test_a_part_that_the_library_does_not_read_is_named(
    tokenizer: Tokenizer, part: str, value: Any, message: str, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    if part in described:
        described[part] = value
    else:
        described["model"][part] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(tmp_path)
    sentence = str(raised.value)
    assert sentence.endswith(f": the file is damaged, or newer than tokenizers {tokenizers.__version__}.")
    assert not re.search("untagged|variant|line 1|expected|u32", sentence)  # words of the tokenizers library


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokenizer.ggml.merges", ["t zz"], "The GGUF merges 't' and 'zz', which its vocabulary does not have"),
        ("tokenizer.chat_template", 5, "The GGUF's tokenizer.chat_template is 5, and it must be a text"),
        ("tokenizer.ggml.token_type", [1, 1], "tokens but 2 entries in tokenizer.ggml.token_type"),
        ("tokenizer.ggml.eos_token_id", 10**6, "eos token has the id 1000000, but there are only"),
    ],
)
def test_fields_of_a_gguf_are_checked(tokenizer: Tokenizer, field: str, value: Any, message: str) -> None:
    fields = to_gguf_fields(tokenizer)
    assert gguf_tokenizer(fields).encode("the cat") == tokenizer.encode("the cat")
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(fields | {field: value})


def test_an_unknown_piece_outside_the_vocabulary_is_refused() -> None:
    pieces = [SentencePiece("a", 0.0), SentencePiece("b", 0.0)]
    assert backend_from_pieces(pieces, SentencePieceSettings(unknown_id=1))
    with pytest.raises(UserError, match="The unknown piece has the id 2, but there are 2 pieces"):
        backend_from_pieces(pieces, SentencePieceSettings(unknown_id=2))


def test_an_id_without_a_token_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.encode("c")[0]) == b"c"
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"There is no token with the id {token_id}"):
            tokenizer.token_bytes(token_id)


def test_a_template_longer_than_any_in_use_is_refused() -> None:
    with pytest.raises(UserError, match="The chat template has 1,000,001 characters, and at most 1,000,000 are read"):
        compile_template("x" * 1_000_001)
