"""What the service's tests share: toy models on disk, and a server over them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
sys.path.insert(0, str(Path(__file__).parent))

from serving_toys import SIZE, Served, byte_tokenizer, running, sharp

import keifu
from keifu.data.tokenizers.chat_template import CHATML
from keifu.models import gpt2, llama
from keifu.serving.app import Access
from keifu.serving.worker import Limits


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toys as checkpoints: `chat`, a LLaMA with a chat template, and `base`, a GPT-2 without."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    chat = tokenizer.with_chat_template(CHATML).replace(stop_ids=[tokenizer.token_id("<|im_end|>")])
    keifu.save(sharp(llama.build(llama.Config(**SIZE, n_heads=4, head_dim=6, n_kv_heads=2))), chat, place / "chat")
    keifu.save(sharp(gpt2.build(gpt2.Config(**SIZE, n_heads=4))), tokenizer, place / "base")
    return place


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    """A server over all toys, in their folder's names."""
    with running([str(folder / name) for name in ("chat", "base")], Limits(), Access()) as found:
        yield found


@pytest.fixture(scope="session")
def chat(folder: Path) -> str:
    return str(folder / "chat")


@pytest.fixture(scope="session")
def base(folder: Path) -> str:
    return str(folder / "base")
