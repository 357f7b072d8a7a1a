"""The recipe for CLIP, on drawings of coloured shapes with names in two languages: it learns, resumes bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_captions
from PIL import Image

from keifu import checkpoints
from keifu.data.images.augmentation import Augmentation
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.clip import embed_texts
from keifu.models import bert
from keifu.models.clip import image as clip_image, text as clip_text
from keifu.recipes.images import clip as recipe
from keifu.recipes.running import run_jobs

pytestmark = pytest.mark.usefixtures("own_cache")


def small(drawings: Path, **changes: object) -> recipe.Recipe:
    resnet = clip_image.ResNetConfig(64, 4, (1, 1, 1, 1), 2, 16)
    made = toy_captions.small_clip(drawings, resnet=resnet, augmentation=Augmentation(shift=1))
    return replace(made, **changes)


def test_it_learns_and_what_is_saved_loads(drawings, tmp_path) -> None:
    summary = run_jobs(recipe.jobs(small(drawings)), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] and summary.figures["validation_captions_found"] == 1  # of one
    sample = next(iter(sorted((tmp_path / "samples").glob("*15*")))).read_text()
    assert "en captions by picture: R@1" in sample and "ja pictures by caption: R@1" in sample
    model, tokenizer = checkpoints.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    assert model.config.text.end_id == tokenizer.eos_id and model.config.pixels.crop == 24


def test_an_equal_caption_of_another_picture_counts_as_found(tmp_path) -> None:
    """With one caption for all pictures every search is right."""
    rows = []
    for number in range(40):
        Image.new("RGB", (24, 24), (6 * number, 100, 200 - 4 * number)).save(tmp_path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": "a square"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = recipe.prepare(small(tmp_path, languages=("und",)))
    assert len(task.parts.validation) > 1
    for line in recipe.describe(task, ["und"]).splitlines():
        assert "R@1 100.0%" in line


def test_a_resnet_learns_by_parts_of_its_batch(drawings, tmp_path) -> None:
    settings = replace(small(drawings).training, steps=3, micro_batch=3)
    run_jobs(recipe.jobs(small(drawings, tower="resnet", training=settings)), tmp_path)
    assert (tmp_path / "open_clip_config.json").exists()
    assert checkpoints.load_model(tmp_path).config.image.layers == (1, 1, 1, 1)


def test_it_begins_with_a_clip_that_is_there(drawings, tmp_path) -> None:
    settings = replace(small(drawings).training, steps=2, warmup=0)
    run_jobs(recipe.jobs(small(drawings, training=settings)), tmp_path)
    again = recipe.prepare(small(drawings, start_from=str(tmp_path), vocab_size=5000))
    assert again.model.config == checkpoints.load_model(tmp_path).config
    assert all(map(torch.equal, again.model.parameters(), checkpoints.load_model(tmp_path).parameters()))


def test_a_caption_that_is_too_long(drawings) -> None:
    short = clip_text.Config(600, 5, 24, 48, 1, 2, embedding_dim=16)
    with pytest.raises(UserError, match="tokens.*the model takes 5"):
        recipe.prepare(small(drawings, text=short))
    task = recipe.prepare(small(drawings, text=short, truncate=True))
    tokens = task.data.batch(0)["tokens"]
    assert tokens.shape[1] == 5 and (tokens == task.tokenizer.eos_id).any(1).all()


def test_a_resnet_that_sees_too_little(drawings) -> None:
    with pytest.raises(UserError, match="64 pixels at least, and image_size is 32"):
        recipe.prepare(small(drawings, tower="resnet", resnet=clip_image.ResNetConfig(32, 4, (1, 1, 1, 1), 2, 16)))


def test_an_unknown_language(drawings) -> None:
    with pytest.raises(UserError, match="'fr'.*Known: en, ja"):
        recipe.prepare(small(drawings, languages=("en", "fr")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an encoder of English texts with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer("wordpiece", ["a small red green blue disc bar large medium"], 60)
    sizes = bert.Config(tokenizer.vocab_size, 16, 12, 24, 1, 2, pooled=False, next_sentence=False)
    torch.manual_seed(1)
    checkpoints.save(bert.build(sizes), tokenizer, folder)
    return folder


def test_both_towers_learn_from_a_teacher(drawings, teacher, tmp_path) -> None:
    words = tmp_path / "words.tsv"
    words.write_text("赤\tred\n緑\tgreen\n円\tdisc\n棒\tbar\n", encoding="utf-8")
    made = small(drawings, text_teacher=str(teacher), dictionary=str(words))
    task = recipe.prepare(replace(made, training=replace(made.training, seed=3)))
    batch = task.data.batch(0)
    assert batch["points"].shape == (8, 12) and batch["words"].shape[:2] == (8, 2)
    assert torch.allclose(batch["word_points"].norm(dim=-1), torch.ones(8, 2))

    settings = replace(made.training, steps=60, evaluate_every=60, sample_every=60, save_every=60, learning_rate=1e-2)
    run_jobs(recipe.jobs(replace(made, training=settings)), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    model, tokenizer = checkpoints.load(tmp_path / "run")
    assert model.config.text.embedding_dim == 12
    japanese, english = ["赤", "緑", "円", "棒"], ["red", "green", "disc", "bar"]
    found = embed_texts(model, tokenizer, japanese) @ embed_texts(model, tokenizer, english).T
    assert found.argmax(1).tolist() == [0, 1, 2, 3]


def test_what_a_teacher_does_not_go_with(drawings, teacher) -> None:
    with pytest.raises(UserError, match="--text-teacher minilm"):
        recipe.prepare(small(drawings, dictionary="jmdict-ja-en"))
    with pytest.raises(UserError, match="--start-from has towers"):
        recipe.prepare(small(drawings, text_teacher=str(teacher), start_from="emoji-clip"))
    with pytest.raises(UserError, match="--evenly takes one picture"):
        recipe.prepare(small(drawings, evenly=True, hard_negatives=True))
