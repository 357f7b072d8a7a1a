"""keifu train see: a model learns to answer about pictures, and its evaluation prints what a blind one reaches."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_questions import coloured_shapes

from keifu import checkpoints
from keifu.data.images.questions import Question, Questions, read_questions
from keifu.errors import UserError
from keifu.evaluation.images import questions as evaluation
from keifu.evaluation.registry import EvalRequest
from keifu.models import gpt2, llama
from keifu.models.clip import image as clip_image
from keifu.models.hf.image_processor import Tiles
from keifu.models.multimodal import llava, siglip, smolvlm
from keifu.recipes.assistant import see

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOWER = clip_image.Config(12, 4, 3, 24, 48, 1, 2, activation="gelu", projected=False)


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_it_learns_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the benchmark's own steps: the picture decides both answers, so that a blind model is right by chance."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    seeing = import_module("seeing")
    folder = coloured_shapes(tmp_path / "shapes", 12)
    monkeypatch.setattr(seeing, "PAIR", ())
    run = seeing.train(tmp_path, 60, 0, data=str(folder), image=TOWER, batch_size=16, held_out=0.0, learning_rate=3e-3)
    figures = seeing.measure(run, None, str(folder))
    assert figures["accuracy"] == 1.0 and figures["questions"] == 8
    assert figures["commonest answer to each question"] == 0.5
    assert figures["without the picture"] <= 0.5
    model, tokenizer = checkpoints.load(run)
    assert isinstance(model, llava.Llava)
    found = evaluation.evaluate(model, tokenizer, EvalRequest(on=str(folder), limit=3, held_out={"left_out": ["red"]}))
    assert found.items is not None and len(found.items.rows) == 3
    assert found.figures["accuracy on pictures of red, left out of training"] == 1.0
    sys.modules.pop("seeing")


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_adapters_are_merged_into_what_is_saved(tmp_path: Path) -> None:
    folder = coloured_shapes(tmp_path / "shapes", 8)
    base = decoder(tmp_path, llama)
    lora = see.finetuning.Lora(rank=2)
    see.run(see.Recipe(base, data=str(folder), image=TOWER, steps=2, batch_size=4, lora=lora), tmp_path / "run", False)
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
