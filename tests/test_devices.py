"""Where models run: what is chosen, by whom, and what is said of a device that is not there."""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from keifu import cli, devices
from keifu.commands.shared import flags
from keifu.commands.shared.command_names import module_of
from keifu.commands.shared.recipe_options import has_option
from keifu.devices import Choice, choose, choosing
from keifu.errors import UserError
from keifu.recipes import RECIPES
from keifu.training.job import Jobs

RUN_MODELS = ["chat", "classify", "compare", "draw", "embed", "evaluate", "generate", "translate"]
EXIST = ["cuda", "cuda:0", "cuda:1", "mps", "cpu"]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with two GPUs of one maker and one of another."""
    monkeypatch.setattr(devices, "available", lambda: EXIST)
    monkeypatch.delenv(devices.VARIABLE, raising=False)


def test_the_best_is_chosen_where_nothing_is_said(several: None) -> None:
    assert choose() == torch.device("cuda")


def test_a_name_goes_before_the_command_line_and_that_before_the_environment(several: None, monkeypatch) -> None:
    monkeypatch.setenv(devices.VARIABLE, "mps")
    assert choose() == torch.device("mps")
    with choosing(Choice("cuda:1")):
        assert choose() == torch.device("cuda:1") and choose("cpu") == torch.device("cpu")
        with choosing(Choice(precision="float32")):
            assert choose() == torch.device("cuda:1") and devices.device_choice().precision == "float32"
    assert choose() == torch.device("mps") and devices.device_choice() == Choice()


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "cpu:1", "CPU", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(several: None, name: str, monkeypatch) -> None:
    if name:  # an empty name says nothing
        with pytest.raises(
            UserError, match=f"^There is no device '{name}' .* which has cuda, cuda:0, cuda:1, mps, cpu\\.$"
        ):
            choose(name)
    monkeypatch.setenv(devices.VARIABLE, name or "tpu")
    with pytest.raises(UserError, match=f"^KEIFU_DEVICE: there is no device '{name or 'tpu'}'"):
        choose()


def test_without_a_gpu_the_cpu_is_all_there_is(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.available() == ["cpu"]
    with pytest.raises(UserError, match="which has cpu\\."):
        choose("cuda")


@pytest.mark.parametrize("verb", RUN_MODELS)
def test_every_verb_that_runs_a_model_can_be_told_where(verb: str) -> None:
    kind = import_module(module_of(verb)).Options
    assert issubclass(kind, flags.OnDevice)


@pytest.mark.parametrize("words", [["generate", "x", "y"], ["train", "gpt"], ["demo"]])
def test_an_unknown_device_is_said_before_anything_is_done(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--device", "quantum"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("There is no device 'quantum' on this machine, which has ")


def test_every_recipe_has_one_precision_and_one_compile() -> None:
    """Its own, or the command line's."""
    own = {name: import_module(f"keifu.recipes.{place}").Recipe for name, place in RECIPES.items()}
    assert (
        not has_option(own["dpo"], "precision")
        and has_option(own["gpt2"], "precision")
        and has_option(own["clip"], "compile")
    )
    assert all(dataclasses.is_dataclass(kind) for kind in own.values())


def test_the_command_lines_choice_reaches_the_recipe(tmp_path: Path, monkeypatch) -> None:
    seen = []

    def jobs(recipe: Any) -> Jobs:
        seen.append(devices.device_choice())
        yield from ()

    monkeypatch.setattr("keifu.recipes.assistant.dpo.jobs", jobs)
    cli.main(["train", "dpo", "--device", "cpu", "--precision", "bfloat16", "--compile", "--out", str(tmp_path)])
    assert seen == [Choice("cpu", "bfloat16", True)] and devices.device_choice() == Choice()
