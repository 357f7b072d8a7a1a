"""What is trained on, and what a run leaves: small files of every kind, and what reads each to its end."""

import gzip
import json
import os
import shutil
import struct
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image

from keifu import cli
from keifu.data.chat import conversations
from keifu.data.chat.preferences import read_preferences
from keifu.data.chat.prompts import read_prompts
from keifu.data.classification.input_formats import FORMS, read_examples
from keifu.data.classification.tables import read as read_labels, read_table
from keifu.data.images.catalogued import read_idx
from keifu.data.images.dataset import read_images
from keifu.data.images.io import read_image
from keifu.data.images.sources import items
from keifu.data.records import read_records
from keifu.data.text.documents import PLAIN, documents
from keifu.data.text.prepared import open_prepared, prepare_files
from keifu.data.text.sentence_shards import prepare_sentences
from keifu.data.text.token_shards import prepare
from keifu.data.tokenizers.train import train_tokenizer
from keifu.data.translation.pairs import read_pairs
from keifu.errors import UserError
from keifu.evaluation.text.tasks import read_task
from keifu.folders import cache
from keifu.training import loop
from keifu.training.run import checkpoint, metrics
from keifu.training.run.run_directory import read_recipe
from keifu.training.signals import Interrupted, StopRequest

ANIMATIONS = ("gif", "tiff", "webp", "png")
CACHES = {"tokens": "text-*", "sentences": "text-*", "pictures": "set-*"}
PICTURES = ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm")
SUFFIXES = ("jsonl", "json", "csv", "tsv", "parquet")


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tables(folder: Path) -> None:
    rows = [{"text": f"one {n}", "label": n % 2, "more": [1, {"a": None}]} for n in range(6)]
    lines(folder / "a.jsonl", *rows)
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.csv").write_text("text,label\n" + "".join(f'"one, {n}",{n}\n' for n in range(6)))
    (folder / "a.tsv").write_text("text\tlabel\n" + "".join(f"one {n}\t{n}\n" for n in range(6)))
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": [row["text"] for row in rows], "label": [str(row["label"]) for row in rows]})
    parquet.write_table(table, folder / "a.parquet")


def read_tables(folder: Path) -> None:
    """Read as records, as documents, and as texts with labels."""
    for suffix in SUFFIXES:
        path = folder / f"a.{suffix}"
        list(read_records(path))
        list(documents(path))
        read_labels(path)


def learned(folder: Path) -> None:
    """Read conversations, preferences and prompts in every form; pairs, numbers and forms of classification."""
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    lines(
        folder / "chats.jsonl", {"messages": talk}, {"conversations": turns}, {"prompt": "a", "response": "b"},
        {"instruction": "a", "input": "b", "output": "c", "system": "d"}, {"prompt": talk[:2], "completion": talk[2:]},
    )  # fmt: skip
    lines(
        folder / "preferences.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": talk, "rejected": [
            *talk[:2], {"role": "assistant", "content": "d"}]}, {"prompt": "a", "answers": ["b", "c"], "scores": [1, 2]}
    )  # fmt: skip
    lines(folder / "prompts.jsonl", {"prompt": "a", "answer": 3}, {"prompt": talk[:2]})
    (folder / "pairs.tsv").write_text("one\ttwo\nthree\tfour\n")
    lines(folder / "pairs.jsonl", {"source": "one", "target": "two"}, {"source": "three", "target": "four"})
    (folder / "numbers.csv").write_text("x,y,kind\n1,2,a\n3,4.5,b\n")
    lines(folder / "choice.jsonl", *({"context": "a", "answers": ["b", "c"], "label": n % 2} for n in range(3)))


def read_learned(folder: Path) -> None:
    list(conversations.read(str(folder / "chats.jsonl")))
    list(read_preferences(folder / "preferences.jsonl"))
    list(read_prompts(folder / "prompts.jsonl"))
    read_pairs(folder / "pairs.tsv")
    read_pairs(folder / "pairs.jsonl")
    read_table(folder / "numbers.csv")
    read_examples(folder / "choice.jsonl", FORMS["choice"])


def descriptions(folder: Path) -> None:
    """Write a mixture, and tasks of both kinds."""
    (folder / "mixture.yaml").write_text("sources:\n  prose: {data: a.txt, weight: 0.5}\n  b: {data: c, weight: 0.5}\n")
    lines(folder / "a.jsonl", *({"q": f"{n}", "a": "b", "choices": ["b", "c"], "gold": 0} for n in range(9)))
    (folder / "task.yaml").write_text("items: a.jsonl\nprompt: 'Q {q}'\nanswer: a\n")
    told = {"items": "a.jsonl", "prompt": "Q {q}", "choices": "choices", "answer": "gold"}
    (folder / "task.json").write_text(json.dumps(told))


def read_tasks(folder: Path) -> None:
    read_task(folder / "task.yaml")
    read_task(folder / "task.json")


def pictures(folder: Path) -> None:
    image = Image.new("RGB", (6, 5), "red")
    (folder / "plain").mkdir()
    for suffix in PICTURES:
        image.save(folder / f"plain/a.{suffix}")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for suffix in ("png", "jpg"):
            archive.add(folder / f"plain/a.{suffix}", f"{suffix}.{suffix}")
    (folder / "mnist.gz").write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 3, 3) + bytes(18)))


def animations(folder: Path) -> None:
    """Save pictures of three frames that differ, in every format that has frames."""
    frames = [Image.effect_noise((9, 7), 40 + n) for n in range(3)]
    for suffix in ANIMATIONS:
        frames[0].save(folder / f"a.{suffix}", save_all=True, append_images=frames[1:])


def look_at_animations(folder: Path) -> None:
    for suffix in ANIMATIONS:
        read_image(folder / f"a.{suffix}")


def prepared(folder: Path) -> None:
    """Write a folder of two shards that were made on other machines."""
    (folder / "texts").mkdir()
    for n in range(2):
        (folder / f"texts/{n}.txt").write_text(f"The cat sees {n} dogs in a house.\n" * 20)
    tokenizer = train_tokenizer("bpe", ["The cat sees 0 1 dogs in a house."], 280)
    prepare_files(folder / "texts", tokenizer, folder / "shards", PLAIN)


def read_prepared(folder: Path) -> None:
    open_prepared(folder / "shards", 0.1)


def caches(folder: Path) -> None:
    """Fill the cache with tokens, sentences and pictures; links without their hashes lead there."""
    (folder / "text.txt").write_text("".join(f"The cat sees {n} dogs. Then it goes home.\n" for n in range(300)))
    (folder / "set").mkdir()
    Image.new("RGB", (6, 6), "red").save(folder / "set/a.png")
    read_caches(folder)
    for name, pattern in CACHES.items():
        (made,) = (cache() / name).glob(pattern)
        (folder / name).symlink_to(made)


def read_caches(folder: Path) -> None:
    tokenizer = train_tokenizer("characters", ["The cat sees dogs. Then it goes home. 0123456789\n"], 40)
    shards = prepare(folder / "text.txt", tokenizer)
    tokenizer.decode(shards.tokens[:99].tolist())
    prepare_sentences(folder / "text.txt", tokenizer, str.split)
    read_images(folder / "set").take([0])


def look(folder: Path) -> None:
    for item in [*items(folder / "plain", refuse), *items(folder / "a.tar", refuse)]:
        item.read(None)
    read_idx(folder / "mnist.gz")


def refuse(problem: str) -> None:
    raise UserError(problem)


def captions(folder: Path) -> None:
    """Read pictures with captions: in a table of either kind, and in a shard."""
    image = Image.new("RGB", (6, 6), "red")
    for place in ("json", "csv", "shard"):
        (folder / place).mkdir()
        for name in ("a", "b"):
            image.save(folder / f"{place}/{name}.png")
    lines(folder / "json/metadata.jsonl", *({"file_name": f"{name}.png", "text": name, "label": "c"} for name in "ab"))
    (folder / "csv/metadata.csv").write_text("file_name,text_en,text_ja\na.png,a,い\nb.png,b,ろ\n")
    (folder / "shard/a.txt").write_text("a")
    (folder / "shard/b.json").write_text(json.dumps({"caption": "b", "text_ja": "ろ"}))
    (folder / "shard/a.json").write_text(json.dumps({"text_ja": "い"}))
    (folder / "shard/b.txt").write_text("b")
    with tarfile.open(folder / "s.tar", "w") as archive:
        for path in sorted((folder / "shard").iterdir()):
            archive.add(path, path.name)


def read_captions(folder: Path) -> None:
    for source in (folder / "json", folder / "csv", folder / "s.tar"):
        read_images(source, 6)


def drawn(folder: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    from keifu.inference.images.pixel_diffusion import ImageRequest
    from keifu.inference.images.png_metadata import ImageRecord

    chunks = PngInfo()
    for name, text in ImageRecord("model", "ab" * 32, ImageRequest(size=(8, 8), seed=1)).texts().items():
        chunks.add_text(name, text)
    Image.new("RGB", (8, 8), "blue").save(folder / "a.png", pnginfo=chunks)


def run(folder: Path) -> None:
    facts = {"described": {"settings": {"steps": 2}}, "resolved": {}, "divergence": {}, "seconds": 1.0}
    for step in (1, 2):
        checkpoint.save(folder, step, {"model.a": torch.ones(3)}, facts, lambda step: None)
    lines(folder / "metrics.jsonl", *({"step": step, "loss": 1 / (step + 1)} for step in range(3)))
    (folder / "recipe.json").write_text(json.dumps({"recipe": {"name": "gpt", "options": {}}, "figures": {"a": 1.0}}))


def read_run(folder: Path) -> None:
    read_recipe(folder)
    metrics.read(folder)
    checkpoint.latest(folder)


class Stopped(StopRequest):
    """Stops a run after some questions."""

    asked = 0

    @property
    def wanted(self) -> bool:  # pyright: ignore
        Stopped.asked += 1
        return Stopped.asked > 5

    @wanted.setter
    def wanted(self, value: bool) -> None:
        pass


def stopped_run(folder: Path) -> None:
    """Train a run that is stopped before its end."""
    (folder / "text.txt").write_text("".join(f"The cat {n % 7} sees {n % 3} dogs in {n} houses.\n" for n in range(300)))
    sizes = "--vocab-size 270 --depth 1 --context-length 16 --batch-size 3 --steps 6"
    words = ["train", "gpt", "--data", str(folder / "text.txt"), *sizes.split(), "--out", str(folder / "run")]
    Stopped.asked = 0
    as_chosen = loop.as_chosen
    often = patch.object(loop, "as_chosen", lambda settings: replace(as_chosen(settings), save_every=1))
    with patch.object(loop, "StopRequest", Stopped), often, suppress(Interrupted):
        cli.parse(words)()


def _copy(original: str, copy: str) -> None:
    shutil.copy2(original, copy) if Path(original).is_file() else os.mkfifo(copy)


def resume(folder: Path) -> None:
    """Resume a copy of the run until its end."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "run", copy, symlinks=True, copy_function=_copy)
    cli.parse(["train", "--resume", str(copy)])()


RUN = "recipe.json", "metrics.jsonl", "tokenizer.json", "config.json"
