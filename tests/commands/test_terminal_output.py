"""Control characters of models and data do not reach a terminal; files and pipes get the text unchanged."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from keifu import checkpoints, cli
from keifu.commands.shared import tables
from keifu.data.progress import ProgressBar
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama

CLEAR = "\x1b[2J\x9b2J\x07\u202e"
RAW = re.compile("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]|\x1b(?!\\[[0-9;]*m)")  # rich may set colours


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a model that writes nothing but the character ESC."""
    turns = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(
        train_tokenizer("bpe", ["ab"], 260, special_tokens=turns).backend, {"eos_token": turns[1]}, chat_template=CHATML
    )
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=200, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    written = llama.build(config)
    (escape,) = tokenizer.encode("\x1b")
    with torch.no_grad():
        for name, weight in written.named_parameters():
            weight.fill_(1 if "norm" in name or "embed" in name else 0)
        written.head.weight[escape] = 1
    folder = tmp_path_factory.mktemp("escape")
    checkpoints.save(written, tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize(
    "words", [["generate", "MODEL", "a"], ["generate", "MODEL", "a", "--stream"], ["chat", "MODEL", "a"]]
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_models_escapes(
    model: str, words: list[str], terminal: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    cli.main([model if word == "MODEL" else word for word in words] + ["--max-tokens", "3", "--temperature", "0"])
    out = capsys.readouterr().out
    assert out.endswith("\\x1b" * 3 + "\n" if terminal else "\x1b" * 3 + "\n")


def test_escapes_of_data(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": role, "content": f"{role}\tone\n{CLEAR}"} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "a.txt").rename(tmp_path / "a\x1b[2J.txt")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["data", "show", str(tmp_path / "chats.jsonl"), "--tokenizer", model])
    out = capsys.readouterr().out
    assert "\\x1b[2J\\x9b2J\\x07\\u202e" in out and not RAW.search(out)
    cli.main(["data", "check", str(tmp_path / "a\x1b[2J.txt"), "--tokenizer", model])
    printed = capsys.readouterr()
    assert "a\\x1b[2J.txt" in printed.out + printed.err and not RAW.search(printed.out + printed.err)
    tables.show(("label", "text"), [("a", CLEAR)])
    assert not RAW.search(capsys.readouterr().out)


def test_escapes_in_a_runs_notes(capsys: pytest.CaptureFixture) -> None:
    with ProgressBar("Training", 3) as bar:
        bar.note(f"sample: {CLEAR}")
    assert "sample: \\x1b[2J\\x9b2J" in capsys.readouterr().err
