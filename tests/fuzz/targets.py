"""What is fuzzed: small files of every kind that keifu reads, and what reads each of them to its end."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import image_models as image
import tokenizer_files as words
import torch
import training_files as training
from image_models import LATENT, PIPELINE, load_model
from safetensors.torch import save_file
from tokenizer_files import TEXTS, encode

from keifu import checkpoints
from keifu.checkpoints.gguf.write import save_gguf
from keifu.checkpoints.lora.peft import adapt, save_adapter
from keifu.data.text.mixture import read_mixture
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.train import train_tokenizer
from keifu.files import write_tensors
from keifu.inference.images.png_metadata import read_record
from keifu.layers.lora import LoraSettings
from keifu.models import (
    bert,
    gemma3,
    gpt1,
    gpt2,
    gpt3,
    llama,
    mlp,
    palm,
    perceptron,
    qwen3,
    seq2seq,
    task_head,
    transformer,
)

SIZES: dict[str, Any] = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "context_length": 24}


@dataclass(frozen=True)
class Target:
    """A folder of files, the names of those that are changed, and what reads them from there."""

    files: tuple[str, ...]
    make: Callable[[Path], None]
    read: Callable[[Path], Any]


def load(folder: Path) -> None:
    """Load a model and its tokenizer, and use both."""
    model, tokenizer = checkpoints.load(folder)
    if tokenizer is not None:
        ids = tokenizer.encode("one two three")
        tokenizer.decode(ids)
        if tokenizer.chat_template is not None:
            tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    if type(model).__name__ == "DecoderLM":
        model(torch.tensor([[1, 2, 3]]))


def saved(module: Any, kind: str = "bpe", shards: float = 5e9, **more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer = train_tokenizer(kind, TEXTS, 280, special_tokens=["<|im_start|>", "<|im_end|>"])
        tokenizer = tokenizer.with_chat_template(CHATML)
        model = module.build(module.Config(vocab_size=tokenizer.vocab_size, **SIZES | more))
        checkpoints.save(model, tokenizer, folder, max_shard_bytes=shards)

    return make


def translator(module: Any, **sizes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = train_tokenizer("bpe", TEXTS, 280, special_tokens=["<s>", "</s>", "<pad>"])
        config = module.Config(tokenizer.vocab_size, **sizes, start_id=256, end_id=257, pad_id=258)
        checkpoints.save(module.build(config), tokenizer, folder)

    return make


def classifier(module: Any, form: str) -> Callable[[Path], None]:
    """Return a maker of a decoder with a head for a task."""

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer("bpe", TEXTS, 280, special_tokens=["<s>", "</s>", "<pad>"])
        decoder = module.Config(vocab_size=tokenizer.vocab_size, **SIZES)
        config = task_head.Config(decoder, form, () if form == "choice" else ("a", "b"), 256, 257, 258)
        checkpoints.save(task_head.builder(module.build)(config), tokenizer, folder)

    return make


def network(folder: Path) -> None:
    checkpoints.save(mlp.build(mlp.Config(dim=3, hidden_dims=(4, 5), n_outputs=2)), None, folder)


def first_neuron(folder: Path) -> None:
    checkpoints.save(perceptron.build(perceptron.Config(dim=3)), None, folder)


def archive(folder: Path) -> None:
    import numpy as np

    from keifu.checkpoints.npz import NAMES, SWAPPED

    torch.manual_seed(0)
    weights = seq2seq.build(seq2seq.SIZES["g2p-en"]).state_dict()
    np.savez(folder / "a.npz", **{theirs: weights[ours].numpy() for ours, theirs in NAMES.items()})
    assert set(SWAPPED) < set(NAMES.values())


def gguf(module: Any, dtype: str | None, **more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        saved(module, **{"dim": 32, **more})(folder / "hf")
        model, tokenizer = checkpoints.load(folder / "hf")
        save_gguf(model, tokenizer, folder / "model.gguf", dtype)

    return make


def adapter(**more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        saved(llama)(folder / "base")
        model, _ = checkpoints.load(folder / "base")
        save_adapter(
            adapt(model, ["all-linear"], LoraSettings(2, 4.0, **more)), folder / "adapter", str(folder / "base")
        )
        path = folder / "adapter/adapter_config.json"
        patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*v_proj": 4.0}}
        path.write_text(json.dumps(json.loads(path.read_text()) | patterns))

    return make


def weights(folder: Path) -> None:
    saved(gpt1, "characters")(folder)
    write_tensors({"a": torch.ones(2)}, folder / "other.safetensors")
    save_file({"a": torch.ones(2)}, folder / "again.safetensors")


HF = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CLIP_INPUTS = torch.zeros(1, 3, 14, 14), torch.tensor([[5, 6]])
TRANSLATED = torch.tensor([[5, 6]]), torch.tensor([[256, 7]]), torch.ones(1, 2).bool()
RECURRENT = {"context_length": 24, "dim": 8, "embedding_dim": 8, "attention_dim": 8, "maxout_dim": 4}
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
STATES = tuple(f"state/step-0000000{n}.{suffix}" for n in (1, 2) for suffix in ("json", "safetensors"))
TARGETS = {
    "llama": Target((*HF, "chat_template.jinja"), saved(llama), load),
    "gpt2": Target(HF, saved(gpt2), load),
    "gpt3": Target(HF, saved(gpt3), load),
    "palm": Target(HF, saved(palm, head_dim=8), load),
    "qwen3": Target(HF, saved(qwen3, n_kv_heads=1, head_dim=8), load),
    "gemma3": Target(HF, saved(gemma3, n_kv_heads=1, head_dim=8), load),
    "bert": Target(HF[:4], saved(bert, "wordpiece"), load),
    "gpt1": Target(HF[:2], weights, load),
    "translator": Target(HF[:4], translator(transformer, **SIZES), load_model(*TRANSLATED)),
    "recurrent": Target(HF[:4], translator(seq2seq, **RECURRENT), load_model(*TRANSLATED)),
    "classifier": Target(HF[:4], classifier(gpt2, "classification"), load),
    "choice": Target(HF[:4], classifier(palm, "choice"), load),
    "clip": Target((*HF[:4], "preprocessor_config.json"), image.clip_towers(), load_model(*CLIP_INPUTS)),
    "open_clip": Target(
        ("open_clip_config.json", "open_clip_model.safetensors"), image.clip_towers("open_clip"),
        load_model(*CLIP_INPUTS),
    ),
    "ddpm": Target(PIPELINE, image.pixels, load_model(torch.zeros(1, 3, 8, 8), torch.tensor([3]))),
    "latents": Target((*PIPELINE, *LATENT), image.latents, checkpoints.load),
    "unclip": Target(image.UNCLIP, image.unclip_parts, checkpoints.load),
    "dalle": Target(HF[:4], image.image_tokens, checkpoints.load),
    "autoencoder": Target(HF[:2], image.autoencoder, checkpoints.load),
    "picture loras": Target(
        ("peft.safetensors", "diffusers.safetensors", "kohya.safetensors"), image.loras, image.read_loras
    ),
    "network": Target(HF[:2], network, load_model(torch.zeros(1, 3))),
    "perceptron": Target(HF[:2], first_neuron, checkpoints.load),
    "archive": Target(("a.npz",), archive, lambda folder: checkpoints.load(folder / "a.npz")),
    "shards": Target(("model.safetensors.index.json", "config.json"), saved(llama, shards=6000), load),
    "gguf": Target(("model.gguf",), gguf(llama, "q8_0"), lambda folder: load(folder / "model.gguf")),
    "gguf f32": Target(
        ("model.gguf",), gguf(qwen3, "f32", n_kv_heads=1, head_dim=16), lambda folder: load(folder / "model.gguf")
    ),
    "adapter": Target(ADAPTER, adapter(), lambda folder: load(folder / "adapter")),
    "dora": Target(ADAPTER, adapter(dora=True, root=True), lambda folder: load(folder / "adapter")),
    "generation": Target(("generation_config.json",), saved(llama), words.generate),
    "sentencepiece": Target(("tokenizer.model",), words.sentencepiece_model, encode()),
    "marian": Target(
        ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json", "generation_config.json"), words.marian,
        encode(),
    ),
    "two tokenizers": Target(("tokenizer.json", "target_tokenizer.json", HF[3]), words.two_sided, encode()),
    "tokenizers": Target(
        (*(f"{kind}/tokenizer.json" for kind in ("unigram", "characters", "wordpiece", "clip", "bpe")),
         "bpe/tokenizer_config.json"),
        words.formats, words.read_formats,
    ),
    "merges": Target(("gpt2/vocab.json", "gpt2/merges.txt"), words.vocabularies, encode("gpt2")),
    "marked merges": Target(("gpt1/vocab.json", "gpt1/merges.txt"), words.vocabularies, encode("gpt1")),
    "wordpiece": Target(
        ("bert/vocab.txt", "bert/tokenizer_config.json", "bert/special_tokens_map.json"), words.vocabularies,
        encode("bert"),
    ),
    "clip merges": Target(("clip/bpe_simple_vocab_16e6.txt.gz",), words.vocabularies, encode("clip")),
    "tables": Target(tuple(f"a.{suffix}" for suffix in training.SUFFIXES), training.tables, training.read_tables),
    "learned": Target(
        ("chats.jsonl", "preferences.jsonl", "prompts.jsonl", "pairs.tsv", "pairs.jsonl", "numbers.csv",
         "choice.jsonl"),
        training.learned, training.read_learned,
    ),
    "mixture": Target(
        ("mixture.yaml",), training.descriptions, lambda folder: read_mixture(str(folder / "mixture.yaml"))
    ),
    "task": Target(("task.yaml", "task.json", "a.jsonl"), training.descriptions, training.read_tasks),
    "pictures": Target(
        (*(f"plain/a.{suffix}" for suffix in training.PICTURES), "a.tar", "mnist.gz"), training.pictures, training.look
    ),
    "captions": Target(
        ("json/metadata.jsonl", "csv/metadata.csv", "s.tar", "json/a.png"), training.captions, training.read_captions
    ),
    "animations": Target(
        tuple(f"a.{suffix}" for suffix in training.ANIMATIONS), training.animations, training.look_at_animations
    ),
    "prepared": Target(
        ("shards/00000.json", "shards/00001.bin", "shards/tokenizer/tokenizer.json"), training.prepared,
        training.read_prepared,
    ),
    "caches": Target(
        ("tokens/index.json", "tokens/training.bin", "tokens/files.json", "sentences/training.safetensors",
         "sentences/index.json", "pictures/index.json", "pictures/pixels.bin"),
        training.caches, training.read_caches,
    ),
    "record": Target(("a.png",), training.drawn, lambda folder: read_record(folder / "a.png")),
    "run": Target((*STATES, "metrics.jsonl", "recipe.json"), training.run, training.read_run),
    "stopped run": Target(
        ("run/recipe.json", "run/metrics.jsonl", *(f"run/{name}" for name in HF[:3]),
         *(f"run/{state}" for state in STATES)),
        training.stopped_run, training.resume,
    ),
}  # fmt: skip
if find_spec("diffusers"):  # which writes the pipeline that the file is made of
    TARGETS["single file"] = Target(
        ("sd.safetensors", "tokenizer/tokenizer.json"), image.single_file,
        lambda folder: checkpoints.load(folder / "sd.safetensors"),
    )  # fmt: skip
