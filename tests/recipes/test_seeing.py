"""keifu train see: a model learns to answer about pictures, and its evaluation prints what a blind one reaches."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_questions import coloured_shapes

from keifu import checkpoints
from keifu.data.images.preprocessing import Preprocessing
from keifu.data.images.questions import CLOSED, Question, QuestionBatches, Questions, read_questions
from keifu.errors import UserError
from keifu.evaluation.images import questions as evaluation
from keifu.evaluation.registry import EvalRequest
from keifu.models import gpt2, llama
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.hf.image_processor import Pixels, Tiles
from keifu.models.multimodal import llava, siglip, smolvlm
from keifu.recipes.assistant import see
from keifu.recipes.running import run_jobs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOWER = clip_image.Config(12, 4, 3, 24, 48, 1, 2, activation="gelu", projected=False)


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_it_learns_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the benchmark's own steps: the picture decides both answers, so that a blind model is right by chance."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    seeing = import_module("seeing")
    folder = coloured_shapes(tmp_path / "shapes", 12)
    monkeypatch.setattr(seeing, "PAIR", ())
    lines = (seeing.captioned(tmp_path, str(folder)) / "metadata.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == ["red round", "blue round", "red square", "blue square"] * 2
    run = seeing.train(tmp_path, 60, 0, data=str(folder), image=TOWER, batch_size=16, held_out=0.0, learning_rate=3e-3)
    figures = seeing.measure(run, None, str(folder))
    assert figures["accuracy"] == 1.0 and figures["questions"] == 8
    assert figures["commonest answer to each question"] == 0.5
    assert figures["without the picture"] <= 0.5
    model, tokenizer = checkpoints.load(run)
    assert isinstance(model, llava.Llava)
    found = evaluation.evaluate(model, tokenizer, EvalRequest(on=str(folder), limit=3, held_out={"left_out": ["red"]}))
    assert found.items is not None and len(found.items.rows) == 3
    tested = [tuple(row) for row in read_questions(str(folder)).tested]
    size = len(Question._fields)
    assert [tuple(row)[:size] for row in found.items.rows] == [tested[place] for place in (0, 2, 5)]  # of 8
    assert found.figures["accuracy on pictures of red, left out of training"] == 1.0
    request = EvalRequest(on=str(folder), limit=1, held_out={"left_out": ["blue", "square"]})
    assert not [name for name in evaluation.evaluate(model, tokenizer, request).figures if "left out" in name]
    sys.modules.pop("seeing")


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_adapters_are_merged_into_what_is_saved(tmp_path: Path) -> None:
    folder = coloured_shapes(tmp_path / "shapes", 8)
    base = decoder(tmp_path, llama)
    lora = see.finetuning.Lora(rank=2)
    run_jobs(
        see.jobs(see.Recipe(base, data=str(folder), image=TOWER, steps=2, batch_size=4, lora=lora)), tmp_path / "run"
    )
    model: Any = checkpoints.load_model(tmp_path / "run")
    assert type(model).__name__ == "Llava"
    before: Any = checkpoints.load_model(base)
    assert torch.equal(model.embedding.weight[: before.config.vocab_size], before.embedding.weight)
    assert not torch.equal(model.blocks[0].attention.qkv.weight, before.blocks[0].attention.qkv.weight)


def decoder(folder: Path, module: Any) -> str:
    from keifu.data.tokenizers.train import train_tokenizer

    tokenizer = train_tokenizer("bpe", ["User: what color? Assistant: red"], 270)
    config = module.Config(
        vocab_size=tokenizer.vocab_size, context_length=96, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    checkpoints.save(module.build(config), tokenizer, folder / "base")
    return str(folder / "base")


@pytest.mark.usefixtures("own_cache")
def test_another_decoder_is_refused(tmp_path: Path) -> None:
    folder = coloured_shapes(tmp_path / "shapes", 4)
    with pytest.raises(UserError, match="is no model of LLaMA's type"):
        see.prepare(see.Recipe(decoder(tmp_path, gpt2), data=str(folder), image=TOWER))


@pytest.mark.usefixtures("own_cache")
def test_questions_to_test_on_alone_are_refused(tmp_path: Path) -> None:
    folder = coloured_shapes(tmp_path / "shapes", 4)
    rows = [json.loads(line) | {"part": "test"} for line in (folder / "questions.jsonl").read_text().splitlines()]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="has no question to learn from"):
        see.prepare(see.Recipe("none", data=str(folder)))


@pytest.mark.usefixtures("own_cache")
def test_the_tower_of_a_clip_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = clip_image.Config(12, 4, 3, 24, 48, 1, 2, embedding_dim=8)
    tower: Any = clip.build(clip.Config(clip_text.Config(40, 8, 16, 24, 1, 2, embedding_dim=8), image, Pixels(12, 12)))
    checkpoints.save(tower, None, tmp_path / "clip")
    base, folder = decoder(tmp_path, llama), str(coloured_shapes(tmp_path / "shapes", 4))
    model: Any = see.prepare(see.Recipe(base, data=folder, tower=str(tmp_path / "clip"))).model
    for name, weight in model.tower.state_dict().items():
        assert torch.equal(weight, tower.image.state_dict()[name])
    assert model.config.pixels == tower.config.pixels
    new: Any = see.prepare(see.Recipe(base, data=folder, image=TOWER)).model
    assert new.config.pixels.mean != tower.config.pixels.mean
    with pytest.raises(UserError, match="has no vision transformer of CLIP or LLaVA"):
        see.prepare(see.Recipe(base, data=folder, tower=base))
    checkpoints.save(model, checkpoints.load(base)[1], tmp_path / "seer")
    config = replace(model.config, feature_layers=(0, 1), full=False)
    seen: Any = llava.attach(config, llama.build(config.text))
    checkpoints.save(seen, checkpoints.load(base)[1], tmp_path / "eyes")
    again: Any = see.prepare(see.Recipe(base, data=folder, tower=str(tmp_path / "eyes"))).model
    assert (again.config.feature_layers, again.config.full) == ((0, 1), False)
    for name, weight in again.tower.state_dict().items():
        assert torch.equal(weight, seen.tower.state_dict()[name])
    kept = see.Recipe(base, data=folder, tower=str(tmp_path / "eyes"), tower_rate=0.0, steps=2, batch_size=4)
    run_jobs(see.jobs(kept), tmp_path / "kept")
    stored: Any = checkpoints.load_model(str(tmp_path / "kept"))
    for name, weight in stored.tower.state_dict().items():
        assert torch.equal(weight, seen.tower.state_dict()[name])
    assert not torch.equal(stored.embedding.weight, again.embedding.weight)
    with pytest.raises(UserError, match="--tower-rate 0 keeps a new tower random"):
        see.prepare(see.Recipe(base, data=folder, image=TOWER, tower_rate=0.0))
    with pytest.raises(UserError, match="sees already: leave out --tower"):
        see.prepare(see.Recipe(str(tmp_path / "seer"), data=folder, tower=str(tmp_path / "clip")))
    with pytest.raises(UserError, match=r"sees already, by a tower of its own shape: leave out --image\.\*"):
        see.prepare(see.Recipe(str(tmp_path / "seer"), data=folder, image=TOWER))
    with pytest.raises(UserError, match=r"--image\.\* describes a new tower, but .*clip has its own"):
        see.prepare(see.Recipe(base, data=folder, image=TOWER, tower=str(tmp_path / "clip")))


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_a_run_of_an_older_version_is_refused_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    base, folder, out = decoder(tmp_path, llama), str(coloured_shapes(tmp_path / "shapes", 4)), tmp_path / "run"
    recipe = see.Recipe(base, data=folder, image=TOWER, steps=2, batch_size=4)
    facts = see.RunFacts

    def without_tower(*, options: dict[str, Any], **others: Any) -> Any:
        return facts(options={name: options[name] for name in options if name != "tower"}, **others)

    with monkeypatch.context() as older:
        older.setattr(see, "RunFacts", without_tower)
        run_jobs(see.jobs(recipe), out)
    with pytest.raises(UserError, match="started without tower, or by an older version that lacks this setting"):
        run_jobs(see.jobs(recipe), out, True)
    with pytest.raises(UserError, match=r"these differ: .*tower \(unset\)"):
        run_jobs(
            see.jobs(see.Recipe(base, data=folder, image=TOWER, steps=2, batch_size=4, learning_rate=1.0)), out, True
        )


def test_questions_about_a_picture_come_together_and_names_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["yes", "red", "no", "circle", "yes", "no", "yes"]
    rows = [([1, 2], [False, True], f"{picture}.png") for picture in range(9) for _ in answers]
    named = [answer not in CLOSED for _ in range(9) for answer in answers]
    found = Questions([], [], lambda _: b"")
    monkeypatch.setattr(Questions, "picture", lambda *_: Image.new("RGB", (2, 2)))
    data = QuestionBatches([rows, []], found, Preprocessing(**vars(Pixels(2, 2))), 7, 3, 0, named)
    first, second = (np.concatenate([data.items(9 * epoch + step) for step in range(9)]) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [*range(63)] and [*first] != [*second]
    assert [named[item] for item in first] == [True] * 18 + [False] * 45
    assert not all(named[item] for item in second[:18])
    for order, together in ((first[:18], 2), (first[18:], 4), (second, 4)):
        changes = sum(a // 7 != b // 7 for a, b in pairwise(order))
        assert changes < len(order) / (together / 2)


@pytest.mark.usefixtures("own_cache")
def test_a_model_that_cuts_tiles_is_refused(tmp_path: Path) -> None:
    _, tokenizer = checkpoints.load(decoder(tmp_path, llama))
    text = llama.Config(tokenizer.vocab_size, 96, 16, 32, 1, 2)
    config = smolvlm.Config(text, siglip.Config(8, 2, 3, 12, 24, 2, 2), Tiles(16, 8), 9, 2)
    checkpoints.save(smolvlm.build(config), tokenizer, tmp_path / "tiles")
    with pytest.raises(UserError, match="cuts pictures into tiles"):
        see.prepare(see.Recipe(str(tmp_path / "tiles"), data=str(coloured_shapes(tmp_path / "shapes", 4))))


def test_what_may_show_both_words_is_left_out() -> None:
    rows = [
        Question("a", "what color?", "teal"), Question("a", "what shape?", "triangle"),
        Question("b", "what color?", "teal"), Question("b", "what shape?", "circle"),
        Question("c", "what is the red shape?", "triangle"), Question("c", "what color?", "red"),
        Question("d", "what color?", "teal"), Question("d", "is it round?", "no"),  # may be a triangle
        Question("e", "is it teal?", "yes"),  # may be one too
    ]  # fmt: skip
    found = Questions(rows, [], lambda _: b"")
    assert {each.image for each in found.without(["teal", "triangle"])} == {"b", "c"}
    assert found.without([]) == rows
    with pytest.raises(UserError, match="needs words that are answers"):
        found.without(["teal", "unicorn"])
    assert found.commonest() == ("teal", found.commonest()[1]) and found.commonest()[1]["what color?"] == "teal"


WRONG = {
    "image, question, answer must be texts": {"image": "a.png", "question": "what?"},
    "is outside of the folder": {"image": "../a.png", "question": "what?", "answer": "x"},
    'part must be "train" or "test"': {"image": "a.png", "question": "what?", "answer": "x", "part": "Test"},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_row_is_named(sentence: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps(WRONG[sentence]) + "\n")
    with pytest.raises(UserError, match=rf"line 1: .*{sentence}"):
        read_questions(str(tmp_path))
