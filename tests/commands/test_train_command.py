"""`keifu train` around the loop: what is refused before any work, what --resume takes from the folder and --replace
removes, and what a stop and an error leave."""

import json
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from keifu import cli
from keifu.data.text.held_out import passages
from keifu.errors import UserError
from keifu.recipes import resuming
from keifu.recipes.language import characters, gpt
from keifu.recipes.language.pretraining import Text, TextOptions, prepare_text
from keifu.recipes.neurons import mlp, perceptron
from keifu.training.run import checkpoint, metrics, run_directory

TABLE = "x,y,z,kind\n" + "".join(f"{n},{-n},{n % 3},{n % 2}\n" for n in range(20))
WORDS = ("mlp", "--data", "rows.csv", "--hidden", "3")


def go(*words: str) -> None:
    cli.parse(["train", *words])()


@pytest.fixture(autouse=True)
def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a table of three columns, too many to draw, in the folder in which the commands run."""
    (tmp_path / "rows.csv").write_text(TABLE)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Train a run of 6 steps and return its folder."""
    go(*WORDS, "--steps", "6", "--out", str(tmp_path / "run"))
    return tmp_path / "run"


def test_the_folder_names_the_recipe_and_every_option(out: Path) -> None:
    record = run_directory.recorded(out)
    assert record["name"] == "mlp" and record["options"]["hidden"] == [3] and record["options"]["steps"] == 6
    assert record["options"].keys() >= {"activation", "dropout", "seed", "tensorboard"}


@pytest.mark.parametrize("form", ["--resume {out}", "--resume={out}", "mlp --resume {out}", "mlp --out {out} --resume",
                                  "mlp --out={out} --resume", "--steps 12 --resume {out}"])  # fmt: skip
def test_every_form_of_resume_takes_the_options_of_the_folder(out: Path, form: str) -> None:
    go(*form.format(out=out).split())
    assert checkpoint.steps(out)[-1] == (12 if "--steps" in form else 6)
    assert run_directory.read_recipe(out)["options"]["hidden"] == [3]


def test_options_that_may_not_change_are_refused_by_name(out: Path) -> None:
    with pytest.raises(UserError, match=r"these differ: --activation relu → tanh, --hidden 3 → 4 5; leave them out"):
        go("--resume", str(out), "--hidden", "4", "5", "--activation", "tanh")
    go("--resume", str(out), "--hidden", "3")  # the same value is no change
    with pytest.raises(UserError, match="holds a run of keifu train mlp, not of gpt"):
        go("gpt", "--out", str(out), "--resume")


@dataclass(frozen=True)
class Fixed:
    """A recipe of one's own in which nothing may change."""

    width: int = 3


def test_where_nothing_may_change_nothing_is_listed() -> None:
    with pytest.raises(UserError, match=r"--width 3 → 4; leave them out, or start a new run in another folder\.$"):
        resuming._check(resuming.StoredRun("own", Fixed()), Fixed(4))


def test_a_run_is_made_longer_and_shorter_and_stays_so(out: Path, capsys: pytest.CaptureFixture) -> None:
    go("--resume", str(out), "--steps", "12")
    assert "from 6 to 12 steps" in capsys.readouterr().err
    go("--resume", str(out))
    assert checkpoint.steps(out)[-1] == 12 and run_directory.recorded(out)["options"]["steps"] == 6
    with pytest.raises(UserError, match="12 steps are done, so the run cannot end at step 11"):
        go("--resume", str(out), "--steps", "11")
    assert run_directory.recorded(out)["steps"] == 12  # a refusal changes nothing


def test_what_may_change_is_kept_unless_the_run_cannot_go_on_so(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("tensorboard is missing")

    before = run_directory.read_recipe(out)
    monkeypatch.setattr(metrics, "sinks", missing)
    with pytest.raises(UserError, match="is missing"):
        go("--resume", str(out), "--tensorboard", "--steps", "12")
    assert run_directory.read_recipe(out) == before
    monkeypatch.setattr(metrics, "sinks", lambda *_: [])
    go("--resume", str(out), "--tensorboard", "--steps", "12")
    assert run_directory.recorded(out)["options"]["tensorboard"] and run_directory.recorded(out)["steps"] == 12


def test_there_must_be_a_run(tmp_path: Path) -> None:
    for words in (["--resume", str(tmp_path)], ["mlp", "--resume", str(tmp_path)]):
        with pytest.raises(UserError, match="There is no run in .*: it has no recipe.json"):
            go(*words)
    with pytest.raises(UserError, match="--resume goes on with a run and --replace starts over"):
        go("mlp", "--out", str(tmp_path), "--resume", "--replace")


@pytest.mark.parametrize("words", [["--resume"], ["--out"], ["--steps", "5"]])
def test_an_option_alone_is_no_recipe(words: list[str]) -> None:
    with pytest.raises(UserError, match=f"A recipe comes first, or --resume FOLDER, and {words[0]} is neither"):
        go(*words)


def test_a_folder_that_holds_a_run_is_refused_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "jobs", lambda _: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=r"already holds a run, saved at step 6: .*--resume .*--replace"):
        go("characters", "--data", "no-such-text", "--out", str(out))


def test_a_folder_that_holds_a_model_of_no_run_is_refused(out: Path) -> None:
    (out / "recipe.json").unlink()
    (out / "state").rename(out.parent / "state")
    with pytest.raises(UserError, match="run holds a model of no run: name another --out, or write over it"):
        go(*WORDS, "--steps", "6", "--out", str(out))
    go(*WORDS, "--steps", "6", "--out", str(out), "--replace")


def test_a_part_of_a_run_counts_too(out: Path) -> None:
    with pytest.raises(UserError, match="already holds a run, saved at step 6"):
        go(*WORDS, "--out", str(out.parent))


def test_replace_starts_over_and_an_error_before_the_first_state_puts_the_old_run_back(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError):
        go("mlp", "--data", "rows.csv", "--activation", "wrong", "--out", str(out), "--replace")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    go(*WORDS, "--steps", "4", "--out", str(out), "--replace")
    assert checkpoint.steps(out) == [4] and (out / "notes.txt").exists() and not (out / run_directory.BEFORE).exists()


def test_an_error_before_the_first_step_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        go("mlp", "--data", "rows.csv", "--activation", "wrong", "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_stop_before_the_first_step_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "check_learnable", stop)
        with pytest.raises(KeyboardInterrupt, match=f"before a state was saved.*\nkeifu train --resume {tmp_path}"):
            go(*WORDS, "--steps", "6", "--out", str(tmp_path))
    go("--resume", str(tmp_path))
    assert checkpoint.steps(tmp_path) == [6]


def test_names_of_files_are_seen_from_where_the_run_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    go("mlp", "--data", "rows.csv", "--steps", "4", "--out", "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    go("--resume", "../run", "--steps", "8")
    assert checkpoint.steps(tmp_path / "run")[-1] == 8 and Path.cwd() == tmp_path / "elsewhere"


def test_data_that_were_moved_are_told_by_their_new_place_and_no_others_are_taken(out: Path) -> None:
    Path("elsewhere").mkdir()
    Path("rows.csv").rename("elsewhere/moved.csv")
    os.chdir("elsewhere")  # the table's fixture goes back
    with pytest.raises(UserError, match=r"rows\.csv"):
        go("--resume", str(out), "--steps", "12")
    go("--resume", str(out), "--steps", "12", "--data", "moved.csv")
    assert checkpoint.steps(out)[-1] == 12
    os.chdir("..")
    go("--resume", str(out), "--steps", "24")  # the new place is the run's from now on
    Path("other.csv").write_text(TABLE.replace("1,-1,1,1", "1,-1,1,0"))
    with pytest.raises(UserError, match="The data are not those of the run that is resumed"):
        go("--resume", str(out), "--steps", "48", "--data", "other.csv")
    go("--resume", str(out), "--steps", "48")


GPT = "gpt --data mine --depth 1 --vocab-size 270 --context-length 16 --batch-size 4 --out run".split()  # noqa: SIM905


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a folder of English files with a Japanese diary, last by its name."""
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(5):
        (folder / f"log{number}.txt").write_text(f"entry {number} of the log\n" * 700)
    (folder / "nikki.txt").write_text("8月の日記、散歩をした。\n" * 900, "utf-8")
    return folder


def test_the_held_out_part_of_every_file_is_named_before_the_first_step(mine: Path, capsys) -> None:
    go(*GPT, "--steps", "1")
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("Held out"))
    assert "from 6 of 6 files" in line
    assert run_directory.read_recipe(Path("run"))["data"][0]["held out"] == line
    assert line in Path("run/report.html").read_text("utf-8")
    cli.parse(["data", "show", "mine", "--part", "validation"])()
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 6 and "nikki.txt" in shown and "散歩" in shown and "of the log" in shown


def test_a_tokenizer_is_not_learned_from_what_is_held_out(mine: Path) -> None:
    words = ["".join(letters) for letters in product("abcdefgh", repeat=4)]
    (mine / "words.txt").write_text("\n".join(word for word in words for _ in range(2)))
    task = prepare_text(Text("mine", vocab_size=30_000))
    parts = [set(task.tokenizer.decode(ids.tolist()).split()) for ids in (task.shards.tokens, task.shards.validation)]
    unseen, known = set(words) & (parts[1] - parts[0]), task.tokenizer.backend.get_vocab()
    assert len(unseen) > 50 and not unseen & known.keys()
    assert len(set(words) - unseen - known.keys()) <= 2 * len(passages([5 * 2 * len(words)], 0.05))  # at its edges


def test_a_run_of_an_earlier_version_goes_on_with_its_own_split(mine: Path) -> None:
    """Earlier versions held out the end of a short text, and did not write a rule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt.Recipe, "reading", lambda self: {**TextOptions.reading(self), "split": "end"})
        go(*GPT, "--steps", "2")
    record = {name: value for name, value in run_directory.recorded(Path("run")).items() if name != "signature"}
    assert record["options"].pop("split") == "spread"
    run_directory.record(Path("run"), **record)
    go("--resume", "run", "--steps", "8")
    assert "its end" in run_directory.read_recipe(Path("run"))["data"][0]["held out"]


def test_a_run_without_a_loop_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go("perceptron", "--data", "or", "--out", str(tmp_path))
    with pytest.raises(UserError, match="already holds a finished run"):
        go("perceptron", "--out", str(tmp_path))
    asked = []
    monkeypatch.setattr(perceptron, "jobs", lambda recipe: iter(asked.append(recipe.data) or ()))
    go("--resume", str(tmp_path))
    assert asked == ["or"]


def test_a_run_that_does_not_name_its_recipe_is_refused(out: Path) -> None:
    content = json.loads((out / "recipe.json").read_text())
    del content["recipe"]
    (out / "recipe.json").write_text(json.dumps(content))
    for words in (["--resume", str(out)], ["mlp", "--out", str(out), "--resume"]):
        with pytest.raises(UserError, match="does not name its recipe: it was written by a version before 0.2.0"):
            go(*words)


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=f"{os.sep}recipe.json is damaged"):
        go("--resume", str(tmp_path))
