"""Sheets of drawn emoji that somebody names, and the count of the names."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[3]
DATA = ROOT / "docs/results/data"


@pytest.fixture
def by_eye(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark, with pictures whose shade is the number of their name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = import_module("named_by_eye")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    names = [f"name {number}" for number in range(24)]
    pictures = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(24, 3, 8, 8)
    parts = [(kind, names, pictures) for kind in (module.LEARNED, module.LEARNED, module.NEW, module.REAL)]
    monkeypatch.setattr(module, "sheets", lambda options: list(parts))
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_right_names_are_counted(by_eye: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    run(by_eye, monkeypatch, tmp_path)
    key, choices = json.loads((tmp_path / "key.json").read_text()), tmp_path / "choices.txt"
    lines = []
    for part in key["sheets"]:
        listed = (tmp_path / f"names-{part['sheet']}.txt").read_text().splitlines()
        numbers = {name: number for number, _, name in (line.partition(" ") for line in listed)}
        image = Image.open(tmp_path / f"sheet-{part['sheet']}.png")
        cell = (image.width - 12) // 6
        shades = [image.getpixel((14 + 0 * cell, 14)), image.getpixel((14 + cell, 14))]
        assert [f"name {shade[0]}" for shade in shades if isinstance(shade, tuple)] == part["names"][:2]
        wrong = 6 if part["kind"] == by_eye.NEW else 0
        for picture, name in enumerate(part["names"], 1):
            other = part["names"][(picture + 1) % 24]
            lines.append(f"{part['sheet']} {picture} {numbers[other if picture <= wrong else name]}")
    choices.write_text("\n".join(lines))
    page = tmp_path / "page.json"
    run(by_eye, monkeypatch, tmp_path, "--choices", choices, "--judge", "a test", "--write", page)
    (table,) = json.loads(page.read_text())
    assert [row[1:3] for row in table["rows"]] == [["48", "48"], ["24", "18"], ["24", "24"]]
    assert table["rows"][1][3] == "75.0% (55.1 to 88.0)"
    told = json.loads((tmp_path / by_eye.CHOICES).read_text())
    assert by_eye.rows(told["items"]) == table["rows"] and told["judge"] == "a test"
    for faulty, message in (
        (lines[1:], "has no name of picture"),
        ([*lines, "9 1 1"], "97 choices"),
        (["1 a 2"], "no ch"),
    ):
        choices.write_text("\n".join(faulty))
        with pytest.raises(SystemExit, match=message):
            run(by_eye, monkeypatch, tmp_path, "--choices", choices, "--judge", "a test")


def test_the_page_has_the_choices_that_were_made(by_eye: ModuleType) -> None:
    told = json.loads((DATA / by_eye.CHOICES).read_text(encoding="utf-8"))
    page = {table["section"]: table for table in json.loads((DATA / "text_and_pictures.json").read_text("utf-8"))}
    assert by_eye.rows(told["items"]) == page[by_eye.SECTION]["rows"]
    learned = {item["name"] for item in told["items"] if item["kind"] == by_eye.LEARNED}
    new = {item["name"] for item in told["items"] if item["kind"] == by_eye.NEW}
    assert (len(learned), len(new)) == (48, 24) and not learned & new
