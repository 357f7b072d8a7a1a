"""What the tests of learning from answers of one's own begin with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama

CONFIG: dict[str, Any] = {"context_length": 48, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer("bpe", ["User: Assistant: one two three four five good bad"] * 9, 280)
    torch.manual_seed(0)
    checkpoints.save(llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **CONFIG)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return prompts, functions that reward answers to them, preferences of the same kind, and a text."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"prompt": f"{a} {b}", "letter": "o"} for a in ("one", "two", "four") for b in ("good", "bad", "five")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def letters(prompt, answer, example):\n"
        "    return answer.count(example['letter']) / 4\n"
        "def constant(prompt, answer, example): return 1\n"
        "def nan(prompt, answer, example): return float('nan')\n"
        "def text(prompt, answer, example): return 'good'\n"
        "def fails(prompt, answer, example): return example['absent']\n"
        "def huge(prompt, answer, example): return 10**400\n"
    )
    pairs = [{"prompt": row["prompt"], "chosen": "good one", "rejected": "bad"} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "text.txt").write_text("one two three four five good bad " * 40)
    return folder
