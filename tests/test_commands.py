"""The verbs that a language model answers, on a model of a few thousand weights: text in from anywhere, text out."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from keifu import checkpoints, cli
from keifu.commands.chat import converse
from keifu.commands.language import decoded, text_from
from keifu.data.tokenizers import train_tokenizer
from keifu.errors import UserError
from keifu.models import llama, perceptron

LETTERS = "Once upon a time there was a small model."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model that writes single characters."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("characters", [LETTERS], 64)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=48, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.save(llama.build(config), tokenizer, folder)
    return str(folder)


def out(capsys: pytest.CaptureFixture, *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def test_the_argument_a_file_and_a_pipe_are_the_same_text(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-tokens", "8", "--seed", "5")
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon\n")
    texts = [out(capsys, "generate", model, "Once upon", *options)]
    texts += [out(capsys, "generate", model, "--file", str(file), *options)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon\n")))
    texts += [out(capsys, "generate", model, *options, "--stream")]
    assert len(set(texts)) == 1 and len(texts[0].rstrip("\n")) >= 1


def test_json_has_all_that_is_known(model: str, capsys: pytest.CaptureFixture) -> None:
    told = json.loads(out(capsys, "generate", model, "Once", "--json", "--max-tokens", "4", "--seed", "5"))
    assert told["finish_reason"] in ("length", "stop") and told["seed"] == 5 and told["prompt_tokens"] == 4
    assert len(told["tokens"]) == len(told["log_probabilities"]) <= 4
    assert all(p <= 0 for p in told["log_probabilities"])
    plain = out(capsys, "generate", model, "Once", "--max-tokens", "4", "--seed", "5")
    assert plain == told["text"] + "\n"


def test_a_full_context_is_said(model: str, capsys: pytest.CaptureFixture) -> None:
    cli.main(["generate", model, "Once", "--max-tokens", "None", "--seed", "1"])
    assert "The text fills the model's context of 48 tokens." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Once", "--file", "x.txt"], "There are two texts, the argument and x.txt"),
        (["--file", "nowhere.txt"], "There is no file 'nowhere.txt'."),
        (["Once " * 40], "48"),
        (["Once", "--temperature", "-1"], "temperature is -1"),
    ],
)
def test_what_cannot_be_is_one_sentence(model: str, words: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", model, *words])
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_model_that_writes_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoints.save(perceptron.build(perceptron.Config()), None, tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["generate", str(tmp_path), "Once"])
    assert "writes no text: a Perceptron cannot; choose a language model, such as smollm2." in capsys.readouterr().err


def test_bytes_that_are_no_text_are_named_by_their_line() -> None:
    assert decoded(b"\xef\xbb\xbfa\r\n", "a.txt") == "a"
    with pytest.raises(UserError, match=r"^a\.txt is not UTF-8 text: line 2 has the byte 0xff\.$"):
        decoded(b"a\n\xff", "a.txt")


def test_no_text_in_a_terminal_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="There is no text"):
        text_from(None, None, "keifu generate MODEL TEXT")


def test_convert_and_inspect_tell_what_they_do(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "copy"
    assert out(capsys, "convert", model, str(file), "--to", "hf") == f"Wrote {file}.\n"
    told = json.loads(out(capsys, "inspect", str(file), "--json"))
    assert told["settings"]["dim"] == 16 and told["rows"][0]["ours"] == "embedding.weight"
    assert "embedding.weight" in out(capsys, "inspect", model)


def test_models_shows_every_published_size(capsys: pytest.CaptureFixture) -> None:
    lines = [line.split("\t") for line in out(capsys, "models").splitlines()]
    assert {"gpt2", "llama-7b", "smollm2-135m"} <= {line[0] for line in lines}
    assert next(line for line in lines if line[0] == "gpt2")[1] == "124,439,808"


def test_data_lists_its_licences_and_checks_a_file(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert "CC BY-SA 4.0" in out(capsys, "data")
    text = tmp_path / "a.txt"
    text.write_text(LETTERS)
    report = json.loads(out(capsys, "data", "check", str(text), "--tokenizer", model, "--json"))
    assert report["characters"] == len(LETTERS) and report["n_problems"] == 0


class Echo:
    """A conversation that answers with what it heard, and fails where it hears so."""

    finish_reason = "stop"

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self) -> None:
        self.heard = []

    def reply(self, text: str, **sampling: object) -> Iterator[str]:
        self.heard.append(text)
        yield f"{len(self.heard)}:"
        if text == "interrupt":
            raise KeyboardInterrupt
        if text == "fail":
            raise UserError("It does not fit.")
        yield text


def test_a_conversation_obeys_its_commands(capsys: pytest.CaptureFixture) -> None:
    converse(Echo(), iter(["a", "", "b", "/reset", "c", "/exit", "d"]), {}, forgiving=False)
    assert capsys.readouterr().out.splitlines() == ["1:a", "2:b", "1:c"]


def test_in_a_terminal_an_answer_can_end_without_the_conversation(capsys: pytest.CaptureFixture) -> None:
    converse(Echo(), iter(["fail", "interrupt", "a"]), {}, forgiving=True)
    told = capsys.readouterr()
    assert told.out == "1:2:3:a\n" and told.err == "\nIt does not fit.\n\nStopped.\n"


@pytest.mark.parametrize(("line", "error"), [("fail", UserError), ("interrupt", KeyboardInterrupt)])
def test_in_a_pipe_an_error_ends_the_conversation(line: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        converse(Echo(), iter([line, "a"]), {}, forgiving=False)


def test_an_answer_that_is_cut_says_so(capsys: pytest.CaptureFixture) -> None:
    echo = Echo()
    echo.finish_reason = "length"
    converse(echo, iter(["a"]), {}, forgiving=True)
    assert capsys.readouterr().err == "(The answer was cut by --max-tokens.)\n"
