"""What the tests of recipes share; those that read captions have drawings and a small CLIP of them."""

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

import toy_captions  # noqa: E402
from toy_questions import coloured_shapes  # noqa: E402
from toy_recordings import tones  # noqa: E402

from keifu import checkpoints  # noqa: E402
from keifu.data.tokenizers.train import train_tokenizer  # noqa: E402
from keifu.evaluation.classification.metrics import Confusion  # noqa: E402
from keifu.inference.text.translation import TranslationParams  # noqa: E402
from keifu.models import bert, gpt1, llama  # noqa: E402
from keifu.recipes.assistant import sft  # noqa: E402
from keifu.recipes.images import clip  # noqa: E402
from keifu.recipes.language import pretraining  # noqa: E402
from keifu.recipes.running import run_jobs
from keifu.recipes.translation import translator_runs  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _short_samples() -> Iterator[None]:
    """Write short samples and draw no confusion matrix in a run, where each takes longer than the steps before it."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Confusion, "picture", lambda _: file.getvalue())
        patch.setattr(sft, "SAMPLE_TOKENS", 6)
        patch.setattr(pretraining, "SAMPLE_TOKENS", 6)
        patch.setattr(translator_runs, "TranslationParams", partial(TranslationParams, max_tokens=6))
        yield


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Set a cache in a folder of the tests for a file's tests, and yield the patch that lasts as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEIFU_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield patch


@pytest.fixture
def one_thread(_repeatable: None) -> None:
    """Use one thread: products this small wait for a second thread longer than they take."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return pictures of coloured shapes with captions in two languages."""
    return toy_captions.drawings(tmp_path_factory.mktemp("drawings"))


@pytest.fixture(scope="module")
def towers(own_cache: pytest.MonkeyPatch, drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a CLIP on these captions and return its run."""
    out = tmp_path_factory.mktemp("clip")
    settings = replace(toy_captions.small_clip(drawings).training, steps=4, warmup=0)
    run_jobs(clip.jobs(toy_captions.small_clip(drawings, training=settings)), out)
    return out


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return texts, tables and conversations."""
    folder, words = tmp_path_factory.mktemp("files"), ["one", "two", "three", "four", "five", "six"]
    text, mixture = folder / "text.txt", folder / "mixture.yaml"
    text.write_text("".join(f"The {words[n % 6]} sees the {words[n * 7 % 6]} in {n} houses.\n" for n in range(600)))
    mixture.write_text(f"sources:\n  prose: {{data: {text.name}, weight: 1.0}}\n")
    stories = [" ".join(f"The {words[(n + i) % 6]} is {words[n * i % 6]}." for i in range(6)) for n in range(60)]
    labels = [{"text": f"{words[n % 6]} {n}", "label": "ab"[n % 2]} for n in range(24)]
    rows = {f"{' '.join(words[n * k % 6] for k in range(1, 2 + n % 4))} {n}" for n in range(200)}
    pairs, table = folder / "pairs.tsv", folder / "rows.csv"
    table.write_text("x,y,z,kind\n" + "".join(f"{n},{-n},{n % 3},{n % 2}\n" for n in range(40)))
    pairs.write_text("".join(f"{row}\t{row[::-1]}\n" for row in sorted(rows)))
    return {
        "text": text, "mixture": mixture, "pairs": pairs, "rows": table,
        "stories": jsonl(folder / "stories.jsonl", [{"text": story} for story in stories]),
        "labels": jsonl(folder / "labels.jsonl", labels),
        "seen": coloured_shapes(folder / "seen", 8),
        "spoken": tones(folder / "spoken", 12),
        "chats": jsonl(folder / "chats.jsonl", [{"prompt": w, "response": f"good {w}"} for w in words]),
        "preferences": jsonl(
            folder / "preferences.jsonl", [{"prompt": w, "chosen": f"good {w}", "rejected": "bad"} for w in words]
        ),
        "prompts": jsonl(folder / "prompts.jsonl", [{"prompt": w} for w in words]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models that know nothing, for recipes that begin with one."""
    folder, sizes = tmp_path_factory.mktemp("models"), {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    texts = ["User: Assistant: one two three four five six good bad 0123456789 + = ?"] * 9
    kinds: dict[str, tuple[Any, Any, str]] = {
        "base": (llama, llama.Config(context_length=48, **sizes), "bpe"),
        "bert": (bert, bert.Config(context_length=16, pooled=False, next_sentence=False, **sizes), "wordpiece"),
        "gpt1": (gpt1, gpt1.Config(context_length=24, dropout=0.0, **sizes), "characters"),
    }
    for name, (module, config, kind) in kinds.items():
        torch.manual_seed(1)
        tokenizer = train_tokenizer(kind, texts, 280)
        checkpoints.save(module.build(replace(config, vocab_size=tokenizer.vocab_size)), tokenizer, folder / name)
    return {name: folder / name for name in kinds}
