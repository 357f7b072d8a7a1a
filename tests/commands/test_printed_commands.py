"""Commands that are printed can be pasted into a shell, whatever the names in them are."""

import ast
import shlex
from pathlib import Path

import pytest

import keifu
from keifu import cli
from keifu.errors import shell

SOURCE = Path(keifu.__file__).parent
NAME = "runs/灯台 keeper's; echo $HOME"


def test_words_survive_a_shell() -> None:
    assert shlex.split(f"keifu chat {shell(Path(NAME), 'a b')}") == ["keifu", "chat", NAME, "a b"]


def test_a_trained_model_is_named_as_a_shell_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = "text,label\n" + "".join(
        f"{'good' if n % 2 else 'bad'} {n},{'yes' if n % 2 else 'no'}\n" for n in range(40)
    )
    (tmp_path / "table.csv").write_text(table)
    words = "train classifier --data table.csv --steps 1 --model scratch --tokenizer wordpiece --size.vocab-size 60"
    words += " --size.context-length 16 --size.dim 8 --size.hidden-dim 16 --size.n-layers 1 --size.n-heads 2"
    cli.main([*words.split(), "--out", "runs/my keeper"])
    printed = capsys.readouterr().out
    [command] = [line.partition(": ")[2] for line in printed.splitlines() if line.startswith("The model is in")]
    assert shlex.split(command)[:3] == ["keifu", "classify", "runs/my keeper"]


def plain_names(path: Path) -> list[str]:
    """Return the f-strings of a file that print a command with an unquoted name or path."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                before += str(part.value)
            elif "keifu " in before and isinstance(part, ast.FormattedValue):
                command = before.rpartition("keifu ")[2]
                text = ast.unparse(part.value)
                if command.split(" ")[0] in cli.COMMANDS and text.split(".")[-1] in (
                    "out",
                    "model",
                    "folder",
                    "data",
                    "place",
                ):
                    found.append(f"{path.name}: keifu {command}{{{text}}}")
    return found


def test_names_in_printed_commands_are_quoted() -> None:
    found = [line for path in SOURCE.rglob("*.py") for line in plain_names(path)]
    assert not found


def test_the_search_sees_a_name_that_is_not_quoted(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('print(f"It is in {out}: keifu chat {out}.")\nprint(f"keifu chat {shell(out)}")\n')
    assert plain_names(file) == ["a.py: keifu chat {out}"]
