"""`keifu train ngram`: every option reaches the model, and the result loads, is evaluated and writes."""

import math
import random
import re
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
    words = ["--data", str(text), "--validation-data", str(other), "--order", "4", "--prompt", "ran t"]
    parse(["train", "ngram", *words, "--out", str(out)])()
    said = capsys.readouterr().out
    assert "\nran t" in said, "no line of the text begins with it"
    model, tokenizer = checkpoints.load(out)
    config: Any = model.config
    assert config.order == len(config.n_grams) == 4
    assert config.vocab_size == tokenizer.vocab_size < 30
    main(["evaluate", str(out), "--on", str(other)])
    assert "perplexity" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert set(wiring.leaves(ngram.Recipe())) == OPTIONS


def test_the_figures_are_in_their_units(
    own_cache: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each character has three bytes, so that nats per token, bits per token and bits per byte are different."""
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("あいうえ", (8, 4, 2, 1), k=4000)))
    parse(["train", "ngram", "--data", str(text), "--order", "2", "--prompt", "あ", "--out", str(tmp_path / "run")])()
    printed = r"loss: ([\d.]+) nats per token \(perplexity ([\d.]+), ([\d.]+) bits per byte"
    nats, perplexity, bits = map(float, re.search(printed, capsys.readouterr().out).groups())  # type: ignore[union-attr]
    assert 0.9 < nats < 1.4
    assert perplexity == pytest.approx(math.exp(nats), rel=0.01)
    assert bits == pytest.approx(nats / math.log(2) / 3, rel=0.01)


def test_a_run_that_is_begun_again_is_the_same(own_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 60)
    for name in ("a", "b"):
        parse(["train", "ngram", "--data", str(text), "--order", "3", "--out", str(tmp_path / name)])()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_text_without_a_line_break_is_continued_too(
    own_cache: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its characters have no line break, so the sample begins with its first character."""
    text = tmp_path / "text.txt"
    text.write_text("abcabdabcabeabcabfab" * 60)
    parse(["train", "ngram", "--data", str(text), "--order", "3", "--out", str(tmp_path / "run")])()
    assert "\nabca" in capsys.readouterr().out


def test_a_prompt_that_the_tokenizer_lacks_is_refused_before_the_count(
    own_cache: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("abcabdabcabeabcabfab\n" * 60)
    with pytest.raises(SystemExit):
        main(["train", "ngram", "--data", str(text), "--prompt", "xyz", "--out", str(out)])
    assert "The character 'x'" in capsys.readouterr().err and not out.exists()
