"""What the tests of learning from answers of one's own begin with."""

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
    """A model that knows nothing."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer("bpe", ["User: Assistant: one two three four five good bad"] * 9, 280)
    torch.manual_seed(0)
    checkpoints.save(llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **CONFIG)), tokenizer, folder)
    return folder
