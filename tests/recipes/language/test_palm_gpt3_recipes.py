"""`keifu train palm` and `gpt3`: the papers' figures, and runs of both ways, resumed while the batch grows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.cli import parse
from keifu.errors import UserError
from keifu.recipes.language import gpt3, palm
from keifu.recipes.language.pretraining import Text, TextObjective, prepare_text, pretraining_job
from keifu.recipes.running import train_job
from keifu.training.run import checkpoint, metrics

SIZES = ("--model.context-length", "16", "--model.dim", "16", "--model.n-layers", "2", "--model.n-heads", "2")
MORE = {"palm": ("--model.head-dim", "8"), "gpt3": ("--model.band", "4")}


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran 12345 times\n" * 80)
    return path


def go(name: str, text: Path, out: str, *options: str) -> Path:
    words = ["--data", str(text), "--vocab-size", "270", *SIZES, "--model.hidden-dim", "32", *MORE[name]]
    parse(["train", name, *words, "--prompt", "the", "--out", str(text.parent / out), *options])()
    return text.parent / out


def test_palms_settings_are_the_papers() -> None:
    found = palm.paper_settings(palm.Recipe(steps=255_000, batch_size=2048))
    assert (found.optimizer, found.learning_rate, found.schedule) == ("adafactor", 1e-2, "inverse_sqrt")
    assert (found.hold, found.warmup, found.weight_decay, found.betas[0], found.clip) == (10_000, 0, 1.0, 0.9, 1.0)
    assert found.batch_stages == ((512, 50_000), (1024, 115_000)) and found.rate_by == "steps"
    assert (found.spikes.rewind, found.spikes.skip) == (100, 300) and found.spikes.rise > 0
    assert palm.WAYS["paper"][1] == 1e-4 and palm.Recipe().model.n_kv_heads == 1
    short = palm.paper_settings(palm.Recipe(steps=2))
    assert short.batch_stages == () and short.hold == 1


def test_gpt3s_settings_are_the_papers() -> None:
    found = gpt3.paper_settings(gpt3.Recipe(steps=600_000, batch_size=244))
    assert (found.optimizer, found.betas, found.epsilon, found.clip) == ("adamw", (0.9, 0.95), 1e-8, 1.0)
    assert (found.learning_rate, found.weight_decay, found.schedule, found.final_ratio) == (6e-4, 0.1, "cosine", 0.1)
    tokens_a_step = 244 * 2048
    assert found.growth.at(0) * 2048 == pytest.approx(32e3, rel=0.05) and found.rate_by == "rows"
    assert found.batch_ramp and found.batch_ramp[1] * 2048 == pytest.approx(4e9, rel=0.01)
    assert found.warmup * tokens_a_step == pytest.approx(375e6, rel=0.01)
    assert found.decay_steps and found.decay_steps * tokens_a_step == pytest.approx(260e9, rel=0.01)
    assert gpt3.paper_settings(gpt3.Recipe(batch_size=1)).batch_ramp is None


@pytest.mark.parametrize("name", ["palm", "gpt3"])
@pytest.mark.parametrize("of", ["keifu", "paper"])
def test_it_trains_and_what_is_left_loads(name: str, of: str, text: Path, capsys: pytest.CaptureFixture) -> None:
    out = go(name, text, "run", "--recipe-of", of, "--steps", "12", "--batch-size", "8")
    recipe = json.loads((out / "recipe.json").read_text())
    line = next(line for line in metrics.read(out) if "loss" in line)
    paper_palm = (name, of) == ("palm", "paper")
    assert ("nats" in line) == paper_palm == ("z_loss" in recipe["options"])
    assert recipe["settings"]["spikes.rise"] == (0.25 if name == "palm" else 0.0)
    said = capsys.readouterr().err
    assert ("steps of up to 128 tokens" in said) == (of == "paper")
    model, tokenizer = checkpoints.load(out)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("the 123 cat")) == "the 123 cat"
    if name == "palm":
        assert len(tokenizer.encode("12345")) >= 5
        assert json.loads((out / "config.json").read_text())["architectures"] == ["CohereForCausalLM"]
    validation = [line for line in metrics.read(out) if "validation_loss" in line][-1]
    bits = validation["validation_loss"] / torch.log(torch.tensor(2.0)).item()
    assert validation["bits_per_byte"] < bits and "validation_nats" not in validation


@pytest.mark.parametrize("module", [palm, gpt3], ids=["palm", "gpt3"])
def test_resumed_while_the_batch_grows_it_is_bitwise_the_same(module: Any, text: Path) -> None:
    sizes = dict(context_length=16, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    own = getattr(module, module.__name__.split(".")[-1])
    config = replace(module.Recipe().model, **sizes)
    task = prepare_text(Text(str(text), vocab_size=270))
    settings = module.paper_settings(module.Recipe(steps=500, batch_size=9))
    settings = replace(settings, steps=12, save_every=4, decay_steps=10)
    settings = replace(
        settings, **({"batch_ramp": (2, 40)} if settings.batch_ramp else {"batch_stages": ((2, 3), (4, 6))})
    )
    assert settings.growth.at(4) < settings.growth.at(7) <= 9
    whole, parts, z_loss = text.parent / "whole", text.parent / "parts", TextObjective(z_loss=1e-4)
    for out in (whole, parts):
        train_job(pretraining_job("it", task, own.build, config, replace(settings, keep=3), objective=z_loss), out)
    checkpoint.remove(parts, 12)
    checkpoint.remove(parts, 8)
    train_job(pretraining_job("it", task, own.build, config, settings, objective=z_loss), parts, True)
    ours, theirs = (checkpoint.latest(each)[0].tensors for each in (parts, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(UserError, match="z_loss 0.0001 → "):
        train_job(pretraining_job("it", task, own.build, config, settings), parts, True)
