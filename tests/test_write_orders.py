"""Every function that saves syncs what it names before it names it, and writes last what makes the rest valid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from write_orders import recorded

import keifu
from keifu import checkpoints
from keifu.checkpoints.lora import peft
from keifu.data.prepared_folders import build_once
from keifu.data.text.documents import TextFileFormat
from keifu.data.text.prepared import prepare_files
from keifu.data.tokenizers.train import train_tokenizer
from keifu.distributed.checkpoint import States
from keifu.distributed.layout import Layout
from keifu.distributed.pod import Pod
from keifu.files import replacing, write_atomic
from keifu.inference.text.paged.folder import ENDING, CacheFolder
from keifu.layers.lora import LoraSettings
from keifu.models import llama
from keifu.models.diffusion import ddpm
from keifu.training.run import checkpoint

TOKENIZER = train_tokenizer("bpe", ["one two three"], 264)
TENSORS = {"model.w": torch.rand(6, 4), "sums.total": torch.rand(3)}


def language_model() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 264, "context_length": 16, "n_heads": 2}
    return llama.build(llama.Config(**sizes, dim=8, hidden_dim=16, n_layers=1))


def hugging_face(folder: Path) -> None:
    keifu.save(language_model(), TOKENIZER, folder / "model", max_shard_bytes=9000)
    assert len([*(folder / "model").glob("model-*.safetensors")]) > 1


def diffusers(folder: Path) -> None:
    config = ddpm.Config(size=8, dim=8, multipliers=(1, 2), attention=(1,), norm_groups=4, middle_groups=4)
    keifu.save(ddpm.build(config), None, folder / "model")


def adapters(folder: Path) -> None:
    model = language_model()
    peft.adapt(model, ["all-linear"], LoraSettings(rank=2))
    peft.save_adapter(model, folder / "adapters", "base")


def split_state(folder: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        pod = Pod.__new__(Pod)
        pod.layouts, pod.coordinate = {"w": Layout.unsplit(TENSORS["model.w"], 1)}, (0, 0)
        states = States(True)
        states.save(pod, folder, 3, TENSORS, {}, lambda step: None)
        states.flush()
    finally:
        distributed.destroy_process_group()


def best(folder: Path) -> None:
    checkpoint.keep_best(folder, language_model(), checkpoint.Best(3, {"loss": 1.0}))


def prepared(folder: Path) -> None:
    (folder / "a.txt").write_text("one two three " * 30)
    (folder / "shards").mkdir()
    assert prepare_files(str(folder / "a.txt"), TOKENIZER, folder / "shards", TextFileFormat()) == 1


def twice(folder: Path) -> None:
    for content in ("first", "second"):
        write_atomic(folder / "file", content)


def once(folder: Path) -> None:
    def make(new: Path) -> None:
        (new / "part").mkdir(parents=True)
        (new / "part/file").write_text("content")

    build_once(folder / "made", (folder / "made").exists, make)


def keys_and_values(folder: Path) -> None:
    cache = CacheFolder(folder / "cache", 2**30)
    cache.write(f"{0:064x}{ENDING}", TENSORS, 0)
    cache.flush()


SAVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (twice, "file"),
    "a folder of the cache": (once, "made"),
    "Hugging Face": (hugging_face, "config.json"),
    "diffusers": (diffusers, "model_index.json"),
    "GGUF": (lambda folder: checkpoints.save_gguf(language_model(), TOKENIZER, folder / "x.gguf"), "x.gguf"),
    "another module": (lambda folder: keifu.save(nn.Linear(3, 2), TOKENIZER, folder / "model"), "config.json"),
    "adapters": (adapters, "adapter_config.json"),
    "tokenizer": (lambda folder: TOKENIZER.save(folder), "tokenizer_config.json"),
    "state": (lambda folder: checkpoint.save(folder, 3, TENSORS, {}, lambda step: None), "step-00000003.json"),
    "state of a split model": (split_state, "step-00000003.json"),
    "best weights": (best, "best.json"),
    "keys and values": (keys_and_values, f"{0:064x}{ENDING}"),
    "prepared text": (prepared, "00000.json"),
}


@pytest.mark.parametrize("name", SAVES)
def test_every_save_writes_in_an_order_that_survives_a_crash(name: str, tmp_path: Path) -> None:
    save, valid = SAVES[name]
    with recorded(tmp_path) as recorder:
        save(tmp_path)
    recorder.check(valid)


def test_the_recorder_sees_each_broken_rule(tmp_path: Path) -> None:
    with recorded(tmp_path) as recorder:
        (tmp_path / "new").write_text("content")
        (tmp_path / "new").rename(tmp_path / "file")
        with replacing(tmp_path / "last") as temporary:
            temporary.write_text("content")
    assert recorder.problems == ["file gets its name before new is synced"]
    with pytest.raises(AssertionError):
        recorder.check("file")
    recorder.problems.clear()
    with pytest.raises(AssertionError, match="before names in"):
        recorder.check("last")
