"""Killed at any file operation or moment and gone on with, a run leaves every file as one that was never killed.

KEIFU_KILLS says how many kills of each recipe the slow test makes, KEIFU_FIRST_RUN the number (the seed) of its first
run; what came of them stands in docs/reliability.md.
"""

import itertools
import os
import random
import shlex
import shutil
from collections import Counter
from difflib import unified_diff
from pathlib import Path

import killing
import pytest
from test_resuming_recipes import CLIP, TABLE

KILLS = int(os.environ.get("KEIFU_KILLS", "6"))
FIRST = int(os.environ.get("KEIFU_FIRST_RUN", "0"))
RECIPES = ("gpt", "sft", "ppo", "grpo", "ddpm", "latent-diffusion", "clip", "transformer")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def words(files: dict[str, Path], models: dict[str, Path], drawings: Path, request: pytest.FixtureRequest) -> list[str]:
    """Return the command of a recipe without its folder."""
    name = request.node.callspec.params["name"]
    options = TABLE[name][0]
    given = {**files, **models, "drawings": drawings, "clip": CLIP, "prompt": "'a red disc'"}
    given |= {"towers": request.getfixturevalue("towers")} if "{towers}" in options else {}
    return ["train", name, *shlex.split(options.format(**given))]


def kill(words: list[str], whole: Path, operations: int, seconds: float, number: int, folder: Path) -> tuple[int, str]:
    """Kill a run twice, by turns at a file operation and at a moment; how often it died, and what came of it."""
    choice = random.Random(number)
    out = folder / str(number) / "run"
    out.parent.mkdir()
    begun = [*words, "--out", str(out)]
    died = 0
    for _ in range(2):
        going_on = ["train", "--resume", str(out)] if (out / "recipe.json").exists() else begun
        if number % 2:
            code = killing.run(going_on, out, at=choice.randint(1, operations))
        else:
            code = killing.run(going_on, out, seconds=choice.random() * seconds)
        assert code in (0, -9), (out.parent / "output").read_text()[-2000:]
        if code == 0:
            break
        died += 1
    if not died:
        return 0, "ended before the kill"
    killing.to_the_end(begun, out)
    left, expected = killing.files(out), killing.files(whole)
    differing = sorted(name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name))
    for name in differing:
        if name.endswith((".json", ".jsonl")):
            texts = [path.read_text() if path.exists() else "no file" for path in (whole / name, out / name)]
            changes = unified_diff(*(text.splitlines() for text in texts), n=0, lineterm="")
            print(f"kill {number}, {name}:", *list(changes)[2:12], sep="\n")
    shutil.rmtree(out.parent)
    return died, f"{', '.join(differing)} differ" if differing else "the same files"


def outcomes(words: list[str], folder: Path, kills: int, first: int = 0) -> tuple[int, Counter[str]]:
    """Kill runs, at least `kills` of them, and return the number of kills and how often each outcome came."""
    whole = folder / "whole" / "run"
    whole.parent.mkdir()
    killing.run(["--version"], whole)  # the first process waits for the imports of the one that it is forked from
    seconds = killing.timed([*words, "--out", str(whole)], whole)
    operations, made, found = killing.operations(whole), 0, Counter[str]()
    for number in itertools.count(first):
        died, outcome = kill(words, whole, operations, seconds, number, folder)
        made, found = made + died, found + Counter([outcome])
        if made >= kills or found["ended before the kill"] > kills:
            return made, found
    raise AssertionError("numbers do not end")


@pytest.mark.parametrize("name", ["gpt"])
def test_two_kills_leave_no_trace(name: str, words: list[str], tmp_path: Path) -> None:
    made, found = outcomes(words, tmp_path, 2)
    assert made >= 2
    assert found.keys() <= {"the same files", "ended before the kill"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_many_kills_leave_no_trace(name: str, words: list[str], tmp_path: Path) -> None:
    made, found = outcomes(words, tmp_path, KILLS, FIRST)
    print(f"{name}: {made} kills from run {FIRST} on: {dict(found)}")
    assert made >= KILLS
    assert found.keys() <= {"the same files", "ended before the kill"}
