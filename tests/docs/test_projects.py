"""The projects of examples/ are small, make their own data and run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECTS = Path(__file__).parents[2] / "examples/projects"


def project(name: str) -> ModuleType:
    """Import a project's file without running it."""
    spec = importlib.util.spec_from_file_location(name, PROJECTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    project(name).main()


@pytest.mark.parametrize("path", sorted(PROJECTS.glob("*.py")), ids=lambda path: path.name)
def test_a_project_is_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100


def test_each_sticker_has_its_mood(tmp_path: Path) -> None:
    stickers = project("sticker_drawer")
    stickers.write(tmp_path, each=2)
    pictures = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/001.png")}
    assert pictures.keys() == set(stickers.MOODS)
    assert len(set(pictures.values())) == 4


def test_sentences_keep_to_the_glossary() -> None:
    made = project("glossary_translator")
    pairs = made.sentences()
    assert len(pairs) == len(set(pairs)) == 1340
    for ja, en in pairs[:50]:
        used = [term for term in made.GLOSSARY if term in ja]
        assert used and all(made.GLOSSARY[term] in en for term in used)


def test_the_shop_knows_what_is_meant_and_what_it_does_not_know() -> None:
    helper = project("faq_chat").Helper(None)
    assert "closed on Sundays" in helper.answer("Are you open on Sunday?")
    assert "30 days" in helper.answer("The shoes do not fit. Can I return them?")
    assert "I do not know" in helper.answer("Who wrote Faust?")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glossary_translator", "sticker_drawer"])
def test_a_project_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(name, tmp_path, monkeypatch, "--steps", "2", *(["--each", "6", "--count", "2"] if "sticker" in name else []))
    assert list((tmp_path / "runs").glob("*/model.safetensors")) or list((tmp_path / "runs").glob("*.png"))
