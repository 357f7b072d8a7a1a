"""The comparison of translators: its tables follow from the translations that its benchmark wrote."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs/results/data"


@pytest.fixture
def translators(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("translators")


def tables() -> list[dict[str, Any]]:
    found = json.loads((DATA / "translation.json").read_text(encoding="utf-8"))
    return [table for table in found if "benchmarks/translators.py" in table["command"]]


def test_scores_and_intervals_are_those_of_the_translations(translators: Any) -> None:
    written = json.loads((DATA / "translators.json").read_text(encoding="utf-8"))
    (main,) = tables()
    assert main["rows"] == translators.main_rows(written, written["items"])


def test_networks_had_about_equal_time_and_the_better_of_their_rates(translators: Any) -> None:
    written = json.loads((DATA / "translators.json").read_text(encoding="utf-8"))
    minutes = [facts["core minutes"] for facts in written["networks"].values()]
    assert len(minutes) == 3 and max(minutes) < 1.4 * min(minutes)
    for name, losses in written["rates after short runs"].items():
        assert written["networks"][name]["rate"] == float(min(losses, key=lambda rate: losses[rate]))
    assert written["networks"][translators.WITHOUT]["rate"] == written["networks"][translators.WITH]["rate"]


def test_another_translation_would_be_seen(translators: Any) -> None:
    written = json.loads((DATA / "translators.json").read_text(encoding="utf-8"))
    clean = [i for i, item in enumerate(written["items"]) if not item["near copy"]]
    before = translators.scores(written["items"], translators.TRANSFORMER, clean)
    for i in clean[:20]:
        written["items"][i][translators.TRANSFORMER] = "x"
    assert translators.scores(written["items"], translators.TRANSFORMER, clean) != before


def test_the_table_with_muon_follows_from_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = import_module("translators_muon")
    tables = json.loads((benchmark.DATA / "translation.json").read_text(encoding="utf-8"))
    (found,) = [each for each in tables if each["section"] == benchmark.SECTION]
    assert benchmark.table(found["values"])[0] == found["rows"]
