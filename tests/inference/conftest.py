"""What the generation tests share: models with sharp random weights, a byte tokenizer, a model that says a script."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.layers.attention.attention import Scoring
from keifu.layers.attention.kv_cache import KVState

sys.path.insert(0, str(Path(__file__).parent))

from generation_toys import OF_ONE_CACHE, TOYS  # noqa: E402 (the path must be set before)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: threads that wait for each other cost tiny models more than they give, and very much on a busy
    machine."""
    torch.set_num_threads(1)


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] if n in OF_ONE_CACHE else []) for n in TOYS])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Return each toy in turn, with weights large enough that the next token depends on those before it."""
    torch.manual_seed(3)
    toy = TOYS[request.param]()
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.mul_(12) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return toy.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return bytes and little more: 256 of them, four control tokens, and no template."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trained = train_tokenizer("bpe", ["ab"], 260, special_tokens=control[1:])
    return Tokenizer(trained.backend, {"bos_token": control[0], "eos_token": control[0]})


class Script(nn.Module):
    """Says these tokens, whatever it is asked; the prompt is `asked` tokens long."""

    def __init__(self, tokens: list[int], asked: int = 1, vocab_size: int = 300, context_length: int = 1000):
        super().__init__()
        self.tokens, self.asked = torch.tensor(tokens), asked
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=context_length)

    def hidden(self, tokens: Tensor, state: Any, padding: Tensor | None = None) -> Tensor:
        places = state.positions(tokens.shape[1], padding)
        new = [tokens.new_zeros(len(tokens), 1, tokens.shape[1], 1).float()] * 3
        state.layer(0).attend(*new, None, Scoring())
        state.advance()
        return (places - self.asked + 1).expand(tokens.shape)[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        places = hidden[..., 0].long().clamp(0, len(self.tokens) - 1)
        return 50.0 * F.one_hot(self.tokens[places], self.config.vocab_size)

    def new_state(self, rows: int, capacity: int) -> KVState:
        return KVState([(1, 1)], rows, capacity, torch.zeros(1))


@pytest.fixture
def script() -> type[Script]:
    return Script
