"""What is fuzzed: small files of every kind that keifu reads, and what reads each of them to its end."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from keifu import checkpoints
from keifu.checkpoints.gguf.write import save_gguf
from keifu.checkpoints.lora.peft import adapt, lora_config, save_adapter
from keifu.data.images.sources import items
from keifu.data.records import read_records
from keifu.data.text.mixture import read_mixture
from keifu.data.tokenizers import bpe
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.evaluation.text.tasks import read_task
from keifu.files import write_tensors
from keifu.generation.images.png_metadata import read_record
from keifu.models import bert, gemma3, gpt1, gpt2, gpt3, llama, mlp, palm, qwen3, seq2seq, transformer
from keifu.models.clip import clip
from keifu.models.clip import image as clip_image
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, ddpm, latent_diffusion
from keifu.training.run import checkpoint, metrics
from keifu.training.run.directory import read_recipe

TEXTS = ["one two three four five 12 = 3 <|im_start|> <|im_end|> Hi user assistant system\n"] * 9
PICTURES = ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm")
SIZES: dict[str, Any] = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "context_length": 24}


@dataclass(frozen=True)
class Target:
    """A folder of files, the names of those that are changed, and what reads them from there."""

    files: tuple[str, ...]
    make: Callable[[Path], None]
    read: Callable[[Path], Any]


def load(folder: Path) -> None:
    """A model and its tokenizer, which is used."""
    model, tokenizer = checkpoints.load(folder)
    if tokenizer is not None:
        ids = tokenizer.encode("one two three")
        tokenizer.decode(ids)
        if tokenizer.chat_template is not None:
            tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    if type(model).__name__ == "DecoderLM":
        model(torch.tensor([[1, 2, 3]]))


def load_model(*inputs: torch.Tensor) -> Callable[[Path], None]:
    """A model of another kind, which computes on these inputs."""

    def read(folder: Path) -> None:
        model, tokenizer = checkpoints.load(folder)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("a red heart"))
        with torch.no_grad():
            model(*inputs)

    return read


def saved(module: Any, kind: str = "bpe", shards: float = 5e9, **more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer = train_tokenizer(kind, TEXTS, 280, special_tokens=["<|im_start|>", "<|im_end|>"])
        tokenizer = tokenizer.with_chat_template(CHATML)
        model = module.build(module.Config(vocab_size=tokenizer.vocab_size, **SIZES | more))
        checkpoints.save(model, tokenizer, folder, max_shard_bytes=shards)

    return make


def clip_towers(folder: Path) -> None:
    tokenizer = bpe.learn(["a red heart", "a blue cat"] * 5, 520)
    text = clip_text.Config(tokenizer.vocab_size, 12, 12, 24, 1, 3, end_id=tokenizer.eos_id, embedding_dim=6)
    image = clip_image.Config(14, 7, 3, 12, 24, 1, 3, embedding_dim=6)
    checkpoints.save(clip.build(clip.Config(text, image)), tokenizer, folder)


def translator(folder: Path) -> None:
    tokenizer = train_tokenizer("bpe", TEXTS, 280, special_tokens=["<s>", "</s>", "<pad>"])
    config = transformer.Config(tokenizer.vocab_size, **SIZES, start_id=256, end_id=257, pad_id=258)
    checkpoints.save(transformer.build(config), tokenizer, folder)


def pixels(folder: Path) -> None:
    config = ddpm.Config(
        8, dim=8, multipliers=(1, 1), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4
    )
    checkpoints.save(ddpm.build(config), None, folder)


def latents(folder: Path) -> None:
    tokenizer = bpe.learn(["a red heart", "a blue cat"] * 5, 520).with_max_length(12)
    text = clip_text.Config(tokenizer.vocab_size, 12, 16, 24, 1, 2, end_id=tokenizer.eos_id, projected=False)
    unet = conditioned_unet.Config(4, 2, 2, (8,), 1, (0,), (0,), 2, context_dim=16, norm_groups=4)
    autoencoder = autoencoder_kl.Config(8, 3, 2, (4, 8), 1, 4, scale=1.0)
    checkpoints.save(latent_diffusion.build(latent_diffusion.Config(text, unet, autoencoder)), tokenizer, folder)


def network(folder: Path) -> None:
    checkpoints.save(mlp.build(mlp.Config(dim=3, hidden_dims=(4, 5), n_outputs=2)), None, folder)


def archive(folder: Path) -> None:
    import numpy as np

    from keifu.checkpoints.npz import EXCHANGED, NAMES

    torch.manual_seed(0)
    weights = seq2seq.build(seq2seq.SIZES["g2p-en"]).state_dict()
    np.savez(folder / "a.npz", **{theirs: weights[ours].numpy() for ours, theirs in NAMES.items()})
    assert set(EXCHANGED) < set(NAMES.values())


def gguf(folder: Path, dtype: str | None = "q8_0") -> None:
    saved(llama, dim=32)(folder / "hf")
    model, tokenizer = checkpoints.load(folder / "hf")
    save_gguf(model, tokenizer, folder / "model.gguf", dtype)


def adapter(folder: Path) -> None:
    saved(llama)(folder / "base")
    model, _ = checkpoints.load(folder / "base")
    save_adapter(adapt(model, ["all-linear"], lora_config(2, 4.0)), folder / "adapter", str(folder / "base"))
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 2}}))


def vocabularies(folder: Path) -> None:
    tokenizer = json.loads(train_tokenizer("bpe", TEXTS, 280).backend.to_str())["model"]
    (folder / "gpt2").mkdir()
    (folder / "gpt2/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (folder / "gpt2/merges.txt").write_text("#version\n" + "".join(f"{a} {b}\n" for a, b in tokenizer["merges"]))
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdeon"]))
    (folder / "clip").mkdir()
    merges = gzip.compress(b"#version\n" + b"a b\nc d\ne f")
    (folder / "clip/bpe_simple_vocab_16e6.txt.gz").write_bytes(merges)


def sentencepiece_model(folder: Path) -> None:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(TEXTS), model_writer=written, vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())


def encode(name: str = "") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokenizer = load_tokenizer(folder / name)
        tokenizer.decode(tokenizer.encode("one two ①"))

    return read


def tables(folder: Path) -> None:
    rows = [{"text": f"one {n}", "label": n % 2, "more": [1, {"a": None}]} for n in range(6)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.csv").write_text("text,label\n" + "".join(f'"one, {n}",{n}\n' for n in range(6)))
    (folder / "a.tsv").write_text("text\tlabel\n" + "".join(f"one {n}\t{n}\n" for n in range(6)))
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), folder / "a.parquet")


def read_tables(folder: Path) -> None:
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        list(read_records(folder / f"a.{suffix}"))


def descriptions(folder: Path) -> None:
    (folder / "mixture.yaml").write_text("sources:\n  prose: {data: a.txt, weight: 0.5}\n  b: {data: c, weight: 0.5}\n")
    (folder / "a.jsonl").write_text("".join(json.dumps({"q": f"{n}", "a": "b"}) + "\n" for n in range(9)))
    (folder / "task.yaml").write_text("items: a.jsonl\nprompt: 'Q {q}'\nanswer: a\n")


def pictures(folder: Path) -> None:
    image = Image.new("RGB", (6, 5), "red")
    (folder / "plain").mkdir()
    for suffix in PICTURES:
        image.save(folder / f"plain/a.{suffix}")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for suffix in ("png", "jpg"):
            archive.add(folder / f"plain/a.{suffix}", f"{suffix}.{suffix}")


def look(folder: Path) -> None:
    for item in [*items(folder / "plain", _refuse), *items(folder / "a.tar", _refuse)]:
        item.read(None)


def _refuse(problem: str) -> None:
    raise UserError(problem)


def drawn(folder: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    from keifu.generation.images.pixel_diffusion import ImageRequest
    from keifu.generation.images.png_metadata import ImageRecord

    chunks = PngInfo()
    for name, text in ImageRecord("model", "ab" * 32, ImageRequest(size=(8, 8), seed=1)).texts().items():
        chunks.add_text(name, text)
    Image.new("RGB", (8, 8), "blue").save(folder / "a.png", pnginfo=chunks)


def run(folder: Path) -> None:
    facts = {"described": {"settings": {"steps": 2}}, "resolved": {}, "divergence": {}, "seconds": 1.0}
    for step in (1, 2):
        checkpoint.save(folder, step, {"model.a": torch.ones(3)}, facts, keep=2)
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1)}) + "\n" for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "recipe.json").write_text(json.dumps({"recipe": {"name": "gpt", "options": {}}, "figures": {"a": 1.0}}))


def resume(folder: Path) -> None:
    read_recipe(folder)
    metrics.read(folder)
    checkpoint.latest(folder)


def weights(folder: Path) -> None:
    saved(gpt1, "characters")(folder)
    write_tensors({"a": torch.ones(2)}, folder / "other.safetensors")
    save_file({"a": torch.ones(2)}, folder / "again.safetensors")


HF = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
UNET = tuple(f"unet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors"))
PIPELINE = "model_index.json", "scheduler/scheduler_config.json", *UNET
LATENT = (
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
)
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
    "translator": Target(
        HF[:4], translator, load_model(torch.tensor([[5, 6]]), torch.tensor([[256, 7]]), torch.ones(1, 2).bool())
    ),
    "clip": Target((*HF[:4], "preprocessor_config.json"), clip_towers, load_model(
        torch.zeros(1, 3, 14, 14), torch.tensor([[5, 6]]))),
    "ddpm": Target(PIPELINE, pixels, load_model(torch.zeros(1, 3, 8, 8), torch.tensor([3]))),
    "latents": Target((*PIPELINE, *LATENT), latents, checkpoints.load),
    "network": Target(HF[:2], network, load_model(torch.zeros(1, 3))),
    "archive": Target(("a.npz",), archive, lambda folder: checkpoints.load(folder / "a.npz")),
    "shards": Target(("model.safetensors.index.json", "config.json"), saved(llama, shards=6000), load),
    "gguf": Target(("model.gguf",), gguf, lambda folder: load(folder / "model.gguf")),
    "adapter": Target(
        ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), adapter,
        lambda folder: load(folder / "adapter"),
    ),
    "sentencepiece": Target(("tokenizer.model",), sentencepiece_model, encode()),
    "merges": Target(("gpt2/vocab.json", "gpt2/merges.txt"), vocabularies, encode("gpt2")),
    "wordpiece": Target(("bert/vocab.txt",), vocabularies, encode("bert")),
    "clip merges": Target(("clip/bpe_simple_vocab_16e6.txt.gz",), vocabularies, encode("clip")),
    "tables": Target(("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"), tables, read_tables),
    "mixture": Target(("mixture.yaml",), descriptions, lambda folder: read_mixture(str(folder / "mixture.yaml"))),
    "task": Target(("task.yaml", "a.jsonl"), descriptions, lambda folder: read_task(folder / "task.yaml")),
    "pictures": Target(
        (*(f"plain/a.{suffix}" for suffix in PICTURES), "a.tar"), pictures, look
    ),
    "record": Target(("a.png",), drawn, lambda folder: read_record(folder / "a.png")),
    "run": Target((*STATES, "metrics.jsonl", "recipe.json"), run, resume),
}  # fmt: skip
