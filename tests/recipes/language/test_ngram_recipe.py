"""`keifu train ngram`: every option reaches the model, and the result loads, is evaluated and writes."""

from pathlib import Path
from typing import Any

import pytest
import wiring

from keifu import checkpoints
from keifu.cli import main, parse
from keifu.recipes.language import ngram

OPTIONS = {"text.data", "text.tokenizer", "text.vocab_size", *(f"text.{name}" for name in (
    "held_out", "validation_data", "text_field", "encoding", "split"
)), "order", "prompt"}  # fmt: skip


def test_options_reach_the_model_and_the_loss_is_that_of_an_evaluation(
    own_cache: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, other, out = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "run"
    text.write_text("the cat sat on the mat and the dog ran to the door\n" * 40)
    other.write_text("the dog sat on the door\n" * 30)
    words = ["--data", str(text), "--validation-data", str(other), "--order", "4", "--prompt", "the c"]
    parse(["train", "ngram", *words, "--out", str(out)])()
    said = capsys.readouterr().out
    assert "\nthe c" in said
    model, tokenizer = checkpoints.load(out)
    config: Any = model.config
    assert config.order == len(config.n_grams) == 4
    assert config.vocab_size == tokenizer.vocab_size < 30
    main(["evaluate", str(out), "--on", str(other)])
    assert "perplexity" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert set(wiring.leaves(ngram.Recipe())) == OPTIONS


def test_a_run_that_is_begun_again_is_the_same(own_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 60)
    for name in ("a", "b"):
        parse(["train", "ngram", "--data", str(text), "--order", "3", "--out", str(tmp_path / name)])()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
