"""The CPU speedrun: what the clock counts, what a track measures, and pages that are those of the results."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/speedrun"
sys.path.insert(0, str(FOLDER))

import keifu_entry  # noqa: E402 # pyright: ignore[reportMissingImports]
import run  # noqa: E402 # pyright: ignore[reportMissingImports] (its folder is no package)
import table  # noqa: E402 # pyright: ignore[reportMissingImports]
import tracks  # noqa: E402 # pyright: ignore[reportMissingImports]

PAGES = {ending: ROOT / f"docs/results/speedrun{ending}.md" for ending in ("", ".ja")}
RESULTS = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(table.RESULTS.glob("*.json"))]


def result(seconds: float, track: str = "characters", entry: str = "keifu", **changed) -> dict:
    """Return a result in the form that `run.py` writes."""
    return {
        "track": track, "entry": entry, "target": 1.9, "quantity": "nats", "reached": True, "steps": 1100,
        "seconds": seconds, "value": 1.8912, "curve": [[1100, seconds, 1.8912]], "seed": 0, "command": "python x.py",
        "commit": "abc", "date": "2026-11-30T01:00:00Z", "hardware": {"processor": "A CPU", "cores": 2, "system": "L"},
        "versions": {"keifu": "1", "torch": "2", "python": "3"}, "load": 0.1,
    } | changed  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that moves only when a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock.now)
    return clock


def race(clock: SimpleNamespace, values: list[float], target: float = 1.0, stop_after: int | None = None) -> dict:
    """Run a race whose steps take 2 seconds each and whose measurements take 100."""

    def steps():
        for number, value in enumerate(values, 1):
            clock.now += 2
            yield number, value

    def measure(task: str, value: float) -> float:
        clock.now += 100
        assert task == "the data"
        return value

    track = tracks.Track("toy", "units", target, lambda: "the data", measure)
    return run.race(track, steps(), "the data", stop_after)


def test_the_clock_stops_at_the_target_and_does_not_count_measurements(clock) -> None:
    found = race(clock, [3.0, 1.00004, 0.5])
    assert found == {"reached": True, "steps": 2, "seconds": 4.0, "value": 1.0, "curve": [(1, 2.0, 3.0), (2, 4.0, 1.0)]}


def test_a_race_can_end_without_the_target(clock) -> None:
    assert not race(clock, [3.0, 2.0])["reached"]
    assert race(clock, [3.0, 2.0, 0.5], stop_after=2)["steps"] == 2
    with pytest.raises(SystemExit, match="ended before anything was measured"):
        race(clock, [])


@pytest.mark.parametrize("length", [3, 4, 5, 9, 100])
def test_every_token_but_the_first_is_predicted_once(length: int) -> None:
    tokens = [0, 2, 1, 1, 0, 2, 2, 1, 0, 1]
    seen = list[int]()

    def logits(rows: torch.Tensor) -> torch.Tensor:
        assert rows.shape[1] <= length
        seen.extend(rows.flatten().tolist())
        return torch.tensor([math.log(0.5), math.log(0.25), math.log(0.25)]).expand(*rows.shape, 3)

    found = tracks.nats(tracks.Predictor(logits, lambda text: [], length), tokens)
    assert found == pytest.approx(-sum(math.log(0.5 if token == 0 else 0.25) for token in tokens[1:]), abs=1e-5)
    assert seen == tokens[:-1]


@pytest.mark.parametrize("width", [1, 2])  # bytes of a token: a uniform prediction has 8 bits for each byte
def test_bits_a_byte_do_not_depend_on_the_tokenizer(width: int) -> None:
    task = tracks.Texts([], ["ああ", "bcde"])
    predictor = tracks.Predictor(
        lambda rows: torch.zeros(*rows.shape, 256**width), lambda text: [0] * (len(text.encode()) // width), 8
    )
    predicted = 10 - width  # the first token is not predicted
    assert tracks.bits_per_byte(task, predictor) == pytest.approx(8 * predicted / 10, abs=1e-4)


def test_equal_digits_are_near_and_others_are_far() -> None:
    generator = torch.Generator().manual_seed(0)
    held_out = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8, generator=generator)
    again = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8, generator=generator)
    task = tracks.Digits(None, held_out)  # pyright: ignore[reportArgumentType] (its training part is not read)
    near, far = (tracks.distance(task, lambda seeds, x=x: x) for x in (again, torch.zeros_like(again)))
    assert abs(near) < 0.01 * far


def test_the_entry_of_keifu_learns_characters_and_gives_the_same_values_again(monkeypatch) -> None:
    every, (_, config, settings) = keifu_entry.EVERY["characters"], keifu_entry.WAYS["keifu"]
    small = replace(config, dim=16, hidden_dim=32, n_layers=1, n_heads=2), replace(settings, batch_size=4)
    monkeypatch.setattr(keifu_entry, "WAYS", {"keifu": (None, *small)})
    monkeypatch.setattr(keifu_entry, "STEPS", {"characters": every})
    task = tracks.Texts(["to be or not to be, that is the question\n" * 20], ["to be or not to be\n" * 10])

    def values() -> list[tuple[int, float]]:
        steps = keifu_entry.characters(task, 1)
        return [(step, tracks.nats_per_character(task, predictor)) for step, predictor in steps]

    (first, begun), (second, ended) = found = values()
    assert (first, second) == (every, 2 * every)
    assert ended < begun < math.log(len(tracks.alphabet(task)))
    assert values() == found


def test_other_data_are_refused() -> None:
    with pytest.raises(SystemExit, match="the track digits have the SHA-256 .*, not bc42"):
        tracks.check("digits", b"other")


def test_runs_of_one_entry_are_one_line() -> None:
    slow = result(20.0, entry="other", seed=3)
    missed = result(1.0, reached=False)
    (made,) = table.tables(sorted([slow, result(9.0), result(8.0), result(8.2)], key=table.line_of))
    assert [cells[:4] for cells in made["rows"]] == [
        ["keifu, seed 0", "8.2 (9.0, 8.0, 8.2)", "1,100", "1.891"], ["other, seed 3", "20.0", "1,100", "1.891"],
    ]  # fmt: skip
    assert missed not in table.read(table.RESULTS)


def test_a_result_that_missed_the_target_is_not_in_a_table(tmp_path: Path) -> None:
    run.write(result(9.0, reached=False), tmp_path)
    path = run.write(result(8.0, date="2026-11-30T01:02:00Z"), tmp_path)
    assert path.name == "characters-keifu-20261130T010200Z.json"
    assert [each["seconds"] for each in table.read(tmp_path)] == [8.0]


@pytest.mark.parametrize("ending", PAGES)
def test_a_page_without_results_says_so_and_is_filled_again(ending: str) -> None:
    page = PAGES[ending].read_text(encoding="utf-8")
    made = table.tables([result(8.0), result(90.0, "english"), result(70.0, "digits")])
    filled, empty = table.fill(page, made, ending), table.fill(page, [], ending)
    assert filled.count("| keifu, seed 0 |") == 3
    assert empty.count(table.EMPTY[ending]) == 3
    assert table.fill(filled, [], ending) == empty
    assert table.fill(empty, made, ending) == filled


@pytest.mark.parametrize("ending", PAGES)
def test_the_pages_are_those_of_the_results(ending: str) -> None:
    page = PAGES[ending].read_text(encoding="utf-8")
    made = table.tables(table.read())
    assert table.fill(page, made, ending) == page, "python benchmarks/speedrun/table.py renews the pages"
    assert (json.loads(table.DATA.read_text(encoding="utf-8")) if table.DATA.exists() else []) == made


@pytest.mark.parametrize("each", RESULTS, ids=lambda each: f"{each['track']}-{each['entry']}-{each['date']}")
def test_a_result_has_every_field_and_the_target_of_its_track(each: dict) -> None:
    assert {*result(1.0)} == {*each}
    assert {*each["hardware"]} == {"processor", "cores", "system"} and {*each["versions"]} == {
        "keifu",
        "torch",
        "python",
    }
    track = tracks.TRACKS[each["track"]]
    assert (each["target"], each["quantity"]) == (track.target, track.quantity)
    assert each["reached"] == (each["value"] <= track.target)
    assert each["curve"][-1] == [each["steps"], each["seconds"], each["value"]]
    assert not re.search(r"/(work|home|root|Users)/", json.dumps(each))


def test_the_texts_give_the_targets() -> None:
    for path in [*PAGES.values(), FOLDER / "README.md"]:
        text = path.read_text(encoding="utf-8")
        assert all(f"{track.target:g}" in text for track in tracks.TRACKS.values())
