"""`keifu train gpt --start-from`: a model that is there goes on from its weights, with its sizes and its tokenizer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.cli import main
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.layers.attention.positions import RopeScaling
from keifu.models import bert, gpt2, llama
from keifu.recipes.language import gpt
from keifu.training.job import Job
from keifu.training.settings import Settings

TINY = llama.Config(270, 16, 8, 16, 2, 2)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _repeatable: None) -> str:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat and the dog ran\n" * 60)
    return str(file)


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def test_it_goes_on_where_the_other_ended(text: str, tmp_path: Path) -> None:
    words = ["train", "gpt", "--data", text, "--batch-size", "4", "--context-length", "16", "--seed", "3"]
    first, then = tmp_path / "first", tmp_path / "then"
    main([*words, "--depth", "1", "--vocab-size", "270", "--steps", "30", "--out", str(first)])
    main([*words, "--start-from", str(first), "--steps", "5", "--out", str(then)])
    assert losses(then)[0] == pytest.approx(losses(first)[-1], rel=2e-3)  # before the first step; stored in bfloat16
    for name in ("config.json", "tokenizer.json"):
        assert (then / name).read_text() == (first / name).read_text()


def saved(config: Any, folder: Path) -> str:
    tokenizer = train_tokenizer("bpe", ["ab cd"] * 5, 270)
    build = llama.build if isinstance(config, llama.Config) else gpt2.build
    checkpoints.save(build(replace(config, vocab_size=tokenizer.vocab_size)), tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_model_goes_on_with_longer_rows_on_stretched_positions(kind: Any, text: str, tmp_path: Path) -> None:
    first = saved(TINY, tmp_path / "first")
    recipe = gpt.Recipe(start_from=first, data=text, context_length=64, stretch=kind, batch_size=2)
    job = next(iter(gpt.jobs(recipe)))
    assert isinstance(job, Job) and job.data.context_length == 64
    assert isinstance(job.settings, Settings) and job.settings.steps == 100
    original, _ = checkpoints.load(first, torch.float32)
    assert job.model.config == replace(original.config, context_length=64, rope_scaling=RopeScaling(kind, 4.0, 16))
    assert all(torch.equal(tensor, job.model.state_dict()[name]) for name, tensor in original.state_dict().items())
    checkpoints.save(job.model, job.tokenizer, tmp_path / "longer")
    back, _ = checkpoints.load(tmp_path / "longer", torch.float32)
    tokens = torch.arange(64)[None]
    torch.testing.assert_close(back(tokens), job.model(tokens))
    with pytest.raises(UserError, match="they are scaled already"):
        next(iter(gpt.jobs(replace(recipe, start_from=str(tmp_path / "longer"), context_length=128))))


def test_a_stretch_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    first, learned = (
        saved(TINY, tmp_path / "first"),
        saved(gpt2.Config(270, 16, 8, n_layers=2, n_heads=2), tmp_path / "learned"),
    )
    with pytest.raises(UserError, match=r"--context-length 64 is more than the 16 tokens .* --stretch yarn"):
        next(iter(gpt.jobs(gpt.Recipe(start_from=first, data=text, context_length=64))))
    with pytest.raises(UserError, match="takes 16 tokens without --stretch, and rows have 16"):
        next(iter(gpt.jobs(gpt.Recipe(start_from=first, data=text, stretch="yarn"))))
    with pytest.raises(UserError, match="its model has none"):
        next(iter(gpt.jobs(gpt.Recipe(start_from=learned, data=text, context_length=64, stretch="yarn"))))
    with pytest.raises(UserError, match="name it with --start-from"):
        gpt.Recipe(stretch="yarn")


@pytest.mark.slow
def test_two_processes_that_share_the_model_go_on_as_one_does(text: str, tmp_path: Path) -> None:
    words = ["train", "gpt", "--data", text, "--batch-size", "4", "--context-length", "16", "--seed", "3"]
    words += ["--precision", "float32", "--steps", "3"]
    main([*words, "--depth", "1", "--vocab-size", "270", "--out", str(tmp_path / "first")])
    words += ["--start-from", str(tmp_path / "first"), "--out"]
    main([*words, str(tmp_path / "one")])
    two = [sys.executable, "-m", "keifu", *words, str(tmp_path / "two"), "--processes", "2", "--mesh.shard", "2"]
    subprocess.run(two, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    both = [dict(checkpoints.load(tmp_path / each)[0].named_parameters()) for each in ("one", "two")]
    assert all(torch.allclose(both[0][name], both[1][name], atol=1e-2) for name in both[0])


def test_a_hybrid_learns_and_generates(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--data", text, "--batch-size", "4", "--context-length", "16", "--vocab-size", "270", "--steps", "4"]
    run = str(tmp_path / "hybrid")
    main(["train", "gpt", "--family", "qwen3.5", "--depth", "2", *words, "--out", run])
    model, _ = checkpoints.load(Path(run))
    assert [type(block.attention).__name__ for block in model.blocks] == ["GatedDeltaNet", "GatedAttention"]
    capsys.readouterr()
    main(["generate", run, "the cat", "--max-tokens", "5", "--temperature", "0", "--guesses", "0"])
    written = capsys.readouterr().out
    assert written.strip()
    main(["generate", run, "the cat", "--max-tokens", "5", "--temperature", "0", "--guesses", "3"])
    assert capsys.readouterr().out == written


def test_its_rates_are_a_tenth_unless_they_are_given() -> None:
    given = gpt.Recipe(start_from="it", learning_rate=1e-3, matrix_rate=0.0)
    asked = [gpt.Recipe(), gpt.Recipe(start_from="it"), given]
    found = [gpt.settings(each, 10**6, 512, 10**6) for each in asked]
    assert [each.learning_rate for each in found] == pytest.approx([3e-3, 3e-4, 1e-3])
    assert [each.matrix_rate for each in found] == pytest.approx([0.02, 0.002, 0.0])


def test_a_short_text_is_read_at_most_four_times() -> None:
    recipe = gpt.Recipe(batch_size=10, recipe_of="chinchilla")
    # 20 tokens a parameter are 2,000,000; 4 passes over 300,000 tokens are 1,200,000, in steps of 10 · 100 tokens
    assert gpt.settings(recipe, 100_000, 100, 300_000).steps == 1200
    assert gpt.settings(recipe, 100_000, 100, 600_000).steps == 2000  # here the parameters decide
    assert gpt.settings(recipe, 100_000, 100, 10_000).steps == 100  # the least


def test_the_default_ends_within_minutes_and_says_what_the_law_asks_for(capsys: pytest.CaptureFixture) -> None:
    config, tokens = gpt.model_config(4, 8192), 10**8
    size = gpt.parameters(config)
    settings = gpt.settings(gpt.Recipe(), size, config.context_length, tokens)
    assert settings.batch_size * config.context_length == 8192
    operations = 6 * size * 8192 * settings.steps
    assert operations == pytest.approx(8e13, rel=0.01)  # 10 minutes of two cores have 1.8e14 (3e11 FLOP/s)
    said = capsys.readouterr().out
    law = gpt.settings(gpt.Recipe(recipe_of="chinchilla"), size, config.context_length, tokens)
    assert law.steps == round(20 * size / 8192) and f"asks for {law.steps:,} steps" in said
    assert f"this run makes {settings.steps:,}," in said and not capsys.readouterr().out
    deltas = gpt.settings(gpt.Recipe(family="qwen3.5"), size, config.context_length, tokens)
    assert deltas.steps == pytest.approx(settings.steps * 5 / 8, abs=1)  # 2.41 s of a core per step, LLaMA's take 1.66
    assert gpt.settings(gpt.Recipe(depth=8), 10**9, 2048, tokens).steps == 100  # the least
    assert gpt.settings(gpt.Recipe(steps=7), size, config.context_length, tokens).steps == 7
    small = [gpt.settings(gpt.Recipe(1, recipe_of=source), 10_000, 100, tokens) for source in ("keifu", "chinchilla")]
    assert small[0] == small[1]  # a small model follows the law


def test_every_kind_of_language_model_goes_on_in_rows_that_it_takes(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = train_tokenizer("bpe", ["the cat"] * 9, 270)
    config = gpt2.Config(tokenizer.vocab_size, 24, 16, 64, 1, 2, dropout=0.0)
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    checkpoints.save(gpt2.build(config), tokenizer, folder)
    words = ["train", "gpt", "--data", text, "--start-from", str(folder), "--batch-size", "2", "--out", str(out)]
    main([*words, "--steps", "2"])  # the dial's rows have 512 tokens, the model takes 24
    saved: dict = json.loads((out / "config.json").read_text())
    assert (saved["model_type"], saved["n_ctx"]) == ("gpt2", 24)
    with pytest.raises(SystemExit):
        main([*words, "--context-length", "25", "--replace"])
    assert f"--context-length 25 is more than the 24 tokens that {folder} takes: give less" in capsys.readouterr().err


def test_what_continues_no_text_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = train_tokenizer("wordpiece", ["the cat"] * 9, 40)
    sizes = {"context_length": 16, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    config = bert.Config(vocab_size=tokenizer.vocab_size, **sizes)
    checkpoints.save(bert.build(config), tokenizer, tmp_path / "bert")
    with pytest.raises(SystemExit):
        main(["train", "gpt", "--data", text, "--start-from", str(tmp_path / "bert"), "--out", str(tmp_path / "out")])
    assert "This model writes no text" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--vocab-size", "300"], ["--tokenizer", "unigram"]])
def test_a_tokenizer_beside_a_model_that_has_one_is_refused(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "gpt", "--start-from", "gpt-en", *words])
    assert f"gpt-en goes on with its own tokenizer: leave {' '.join(words)} out." in capsys.readouterr().err
