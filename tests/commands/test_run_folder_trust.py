"""A run's folder executes no code and chooses no path: both count only if the command line names them."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from keifu import cli
from keifu.alignment import rewards
from keifu.errors import UserError
from keifu.files import sha256
from keifu.recipes.assistant import grpo
from keifu.recipes.neurons import mlp
from keifu.recipes.options import to_json
from keifu.training.run import checkpoint, run_directory, signature

MARK = "from pathlib import Path\nPath({marker!r}).write_text('executed')\n"
RECIPE = '''"""Mine."""
from dataclasses import dataclass
from keifu.training.job import Computation

@dataclass
class Recipe:
    """Options."""
    size: int = 2
    """Size."""

def jobs(recipe):
    yield Computation(lambda out: print("size", recipe.size, "in", out.name))
'''
SCORE = "def f(prompt, answer, example):\n    return 1.0\n"


def go(*words: str) -> None:
    cli.parse(["train", *words])()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KEIFU_CONFIG", str(tmp_path / "config"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Write a script to the run's folder, and return the path of the marker that any execution of it writes."""
    (tmp_path / "evil").mkdir()
    marker = tmp_path / "marker"
    (tmp_path / "evil" / "notes.py").write_text(MARK.format(marker=str(marker)) + RECIPE + SCORE)
    return marker


def folder(name: str, options: dict[str, Any], **more: Any) -> Path:
    """Return a run's folder as another person would give it."""
    record = {"name": name, "options": options, **more}
    Path("evil").mkdir(exist_ok=True)
    Path("evil/recipe.json").write_text(json.dumps({"recipe": record}))
    return Path("evil")


@pytest.mark.parametrize(
    "words", ["--resume evil", "--resume=evil", "--out evil", "--out evil --resume", "--steps 3 --resume evil"]
)
@pytest.mark.parametrize("name", ["evil/notes.py", "{absolute}"])
def test_a_folder_names_a_recipe_file_and_it_is_not_executed(marker: Path, words: str, name: str) -> None:
    name = name.format(absolute=Path("evil/notes.py").resolve())
    folder(name, {})
    with pytest.raises(UserError, match="a folder never starts code by itself"):
        go(*words.split())
    for recipe in ("mlp", "grpo"):
        with pytest.raises(UserError, match="holds a run of keifu train"):
            go(recipe, "--resume", "evil")
    assert not marker.exists()


@pytest.mark.parametrize("option", ["reward", "measured", "value"])
@pytest.mark.parametrize("place", [".", "evil"])
def test_a_folder_names_a_reward_file_and_it_is_not_executed(marker: Path, option: str, place: str) -> None:
    file = "notes.py:f" if place == "evil" else "evil/notes.py:f"
    recipe, value = ("grpo", file) if option == "reward" else ("ppo", [file] if option == "measured" else file)
    folder(recipe, {option: value}, place=str(Path(place).resolve()))
    for words in (["--resume", "evil"], [recipe, "--resume", "evil"]):
        with pytest.raises(UserError, match=rf"executes the code of \S*notes.py \(--{option}\)"):
            go(*words)
    assert not marker.exists()


def test_a_reward_within_a_step_of_another_recipe_is_not_executed(marker: Path) -> None:
    folder("instruct", {"ppo": {"measured": ["evil/notes.py:f"]}})
    with pytest.raises(UserError, match=r"--ppo.measured\)"):
        go("--resume", "evil")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["evil/notes.txt", "evil/notes.pyc", "evil/notes.so"])
def test_a_reward_is_a_python_file(marker: Path, file: str) -> None:
    Path("evil/notes.py").rename(file)
    with pytest.raises(UserError, match="There is no"):
        go("grpo", "--reward", f"{file}:f", "--model", "nosuch")
    with pytest.raises(UserError, match=r"There is no reward \(or file.py:function\)"):
        rewards.reward(f"{file}:f")
    assert not marker.exists()


def test_an_own_recipe_goes_on_when_its_file_is_named(capsys: pytest.CaptureFixture) -> None:
    Path("notes.py").write_text(RECIPE)
    go("notes.py", "--size", "3", "--out", "run")
    began = capsys.readouterr()
    assert "size 3 in run" in began.out and "The code of " in began.err and "(SHA-256 " in began.err
    with pytest.raises(UserError, match=r"name it: keifu train \S+notes.py --resume run") as refused:
        go("--resume", "run")
    assert sha256(Path("notes.py"))[:12] in str(refused.value)
    go("notes.py", "--resume", "run")
    assert "size 3 in run" in capsys.readouterr().out
    Path("notes.py").rename("moved.py")
    go("moved.py", "--resume", "run")
    assert "when the run began" not in capsys.readouterr().err
    Path("moved.py").write_text(RECIPE + "# changed\n")
    go("moved.py", "--resume", "run")
    assert "when the run began: other code is used from now on" in capsys.readouterr().err


def test_another_file_than_the_run_began_with_is_refused() -> None:
    Path("notes.py").write_text(RECIPE)
    go("notes.py", "--out", "run")
    Path("other.py").write_text(RECIPE + "# other\n")
    with pytest.raises(UserError, match="holds a run of keifu train"):
        go("other.py", "--resume", "run")


def test_the_command_that_goes_on_names_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    Path("my score.py").write_text(SCORE)
    monkeypatch.setattr(grpo, "jobs", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        go("grpo", "--reward", "my score.py:f", "--out", "run")
    command = str(stopped.value).splitlines()[-1]
    assert shlex.split(command) == ["keifu", "train", "--resume", "run", "--reward", "my score.py:f"]
    with pytest.raises(UserError, match="executes the code of my score.py"):
        go("--resume", "run")
    with pytest.raises(KeyboardInterrupt):
        go(*shlex.split(command)[2:])


def strangers_table(tmp_path: Path) -> Path:
    """Return another person's run that reads a file outside of its folder."""
    rows = "".join(f"{n},{-n},{n % 3},{n % 2}\n" for n in range(20))  # three columns: no picture is drawn
    (tmp_path / "mine.csv").write_text(f"x,y,z,kind\n{rows}")
    options = to_json(mlp.Recipe()) | {"steps": 4, "hidden": [3]}
    return folder("mlp", options | {"data": "mine.csv"}, place=str(tmp_path))


def test_a_strangers_folder_reads_no_file_that_the_user_does_not_name(tmp_path: Path, monkeypatch) -> None:
    out = strangers_table(tmp_path)
    with pytest.raises(UserError, match=r"was not begun by you .* name mine.csv.*--resume evil --data mine.csv"):
        go("--resume", str(out))
    go("--resume", str(out), "--data", "mine.csv")
    assert checkpoint.steps(out) == [4]
    go("--resume", str(out), "--steps", "12")  # it is this user's run from now on
    assert checkpoint.steps(out)[-1] == 12


@pytest.mark.parametrize("data", ["~/mine.csv", "{folder}/*.csv", "{folder}/**/min?.csv", " mine.csv", "x, ~/mine.csv"])
def test_a_strangers_path_is_seen_as_the_readers_understand_it(tmp_path: Path, monkeypatch, data: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    strangers_table(tmp_path)
    options = to_json(mlp.Recipe()) | {"steps": 4, "hidden": [3], "data": data.format(folder=tmp_path)}
    out = folder("mlp", options, place=str(tmp_path))
    with pytest.raises(UserError, match="was not begun by you on this machine"):
        go("--resume", str(out))
    assert not checkpoint.steps(out) and not (out / "samples").exists()


EVIL = "x; touch PWNED #"


@pytest.mark.parametrize("words", [["mlp", "--out", "evil"], ["ddpm", "--resume", "evil"]])
def test_an_advised_command_is_quoted(tmp_path: Path, words: list[str]) -> None:
    folder("mlp", to_json(mlp.Recipe()), named={"reward": EVIL})
    content = json.loads(Path("evil/recipe.json").read_text())
    Path("evil/recipe.json").write_text(json.dumps(content | {"finished": True}))
    with pytest.raises(UserError) as refused:
        go(*words)
    command = re.search(r"keifu train --resume.*?(?=\), | or choose|, or)", str(refused.value))
    assert command
    assert shlex.split(command[0]) == ["keifu", "train", "--resume", "evil", "--reward", "x;", "touch", "PWNED", "#"]
    subprocess.run(command[0].replace("keifu", "true", 1), shell=True, check=True)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"name": "mlp\ntouch PWNED"},
        {"name": "mlp\x1b[2J"},
        {"named": {"a b; touch PWNED": "x"}},
        {"named": {"reward": "'\x1b]0;x\x07'"}},
        {"named": {"reward": "'not closed"}},
        {"named": {"reward": ["x"]}},
    ],
)
def test_names_that_no_command_may_hold_are_refused(record: dict[str, Any]) -> None:
    folder(**({"name": "mlp", "options": to_json(mlp.Recipe())} | record))
    with pytest.raises(UserError, match="recipe.json is damaged"):
        go("mlp", "--resume", "evil")


def test_a_strangers_folder_does_not_choose_where_names_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = strangers_table(tmp_path).resolve()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"mine\.csv"):
        go("--resume", str(out))
    assert not checkpoint.steps(out)


def test_a_signature_holds_for_its_own_record_and_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_directory.record(tmp_path, "mlp", {"data": "a.csv"}, place=str(tmp_path))
    record = run_directory.recorded(tmp_path)
    assert signature.is_signed(record)
    for change in ({"options": {"data": "b.csv"}}, {"place": "/"}, {"name": "gpt"}, {"signature": "0" * 64},
                   {"signature": None}, {"signature": 3}, {"signature": "é"}):  # fmt: skip
        assert not signature.is_signed(record | change)
    assert signature.is_signed(record | {"steps": 9})
    assert (tmp_path / "config" / signature.KEY).stat().st_mode & 0o077 == 0
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "emptied"))
    assert signature.is_signed(record)
    monkeypatch.setenv("KEIFU_CONFIG", str(tmp_path / "other"))
    assert not signature.is_signed(record)


def test_the_key_of_an_earlier_version_is_taken_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / signature.KEY).write_bytes(b"k" * signature.BYTES)
    run_directory.record(tmp_path, "mlp", {"data": "a.csv"}, place=str(tmp_path))
    assert (tmp_path / "config" / signature.KEY).read_bytes() == b"k" * signature.BYTES
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "emptied"))
    assert signature.is_signed(run_directory.recorded(tmp_path))


@pytest.mark.parametrize("kept", [b"", b"short"])
def test_a_damaged_key_or_a_folder_that_cannot_be_written_is_no_crash(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / signature.KEY).write_bytes(kept)
    run_directory.record(tmp_path, "mlp", {"data": "a.csv"}, place=str(tmp_path))
    assert signature.is_signed(run_directory.recorded(tmp_path))
    assert (tmp_path / "cache" / signature.KEY).is_file()
