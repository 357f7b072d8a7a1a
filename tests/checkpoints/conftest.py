"""What the checkpoint tests share: published models made here with random weights, a small tokenizer, SmolLM2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keifu.data.tokenizers import Tokenizer, train_tokenizer
from keifu.errors import UserError


@pytest.fixture(scope="session")
def published() -> Callable[[Any], Any]:
    """Makes transformers' model of a config: float32, every weight random, biases and norms too."""
    import transformers

    def make(config: Any) -> Any:
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of at most 300 tokens."""
    texts = ["The capital of France is Paris, and that of Japan is 東京.\n" * 3, "def f(x):\n    return x + 1\n" * 3]
    return train_tokenizer("bpe", texts, 300)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's GGUF from the catalogue; the test is left out where there is no network for it."""
    from keifu.data.catalogue import fetch

    try:
        return fetch("smollm2")
    except (UserError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Reads all tensors of a directory's safetensors files."""

    def read(directory: Path) -> dict[str, torch.Tensor]:
        return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}

    return read
