"""The folder of a run by itself: whose it is, how it is gone on with, what a new run takes away, and what comes back.

States, metrics and samples are files of one word here: nothing is trained.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from keifu.errors import UserError
from keifu.files import sha256
from keifu.training.protocols import Run
from keifu.training.run import checkpoint, run_directory


def fill(folder: Path, word: str, *states: int, finished: bool = False) -> None:
    """Write what a run of three kinds of files has, with the user's notes beside them."""
    for name in ("metrics.jsonl", "samples/step-00000001.txt", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(word)
    (folder / "state").mkdir()
    for step in states:
        (folder / f"state/step-{step:08d}.json").write_text(word)
    content: dict[str, Any] = {"recipe": {"name": "gpt", "options": {"word": word}}, "title": word}
    run_directory.write(folder, content | {"finished": True} if finished else content)


def words(folder: Path) -> dict[str, str]:
    """Return the content of all files, by their path; of recipe.json the word."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path.read_text() for name, path in files.items()}
    return {
        n: json.loads(text)["recipe"]["options"]["word"] if "recipe.json" in n else text for n, text in found.items()
    }


def test_a_folder_with_a_run_is_refused_and_says_its_last_step_and_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    fill(out, "old", 3, 1200, 40)
    with pytest.raises(UserError) as caught:
        run_directory.claim_directory(Run(out))
    assert str(caught.value) == (
        f"{out} already holds a run, saved at step 1,200: go on with it (keifu train --resume '{out}'), "
        "or choose another folder."
    )
    run_directory.claim_directory(Run(out, resume=True))
    assert len(words(out)) == 7, "a resumed run removes nothing"


@pytest.mark.parametrize(("replace", "kept"), [(True, {"notes.txt"}), (False, {"notes.txt", "recipe.json"})])
def test_a_new_run_removes_what_another_wrote_and_keeps_its_own_record(
    replace: bool, kept: set[str], tmp_path: Path
) -> None:
    """Without a state the record belongs to this run, which was killed early; a replaced run's is gone."""
    fill(tmp_path, "old", *([3] if replace else []))
    run_directory.claim_directory(Run(tmp_path, replace=replace))
    assert words(tmp_path).keys() == kept
    if not replace:
        assert run_directory.read_recipe(tmp_path).keys() == {"recipe"}
    run_directory.record(tmp_path, "gpt", {"word": "new"})
    run_directory.claim_directory(Run(tmp_path, replace=replace))
    assert run_directory.recorded(tmp_path)["options"] == {"word": "new"}, "a record alone is this run's"


def test_a_free_folder_has_neither_a_state_nor_an_end(tmp_path: Path) -> None:
    run_directory.check_free(tmp_path / "new")
    fill(tmp_path / "early", "x")
    run_directory.check_free(tmp_path / "early")
    fill(tmp_path / "part", "x")
    fill(tmp_path / "part/one", "x", 1500)
    fill(tmp_path / "part/two", "x", 20, 300)
    fill(tmp_path / "done", "x", finished=True)
    assert run_directory.last_step(tmp_path / "part") == 1500
    for name, holds in {"part": "a run, saved at step 1,500", "done": "a finished run"}.items():
        out = tmp_path / name
        with pytest.raises(UserError) as caught:
            run_directory.check_free(out)
        ways = f"go on with it (keifu train --resume {out}), start over with --replace, or choose another folder"
        assert str(caught.value) == f"{out} already holds {holds}: {ways} with --out."


def test_the_command_that_goes_on_names_the_users_code(tmp_path: Path) -> None:
    out, part = tmp_path / "run", tmp_path / "run/sft"
    part.mkdir(parents=True)
    assert run_directory.how_to_resume(Run(part)) == (
        f"the same call of keifu.train with out={str(part)!r} and resume=True"
    )
    run_directory.record(out, "my recipe.py", {}, named={"reward": "'a b.py' c.py", "data.tool": "x"})
    command = f"keifu train 'my recipe.py' --resume {out} --reward 'a b.py' c.py --data.tool x"
    assert run_directory.command(out) == run_directory.how_to_resume(Run(part)) == command
    run_directory.record(part, "gpt", {})
    assert run_directory.how_to_resume(Run(part)) == f"keifu train --resume {part}"


@pytest.mark.parametrize(
    "record",
    [
        "gpt", {"options": {}}, {"name": "gpt"}, {"name": 3, "options": {}}, {"name": "gpt", "options": []},
        {"name": "gpt", "options": {}, "steps": "3"}, {"name": "gpt", "options": {}, "place": 3},
        {"name": "gpt\x1b[2J", "options": {}}, {"name": "a\nb", "options": {}},
        {"name": "gpt", "options": {}, "named": {"a b": "x"}}, {"name": "gpt", "options": {}, "named": {"a": 3}},
        {"name": "gpt", "options": {}, "named": {"a": "'x"}}, {"name": "gpt", "options": {}, "named": {"a": "x\x07"}},
        {"name": "gpt", "options": {}, "named": {"a": "x\x07", "b": "c"}},
        {"name": "gpt", "options": {}, "named": ["a"]},
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"recipe": record}))
    with pytest.raises(UserError) as caught:
        run_directory.read_recipe(tmp_path)
    reason = "its recipe lacks a name, or options"
    assert str(caught.value) == f"{path} is damaged ({reason}). Start again with --replace."
    path.write_text("{")
    with pytest.raises(UserError, match=r"recipe.json is damaged \(.*\). Start the run again with --replace.$"):
        run_directory.read_recipe(tmp_path)


@pytest.mark.parametrize("saved", [False, True])
def test_a_replaced_run_comes_back_unless_the_new_one_has_a_state(saved: bool, tmp_path: Path) -> None:
    """With a part of its own; the user's notes stay in their place all the time."""
    fill(tmp_path, "old", 3, 5)
    fill(tmp_path / "sft", "old part", 7)
    before = words(tmp_path)
    with pytest.raises(ZeroDivisionError), run_directory.replaced(tmp_path):
        assert {*words(tmp_path)} - {name for name in words(tmp_path) if name[0] == "."} == {
            "notes.txt",
            "sft/notes.txt",
        }
        run_directory.record(tmp_path, "gpt", {"word": "new"})
        (tmp_path / "metrics.jsonl").write_text("new")
        (tmp_path / "state").mkdir()
        (tmp_path / f"state/step-00000001.{'json' if saved else 'part'}").write_text("new")
        1 / 0  # noqa: B018
    assert not [path.name for path in tmp_path.iterdir() if path.name[0] == "."]
    if not saved:
        assert words(tmp_path) == before
        return
    new = dict.fromkeys(("recipe.json", "metrics.jsonl", "state/step-00000001.json"), "new")
    assert words(tmp_path) == {"notes.txt": "old", "sft/notes.txt": "old part", **new}


def test_a_run_that_replaces_nothing_leaves_nothing(tmp_path: Path) -> None:
    with run_directory.replaced(tmp_path):
        (tmp_path / "x").write_text("x")
    assert words(tmp_path) == {"x": "x"} and len([*tmp_path.iterdir()]) == 1


def test_a_record_alone_is_forgotten_or_closed(tmp_path: Path) -> None:
    for folder in (tmp_path / "alone", tmp_path / "notes", tmp_path / "closed"):
        folder.mkdir()
        run_directory.record(folder, "gpt", {})
    (tmp_path / "notes/x").write_text("x")
    run_directory.close(tmp_path / "closed")
    assert run_directory.read_recipe(tmp_path / "closed")["finished"] is True
    fill(tmp_path / "trained", "x")
    run_directory.close(tmp_path / "trained")
    assert "finished" not in run_directory.read_recipe(tmp_path / "trained"), "the loop says that itself"
    for name in ("alone", "notes", "closed", "trained"):
        run_directory.forget(tmp_path / name)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/[rx]*")} == {
        "notes/x", "closed/recipe.json", "trained/recipe.json",
    }  # fmt: skip
    assert not (tmp_path / "alone").exists()


def test_a_folder_that_was_taken_away_gets_its_record_again(tmp_path: Path) -> None:
    run_directory.restore(tmp_path / "a/b", {"name": "gpt", "options": {"x": 1}})
    assert run_directory.recorded(tmp_path / "a/b") == {"name": "gpt", "options": {"x": 1}}
    run_directory.restore(tmp_path / "c", {})
    assert [*(tmp_path / "c").iterdir()] == []


def test_recipe_json_keeps_its_record_and_gets_the_steps_of_the_whole_run(tmp_path: Path) -> None:
    out = tmp_path / "東京"
    run_directory.restore(out, {"name": "gpt", "options": {"x": 1}, "steps": 10})
    run = Run(out, options={"dim": 8}, about={"paper": "A paper"})
    run_directory.write_recipe(run, {"finished": False, "path": Path("x")}, 25)
    content = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    assert content.pop("versions").keys() >= {"python", "torch", "numpy", "system", "processor"}
    assert content == {
        "title": "東京", "paper": "A paper", "options": {"dim": 8}, "finished": False, "path": "x",
        "recipe": {"name": "gpt", "options": {"x": 1}, "steps": 25},
    }  # fmt: skip
    assert "東京" in (out / "recipe.json").read_text(encoding="utf-8"), "as it is written"
    run_directory.restore(out, {"name": "gpt", "options": {}})
    run_directory.write_recipe(run, {}, 25)
    assert "steps" not in run_directory.recorded(out), "steps that nobody changed are the option's"
    run_directory.write_recipe(Run(tmp_path), {}, 25)
    assert "recipe" not in run_directory.read_recipe(tmp_path), "a run of the Python interface has no record"
    assert run_directory.versions()["numpy"] == np.__version__


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_run_keeps_the_tokenizers_that_it_learned(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    learned: dict[str, Any] = {"a": SimpleNamespace(save=saved.append), "b": SimpleNamespace(save=saved.append)}
    monkeypatch.setattr(run_directory, "LEARNED", learned)
    run_directory.keep_tokenizers(Run(tmp_path, resume=resume))
    assert saved == ([] if resume else [tmp_path / run_directory.KEPT / name for name in "ab"]) and learned == {}


def test_a_stop_reads_no_state_again_for_its_hash(tmp_path: Path, monkeypatch) -> None:
    checkpoint.save(tmp_path, 3, {"model.x": torch.ones(4)}, {}, lambda step: None)
    checkpoint.keep_best(tmp_path, nn.Linear(2, 2), checkpoint.Best(3, {"validation_loss": 1.0}))
    (tmp_path / "model.safetensors").write_text("weights")
    contents = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    read = list[str]()
    monkeypatch.setattr(run_directory, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    assert run_directory.hashes(tmp_path) == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }
    assert read == ["model.safetensors"] and len(contents) == 3


def test_samples_and_hashes_are_named_by_step_and_path(tmp_path: Path) -> None:
    run_directory.write_sample(tmp_path, 12, "a text")
    run_directory.write_sample(tmp_path, 12, b"a picture")
    names = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    assert names == {"step-00000012.txt": b"a text", "step-00000012.png": b"a picture"}
    for name in ("b.safetensors", "a/x.safetensors", "a/b/deep.safetensors", "a/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a/x.safetensors", "b.safetensors")}
    assert run_directory.hashes(tmp_path) == expected and [*run_directory.hashes(tmp_path)] == [*expected]
