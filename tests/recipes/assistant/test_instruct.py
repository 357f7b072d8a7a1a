"""The three steps of InstructGPT in one command: each begins with the one before; one report; a stop between two."""

import json
from pathlib import Path

import pytest
import torch

from keifu import checkpoints
from keifu.commands.train import parse
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.models import llama
from keifu.recipes.assistant import instruct

SIZES = {"context_length": 32, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
WORDS = ["one", "two", "three", "four"]


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an untrained model and the data of the three steps."""
    folder = tmp_path_factory.mktemp("instruct")
    tokenizer = train_tokenizer("bpe", ["User: Assistant: one two three four good bad"] * 9, 280)
    torch.manual_seed(0)
    checkpoints.save(llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **SIZES)), tokenizer, folder / "base")
    files = {
        "chats": [{"prompt": word, "response": f"good {word}"} for word in WORDS],
        "preferences": [{"prompt": word, "chosen": f"good {word}", "rejected": "bad"} for word in WORDS],
        "prompts": [{"prompt": word} for word in WORDS],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def go(folder: Path, out: Path, *more: str) -> Path:
    given = [f"--{step}.data={folder / name}.jsonl" for step, name in (("sft", "chats"), ("reward", "preferences"))]
    given += [f"--ppo.data={folder / 'prompts'}.jsonl", "--sft.steps=2", "--reward.steps=2", "--ppo.rollouts=2"]
    given += [
        "--ppo.prompts=4",
        "--ppo.minibatches=2",
        "--ppo.max-tokens=4",
        "--sft.lora.rank=2",
        "--ppo.held-out=0.25",
    ]
    given += ["--ppo.held-out=0.25", "--reward.held-out=0.25"]
    parse(["instruct", "--model", str(folder / "base"), *given, "--out", str(out), *more])()
    return out


def test_three_steps_and_one_report_gone_on_with_to_the_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = go(folder, tmp_path / "whole")
    page = (whole / "report.html").read_text()
    assert all(f"<h1>{each}" in page for each in (f"{folder / 'base'} becomes", f"{folder / 'base'} learns to answer"))
    assert "learns to score answers" in page and "validation reward" in page and "Calibration" in page
    jobs = instruct.second.jobs
    monkeypatch.setattr(instruct.second, "jobs", lambda _: (_ for _ in ()).throw(RuntimeError("the power is off")))
    with pytest.raises(RuntimeError):
        go(folder, tmp_path / "part")
    monkeypatch.setattr(instruct.second, "jobs", jobs)
    with pytest.raises(UserError, match="already holds a run, saved at step 2: go on with it"):
        go(folder, tmp_path / "part")
    with pytest.raises(UserError, match="keeps its options, and these differ: --sft.seed 0 → 4"):
        go(folder, tmp_path / "part", "--resume", "--sft.seed=4")
    capsys.readouterr()
    part = go(folder, tmp_path / "part", "--resume")
    assert "sft: done before" in capsys.readouterr().out
    for file in ("sft/adapter_model.safetensors", "reward/model.safetensors", "ppo/model.safetensors"):
        assert (whole / file).read_bytes() == (part / file).read_bytes()


def test_what_the_step_before_decides_cannot_be_chosen(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ppo.reward cannot be chosen here"):
        go(folder, tmp_path / "out", "--ppo.reward=last-number")
    with pytest.raises(UserError, match="There is no run in .*: it has no recipe.json"):
        go(folder, tmp_path / "out", "--resume")


@pytest.mark.parametrize("option", ["--reward.data=nowhere.jsonl", "--ppo.data=nowhere.jsonl", "--ppo.text.data=no"])
def test_what_a_later_step_cannot_read_is_said_before_the_first(folder: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises((UserError, FileNotFoundError), match="no"):
        go(folder, tmp_path / "out", option)
    assert not (tmp_path / "out").exists()
