"""Toy models for the service's tests, and a server in a thread on a port of its own."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.serving.app import Access, application
from keifu.serving.metrics import Metrics
from keifu.serving.models import ServedModels, public_names
from keifu.serving.server import Address, server_of
from keifu.serving.worker import Limits

WAIT = 300.0  # seconds for an event that must come, however slow the machine is; a wait ends with its event
SIZE: dict[str, Any] = {"vocab_size": 261, "context_length": 512, "dim": 24, "hidden_dim": 48, "n_layers": 2}

for _part in ("connect", "read", "write", "pool"):  # of a request that names no timeout; five seconds are httpx's own
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, _part, WAIT)


def byte_tokenizer() -> Tokenizer:
    """Return bytes and the tokens of turns."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trained = train_tokenizer("bpe", ["ab"], 260, special_tokens=control[1:])
    return Tokenizer(trained.backend, {"bos_token": control[0], "eos_token": control[0]})


def sharp(model: nn.Module) -> nn.Module:
    """Return the model with weights so large that its output depends on its input."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else None
    return model.eval()


@dataclass
class Served:
    """A running server: its URL, its models, and clients for it."""

    url: str
    models: ServedModels

    @property
    def openai(self) -> Any:
        """OpenAI's own client, which never tries again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=WAIT)

    @property
    def openai_async(self) -> Any:
        """The same for asyncio."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=WAIT)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Send a request without changes."""
        return httpx.post(f"{self.url}{path}", json=body, **{"timeout": WAIT, **options})


@contextmanager
def running(
    names: Sequence[str],
    limits: Limits,
    access: Access,
    memory: int | None = None,
    weights: str | None = None,
    folder: Path | None = None,
) -> Iterator[Served]:
    """Yield a server in a thread."""
    models = ServedModels(public_names(names, {}), limits, Metrics(), memory, weights, folder)
    listening = Address(port=0).open()
    listening.listen()
    server = server_of(application(models, access))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", models)
    server.should_exit = True
    thread.join(WAIT)
    assert not thread.is_alive(), f"the server still works on {server.server_state.tasks}"


def until(holds: Callable[[], bool], seconds: float = WAIT) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)
