"""No message, help text or page names an option that the verb or the recipe does not have."""

import ast
import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

from keifu.cli import COMMANDS
from keifu.commands.shared.command_names import module_of
from keifu.distributed.mesh import Mesh
from keifu.recipes.files import path_of, recipe_module, recipes
from keifu.recipes.options import _dataclass, _option

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/keifu"
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*[a-z]")
OF_TRAINING = {"--out", "--resume", "--replace", "--help", "--device", "--processes", "--restarts"}
BELOW = ("data", "layers", "models", "training")
OTHERS = {"--version", "--quiet", "--verbose"}  # of keifu itself
ELSEWHERE = {  # options of pip, of llama.cpp, of torchrun and of a linker; variables of a style sheet
    "data/catalogue/archives.py", "checkpoints/gguf/read.py", "distributed/failures.py", "lineage.py",
    "training/run/report.py", "page/kernel.py", "checkpoints/web.py",
}  # fmt: skip
OF_VERBS = {"training/hardware/plan.py", "data/text/prepared.py"}  # below them, and for one of them
WRITTEN_OF = {"commands/shared/flags.py", "commands/train.py"}  # they speak of options as such


def names(kind: type, prefix: str = "") -> set[str]:
    """Return the options that a dataclass gives, with dashes before them."""
    found = set[str]()
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if field in {each.name for each in fields(kind)}:
            name, inner = _option(field, hint, prefix), _dataclass(hint)
            found |= names(inner, name) if inner else {f"--{name}", f"--no-{name}"}
    return found


OF_TRAINING |= names(Mesh, "mesh")


@cache
def of_recipe(name: str) -> frozenset[str]:
    """Return the options of a recipe."""
    return frozenset(names(recipe_module(name).Recipe) | OF_TRAINING)


@cache
def of_verbs() -> frozenset[str]:
    """Return the options of every command except train."""
    found = set(OF_TRAINING)
    for verb in COMMANDS.keys() - {"train", "demo"}:
        own = vars(import_module(module_of(verb))).values()
        kinds = [each for each in own if isinstance(each, type) and is_dataclass(each)]
        found = found.union(*(names(kind) for kind in kinds if kind.__module__.startswith("keifu.commands")))
    return frozenset(found)


@cache
def words(path: Path) -> list[tuple[int, str]]:
    """Return every option-like word of a file's texts, docstrings and messages, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, word) for node in texts for word in OPTION.findall(str(node.value))]


@cache
def any_option() -> frozenset[str]:
    """Return the options of all recipes and commands."""
    return of_verbs().union(*map(of_recipe, recipes()))


@cache
def of_benchmarks() -> frozenset[str]:
    """Return the options that the benchmarks name."""
    return frozenset(word for file in ROOT.glob("benchmarks/*.py") for _, word in words(file))


def test_a_recipe_names_its_own_options_and_those_of_recipes_that_it_sends_people_to() -> None:
    wrong = []
    for name in recipes():
        path = path_of(name)
        named = set(re.findall(r"keifu train ([a-z][\w-]*)", path.read_text(encoding="utf-8"))) & recipes().keys()
        known = of_recipe(name).union(*map(of_recipe, named), of_verbs())
        wrong += [f"{path.name}:{line}: {word}" for line, word in words(path) if word not in known]
    assert wrong == []


def test_what_recipes_and_verbs_share_names_options_that_there_are() -> None:
    """What stands below the verbs is reached by recipes, whose options it must name."""
    wrong, of_recipes = [], frozenset[str]().union(*map(of_recipe, recipes()))
    for path in sorted(SOURCE.rglob("*.py")):
        if path.relative_to(SOURCE).as_posix() in ELSEWHERE | WRITTEN_OF:
            continue
        below = path.relative_to(SOURCE).parts[0] in BELOW and path.relative_to(SOURCE).as_posix() not in OF_VERBS
        known = of_recipes if below else any_option() | OTHERS
        wrong += [f"{path.relative_to(SOURCE)}:{line}: {word}" for line, word in words(path) if word not in known]
    assert wrong == []


TORCHRUN = {"--nnodes", "--node-rank", "--nproc-per-node", "--max-restarts"} | {
    f"--rdzv-{word}" for word in ("backend", "endpoint", "conf")
}
PEERS = {"--check-tensors", "--merge", "--debug.deterministic"}  # of llama.cpp and torchtitan
PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_name_options_that_there_are(page: Path) -> None:
    quoted = re.findall(r"`([^`\n]*)`", re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8")))
    shown = [text for text in quoted if not text.startswith(("python", "pytest", "make", "git", "pip", "docker"))]
    known = any_option() | OTHERS | TORCHRUN | PEERS | of_benchmarks()
    assert [word for text in shown for word in OPTION.findall(text) if word not in known] == []


def test_every_recipe_that_trains_has_the_same_names() -> None:
    common = {"--steps", "--seed", "--tensorboard", "--wandb"}
    for name in recipes().keys() - {"perceptron", "ngram", "mlp-compare", "demo", "instruct"}:
        assert common <= of_recipe(name), (name, common - of_recipe(name))


def test_it_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('raise ValueError(f"{1}: say --leave-out, not -- or a-b")')
    assert words(tmp_path / "a.py") == [(1, "--leave-out")]
    assert "--leave-out" in any_option() - frozenset[str]().union(*map(of_recipe, recipes()))
