"""Cells of the results that follow from raw values of three kinds: seeds, counts of right answers, single runs."""

import json
import re
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from keifu.evaluation.intervals import wilson

DATA = Path(__file__).parents[2] / "docs/results/data"
LISTS = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(DATA.glob("*.json"))]
TABLES = [table for tables in LISTS if isinstance(tables, list) for table in tables if "columns" in table]
INTERVAL = re.compile(r"\(-?[\d,.]+%? to -?[\d,.]+%?\)")
SHARE = re.compile(r"[\d.]+% \([\d.]+ to [\d.]+\)")


def of_kind(key: str) -> list[Any]:
    found = [each for each in TABLES if isinstance(each["values"], dict) and key in each["values"]]
    return [pytest.param(each, id=each["section"]) for each in found]


@pytest.mark.parametrize("table", of_kind("form"))
def test_cells_are_the_means_and_ranges_of_the_seeds(table: dict[str, Any]) -> None:
    found, form = table["values"]["seeds"], table["values"]["form"]
    assert [*found] == [row[0] for row in table["rows"]]
    asked = re.search(r"--seeds((?: \d+)+)", table["command"])
    count = len(asked[1].split()) if asked else 3
    for name, *cells in table["rows"]:
        own = [f"{mean(seeds):{form}} ({min(seeds):{form}} to {max(seeds):{form}})" for seeds in found[name]]
        assert cells[len(cells) - len(own) :] == own
        assert {len(seeds) for seeds in found[name]} == {count}


def share(right: int, total: int) -> str:
    low, high = wilson(right, total)
    return f"{right / total:.1%} ({100 * low:.1f} to {100 * high:.1f})"


@pytest.mark.parametrize("table", of_kind("right"))
def test_shares_are_those_of_the_counts(table: dict[str, Any]) -> None:
    right, total = table["values"]["right"], table["values"]["of"]
    totals: dict[str, int] = total if isinstance(total, dict) else {name: total for name in right}
    for name, *cells in table["rows"]:
        if name in right:
            printed = [found for cell in cells for found in SHARE.findall(cell)]
            assert printed == [share(count, totals[name]) for count in right[name]]


@pytest.mark.parametrize("table", of_kind("runs"))
def test_a_single_run_has_no_interval(table: dict[str, Any]) -> None:
    assert table["values"]["runs"] == 1
    assert not [cell for row in table["rows"] for cell in row if INTERVAL.search(cell)]


def of_section(section: str, column: str = "") -> dict[str, Any]:
    (table,) = [each for each in TABLES if each["section"] == section and column in ("", *each["columns"])]
    return table


@pytest.mark.parametrize(
    ("section", "column"),
    [
        ("The demonstration", "validation loss, nats per token"),
        ("PaLM's layer and optimizer: learning", "held-out loss"),
    ],
)
def test_bits_a_byte_are_one_multiple_of_the_loss(section: str, column: str) -> None:
    table = of_section(section, column)
    places = table["columns"].index(column), table["columns"].index("bits per byte")
    pairs = [[float(row[place]) for place in places] for row in table["rows"]]
    bytes_a_token = mean(loss / bits for loss, bits in pairs)
    assert [f"{loss / bytes_a_token:.2f}" for loss, _ in pairs] == [f"{bits:.2f}" for _, bits in pairs]


def test_perplexities_give_their_change() -> None:
    table = of_section("A new behaviour for SmolLM2 by LoRA")
    before, after = table["values"]["perplexity"].values()
    assert [row[3] for row in table["rows"]] == [f"{before}", f"{after} ({after / before - 1:+.1%})"]


def test_the_law_follows_from_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(DATA.parents[2] / "benchmarks")
    scaling = import_module("scaling")
    table, predicted = (of_section("Loss and size", column) for column in ("parameters", "measured"))
    number = [[float(cell.replace(",", "")) for cell in row[1:5]] for row in table["rows"]]
    tokens = [float(column.split()[0].replace(",", "")) for column in table["columns"][2:5]]
    points = [(row[0], each, loss) for row in number for each, loss in zip(tokens, row[1:], strict=True)]
    sizes, seen, losses = np.array(points).T
    fitted = [row[0] for row in table["rows"]].index(predicted["columns"][0].split(",")[0]) * len(tokens)
    start = tuple(predicted["values"]["law"].values())
    known = sizes[:fitted], seen[:fitted], np.log(losses[:fitted])
    law = scaling.fitted(*known, [start, *scaling.STARTS[:2]])
    asked = [scaling.Point("", *each, 0.0) for each in points[fitted:]]
    monkeypatch.setattr(scaling, "DRAWS", 16)
    drawn = scaling.predictions(law, *known, asked)
    computed = np.exp(law.log_loss(sizes[fitted:], seen[fitted:]))
    assert [row[2] for row in predicted["rows"]] == [f"{loss:.3f}" for loss in losses[fitted:]]
    for row, loss, draws in zip(predicted["rows"], computed, drawn.T, strict=True):
        middle, low, high = map(float, re.findall(r"[\d.]+", row[1]))
        assert middle == pytest.approx(loss, abs=0.0006)
        assert np.quantile(draws, (0.025, 0.975)) == pytest.approx((low, high), abs=0.04)  # of fewer draws
