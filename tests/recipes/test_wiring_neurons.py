"""Every option of the recipes for small networks and of the demonstration reaches what it names; no recipe is without a
table of its options."""

from pathlib import Path
from typing import Any

import pytest
import test_hearing
import test_wiring_assistant
import test_wiring_images
import test_wiring_language
import wiring
from wiring import DIFFERENT, Group, Reach

from keifu.errors import UserError
from keifu.recipes import demo
from keifu.recipes.files import recipes
from keifu.recipes.neurons import mlp, mlp_compare, perceptron as perceptron_recipe
from keifu.recipes.running import run_jobs

pytestmark = pytest.mark.usefixtures("one_thread")


def of_mlp() -> tuple[Any, list[Group]]:
    rows = {
        "data": Reach("moons", "run.about.title", DIFFERENT),
        "hidden": Reach((5, 6), "model.config.hidden_dims"),
        "activation": Reach("tanh", "model.config.activation"),
        "loss": Reach("mean_squared_error", "objective.loss"),
        "dropout": Reach(0.37, "model.config.dropout"),
        "steps": Reach(41, "settings.steps"),
        "batch_size": Reach(3, ("settings.batch_size", "data.batch_size")),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "weight_decay": Reach(0.07, "settings.weight_decay"),
        "seed": Reach(5, ("settings.seed", "data.seed")),
    }
    return mlp.Recipe(), [Group(rows)]


def of_mlp_compare() -> tuple[Any, list[Group]]:
    base = mlp_compare.Recipe("xor", activations=("tanh",), losses=("cross_entropy",), steps=20)
    rows = {
        "data": Reach("moons", "run.options.data"),
        "activations": Reach(("relu", "gelu"), "model.config.activation", "gelu"),
        "losses": Reach(("cross_entropy", "mean_squared_error"), "objective.loss", "mean_squared_error"),
        "hidden": Reach((5, 6), "model.config.hidden_dims"),
        "steps": Reach(41, "settings.steps"),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "seed": Reach(5, ("settings.seed", "data.seed")),
    }
    return base, [Group(rows)]


TABLE = {"mlp": of_mlp, "mlp_compare": of_mlp_compare}
ELSEWHERE = {  # options that need data of another kind, and the tests that hold them
    "mlp": {"label": "test_neuron_recipes", "augment": "test_neuron_recipes"},
    "mlp_compare": {"label": "test_neuron_recipes"},
}


@pytest.mark.parametrize("name", TABLE)
def test_every_option_reaches_what_it_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_compare.decision_boundary, "curves", lambda results: b"")
    base, groups = TABLE[name]()
    groups = wiring.logged(base, groups)
    assert not wiring.uncovered(base, groups, ELSEWHERE[name]), "an option without a row in the table above"
    wiring.check(groups, lambda given: wiring.run(name, wiring.assign(base, given), tmp_path / name))


def test_settings_of_a_network_of_layers(tmp_path: Path) -> None:
    found = wiring.run("mlp", mlp.Recipe(), tmp_path).settings
    assert (found.betas, found.final_ratio, found.precision) == ((0.9, 0.99), 0.0, "float32")
    assert (found.warmup, found.weight_decay, found.steps) == (30, 0.01, 600)


def test_the_perceptrons_options_reach_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    whole = perceptron_recipe.perceptron.learn

    def learn(neuron, seen, targets, rate):
        rates.append(rate)
        return whole(neuron, seen, targets, rate)

    monkeypatch.setattr(perceptron_recipe.perceptron, "learn", learn)
    run_jobs(perceptron_recipe.jobs(perceptron_recipe.Recipe("or", rate=0.25)), tmp_path)
    with pytest.raises(UserError, match="After 2 corrections"):
        run_jobs(perceptron_recipe.jobs(perceptron_recipe.Recipe("or", max_updates=2)), tmp_path)
    assert rates == [0.25, 1.0]
    assert set(wiring.leaves(perceptron_recipe.Recipe())) == {"data", "label", "rate", "max_updates"}


def test_the_demonstration_trains_as_long_on_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {number} of the text {number % 7}\n" for number in range(900)))
    monkeypatch.setattr(demo, "_ask", lambda _, *questions: ["Paris", "Tokyo"])
    monkeypatch.setattr(demo.landmarks, "show", lambda: ({}, []))  # tests/recipes/test_demo.py has these
    record = wiring.run("demo", demo.Recipe(str(tmp_path / "text.txt"), 123), tmp_path / "run")
    assert record.settings.steps == 123 and record.run.about["data"][0]["source"] == str(tmp_path / "text.txt")
    assert record.settings.evaluate_every == 130 and record.settings.optimizer == "muon"
    assert set(wiring.leaves(demo.Recipe())) == {"data", "steps"}


def test_every_recipe_has_a_table() -> None:
    """Here or in the other files of this kind."""
    modules = (test_wiring_language, test_wiring_assistant, test_wiring_images, test_hearing)
    known = {"perceptron", "ngram", "demo", *TABLE, *(name for module in modules for name in module.TABLE)}
    assert {name.replace("-", "_") for name in recipes()} - known == {"instruct"}  # made of three of these
