"""`keifu data show` of conversations: what is learned of them is marked."""

import json

import pytest

from keifu import checkpoints
from keifu.cli import main
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return conversations, and a model without a chat template."""
    folder = tmp_path_factory.mktemp("turns")
    talks = folder / "talks.jsonl"
    talks.write_text("".join(json.dumps({"prompt": f"Hi {n}?", "response": f"Yes {n}."}) + "\n" for n in range(3)))
    tokenizer = train_tokenizer("bpe", ["User: Assistant: Hi Yes 0 1 2 ? ."] * 9, 270)
    sizes = {"context_length": 16, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2}
    checkpoints.save(llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **sizes)), tokenizer, folder / "model")
    return str(talks), str(folder / "model")


def test_what_is_learned_stands_between_marks(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "show", files[0], "--tokenizer", files[1], "--count", "2"])
    said = capsys.readouterr().out
    assert "User:\nHi 1?\nAssistant:\n⟦Yes 1.<|endoftext|>⟧" in said and "Yes 2" not in said
    assert "3 conversations, " in said


def test_as_json(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "show", files[0], "--tokenizer", files[1], "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and all(len(row["tokens"]) == len(row["learned"]) and any(row["learned"]) for row in rows)
