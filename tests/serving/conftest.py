"""What the service's tests share: toy models on disk, and a server over them."""

import shutil
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
sys.path.insert(0, str(Path(__file__).parent))

from serving_toys import SIZE, WAIT, Served, byte_tokenizer, running, sharp

import keifu
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models import bert, gpt2, llama, transformer
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.diffusion import ddpm
from keifu.serving.app import Access
from keifu.serving.worker import Limits

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALL = ("chat", "base", "encoder", "masked", "translator", "ddpm", "clip")


@pytest.fixture(scope="session", autouse=True)
def _read_certificates_once() -> Iterator[None]:
    """Read the certificates of this machine once: each client does, for servers that need none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the toys as checkpoints and return their folder. `chat` is a LLaMA with a chat template and `base` a GPT-2
    without one. `encoder` and `masked` are BERTs, the latter with its head. `translator` is a Transformer, `ddpm`
    draws, and `clip` is a CLIP."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    chat = tokenizer.with_chat_template(CHATML).replace(stop_ids=[tokenizer.token_id("<|im_end|>")])
    keifu.save(sharp(llama.build(llama.Config(**SIZE, n_heads=4, head_dim=6, n_kv_heads=2))), chat, place / "chat")
    keifu.save(sharp(gpt2.build(gpt2.Config(**SIZE, n_heads=4))), tokenizer, place / "base")
    _save_others(place)
    return place


def _save_others(place: Path) -> None:
    """Save the toys that generate no text."""
    words = train_tokenizer("wordpiece", ["the cat sat on a mat while seven dogs ran far away"] * 2, 200)
    small: dict[str, Any] = {"dim": 24, "hidden_dim": 40, "n_layers": 1}
    encoder = bert.Config(
        vocab_size=words.vocab_size, context_length=16, n_heads=3, words=False, next_sentence=False, **small
    )
    keifu.save(bert.build(encoder), words, place / "encoder")
    keifu.save(sharp(bert.build(replace(encoder, words=True))), words, place / "masked")
    image = clip_image.Config(16, 8, 3, 20, 40, 2, 2, embedding_dim=12)
    text = clip_text.Config(words.vocab_size, 16, 24, 40, 2, 2, end_id=words.token_id("[SEP]"), embedding_dim=12)
    keifu.save(clip.build(clip.Config(text, image, clip.Pixels(16, 16))), words, place / "clip")
    letters = train_tokenizer("characters", ["abcdefghijklmnopqrstuvwxyz ."], 64, special_tokens=["<pad>", "</s>"])
    letters = Tokenizer(letters.backend, {"pad_token": "<pad>", "eos_token": "</s>"})
    ids = {"start_id": letters.pad_id, "end_id": letters.eos_id, "pad_id": letters.pad_id}
    translator = transformer.Config(letters.vocab_size, context_length=24, n_heads=2, **small, **ids)
    keifu.save(transformer.build(translator), letters, place / "translator")
    classes: dict[str, Any] = {"n_classes": 2, "null_class": True, "classes": ("cat", "dog")}
    drawing = ddpm.Config(
        size=8, channels=3, dim=8, multipliers=(1,), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4,
        dropout=0.0, noise=Noise(steps=20, beta_end=0.3), **classes,
    )  # fmt: skip
    keifu.save(sharp(ddpm.build(drawing)), None, place / "ddpm")


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    """Yield a server over all toys, with the names of their folders."""
    with running([str(folder / name) for name in ALL], Limits(), Access()) as found:
        yield found


@dataclass(frozen=True)
class PatientBrowser:
    """A browser whose pages wait for as long as a slow machine needs."""

    found: Any
    milliseconds: float

    def new_context(self, **options: Any) -> Any:
        context = self.found.new_context(**options)
        context.set_default_timeout(self.milliseconds)
        return context

    def new_page(self, **options: Any) -> Any:
        return self.new_context(**options).new_page()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield Chromium for the tests of one file. Its event loop runs in this thread: until it ends, `asyncio.run`
    refuses."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        milliseconds = 1000 * WAIT
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=milliseconds)
        yield PatientBrowser(found, milliseconds)
        found.close()


@pytest.fixture(scope="session")
def chat(folder: Path) -> str:
    return str(folder / "chat")


@pytest.fixture(scope="session")
def base(folder: Path) -> str:
    return str(folder / "base")
