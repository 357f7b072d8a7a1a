"""`--recipe-of paper`: the published sizes and settings, and the plan of a run that is too large for the machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import keifu
from keifu.cli import parse
from keifu.errors import UserError
from keifu.models import palm
from keifu.recipes import plan
from keifu.recipes.files import recipe_module
from keifu.recipes.images import ddpm
from keifu.recipes.language import bert, gpt1, gpt2, palm2
from keifu.recipes.language.pretraining import Text
from keifu.training.job import parameters
from keifu.training.settings import Settings

TWO_CORES = 3e11  # FLOP/s of a run with bfloat16
PAPERS = {"gpt2": 124.4e6, "llama": 6.74e9, "olmo2": 7.3e9, "llada": 8.02e9, "bert": 110e6}  # parameters


@pytest.mark.parametrize(("name", "size"), PAPERS.items())
def test_the_default_takes_minutes_and_the_paper_has_its_size(name: str, size: float) -> None:
    module: Any = recipe_module(name)
    ours, papers = module.Recipe(), module.PUBLISHED
    row = min(ours.model.context_length, ours.masking.length if name == "bert" else 10**6)
    with torch.device("meta"):
        build = vars(module)[name].build
        vocabulary = {"vocab_size": ours.text.vocab_size} | ({"mask_token": 0} if name == "llada" else {})
        small = parameters(build(replace(ours.model, **vocabulary)))
        large = parameters(build(papers.model))
    assert 6 * small * row * ours.training.steps * ours.training.batch_size < 600 * TWO_CORES
    assert large == pytest.approx(size, rel=0.01) and papers.recipe_of == "paper"


@pytest.mark.parametrize("name", ["gpt3", "palm"])
def test_the_default_of_recipes_of_the_papers_settings_takes_minutes(name: str) -> None:
    module: Any = recipe_module(name)
    ours = module.Recipe()
    with torch.device("meta"):
        size = parameters(vars(module)[name].build(replace(ours.model, vocab_size=ours.text.vocab_size)))
    settings = ours.own_settings()
    assert 6 * size * ours.model.context_length * settings.steps * settings.batch_size < 0.8 * 600 * TWO_CORES


def test_the_default_of_palm2_takes_minutes() -> None:
    ours = palm2.Recipe()
    with torch.device("meta"):
        size = parameters(palm.build(replace(ours.model, vocab_size=ours.vocab_size)))
    step = 6 * size * ours.model.context_length * ours.training.batch_size
    assert step * ours.training.steps < 600 * TWO_CORES


@pytest.mark.parametrize(
    "name", [*(paper for paper in PAPERS if paper != "bert"), "ddpm", pytest.param("bert", marks=pytest.mark.slow)]
)  # BERT's recipe builds its model before it reads data
def test_a_run_of_years_is_refused_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda device: 10**12)
    monkeypatch.setattr(plan, "peak", lambda device, dtype: 1e12)
    out = tmp_path / "run"
    asked = ["train", name, "--recipe-of", "paper", "--out", str(out), "--data", str(tmp_path / "absent")]
    with pytest.raises(UserError, match=r"^The plan: .* days here, and .* Add --yes to start it"):
        parse(asked)()
    assert not out.exists()
    with pytest.raises(UserError, match="absent"):
        parse([*asked, "--yes"])()


def test_the_plan_is_a_sum_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 2 M parameters has 4 bytes for each weight, gradient and state of the optimizer."""
    monkeypatch.setattr(plan, "available_memory", lambda device: 33 * 10**6)
    monkeypatch.setattr(plan, "peak", lambda device, dtype: 1e10)
    settings = Settings(steps=3000, batch_size=50)
    operations = 6 * 2e6 * 3000 * 50 * 1000
    days = f"{operations / (0.4 * 1e10) / 86_400:.0f}"
    with pytest.raises(UserError, match=f"2 M parameters, 3,000 steps; about {days} days here, and 32 MB for"):
        plan.check_plan(2_000_000, operations, settings, False)
    plan.check_plan(2_000_000, operations, settings, True)
    plan.check_plan(2_000_000, operations, replace(settings, minutes=5.0), False)
    monkeypatch.setattr(plan, "available_memory", lambda device: 31 * 10**6)
    with pytest.raises(UserError, match="32 MB for weights, gradients and optimizer, of which 31 MB are free"):
        plan.check_plan(2_000_000, 1.0, settings, True)
    plan.check_plan(2_000_000, 1.0, replace(settings, optimizer="muon"), False)  # one state for each weight: 24 MB


def test_options_change_the_papers_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(gpt2, "check_before_start", seen.append)
    monkeypatch.setattr(gpt2, "jobs", lambda recipe: (job for job in ()))
    words = ["--recipe-of", "paper", "--model.n-layers", "2", "--steps", "30", "--warmup", "5"]
    parse(["train", "gpt2", *words, "--out", str(tmp_path / "command")])()
    expected = replace(gpt2.PUBLISHED, model=replace(gpt2.PUBLISHED.model, n_layers=2))
    assert seen == [replace(expected, training=replace(expected.training, steps=30, warmup=5))]
    keifu.train("gpt2", recipe_of="paper", prompt="It", out=tmp_path / "python")
    assert seen[1] == replace(gpt2.PUBLISHED, prompt="It")
    keifu.train("gpt2", prompt="It", out=tmp_path / "small")
    assert seen[2] == gpt2.Recipe(prompt="It") and seen[2].model.dim == 256


def test_the_papers_passes_are_counted_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. A dog ran to the house.\n" * 900)
    recipe = gpt1.Recipe(Text(str(text), "characters"), recipe_of="paper", epochs=3.0, batch_size=2)
    seen = []
    monkeypatch.setattr(gpt1, "check_language_plan", lambda *arguments: seen.append(arguments))
    gpt1.check_before_start(recipe)
    tokens = 3 * 0.95 * len(text.read_text())
    assert seen[0][3].steps * 2 * recipe.model.context_length == pytest.approx(tokens, rel=0.05)
    assert gpt1.choose_settings(gpt1.Recipe(), 10**9).steps == 600
    assert gpt1.choose_settings(gpt1.Recipe(recipe_of="paper"), 16_384).steps == 100


def test_bert_is_planned_with_the_rows_that_it_reads() -> None:
    assert bert.PUBLISHED.masking.length == 128 < bert.PUBLISHED.model.context_length


def test_pictures_are_planned_by_counting_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ddpm, "check_plan", lambda *arguments: seen.append(arguments))
    for steps, size in ((10, 8), (20, 8), (10, 16)):
        ddpm.check_before_start(ddpm.Recipe(steps=steps, size=size, batch_size=4))
    assert seen[1][1] == 2 * seen[0][1] and 3 < seen[2][1] / seen[0][1] < 5
    ddpm.check_before_start(ddpm.Recipe(minutes=3.0))
    assert len(seen) == 3
