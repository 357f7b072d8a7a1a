"""The command line as a person meets it: help without torch, one sentence for every mistake, plain text in a pipe."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import tyro

from keifu import cli
from keifu.commands import flags, tables
from keifu.commands.failures import explain
from keifu.errors import UserError

HELPED = [verb for verb in cli.VERBS if verb != "demo"]  # the demonstration's flags are its recipe's
LIGHT = """
import sys
from keifu.cli import main
try:
    main({!r})
except SystemExit as stop:
    assert not stop.code
print("heavy:", *sorted({!r} & sys.modules.keys()))
"""
HEAVY = {"torch", "numpy", "rich", "tokenizers", "matplotlib"}


def in_new_process(code: str) -> subprocess.CompletedProcess:
    keep = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=keep, timeout=60)


def said(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit status and what stands on stderr, which is one line and no traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return stop.value.code, error.strip()


def test_help_lists_every_verb(capsys: pytest.CaptureFixture) -> None:
    cli.main(["--help"])
    assert cli.VERBS.keys() <= set(capsys.readouterr().out.split())


def test_help_imports_nothing_heavy_and_tyro_neither() -> None:
    done = in_new_process(LIGHT.format(["--help"], HEAVY | {"tyro"}))
    assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", "heavy:")


@pytest.mark.parametrize("verb", HELPED)
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    done = in_new_process(LIGHT.format([verb, "--help"], HEAVY))
    assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", "heavy:")
    assert f"keifu {verb}" in done.stdout


def test_importing_keifu_imports_nothing() -> None:
    code = """
import sys
before = set(sys.modules)
import keifu
print(*(name for name in sys.modules.keys() - before if name.split(".")[0] not in sys.stdlib_module_names))
"""
    assert in_new_process(code).stdout.split() == ["keifu"]


def test_python_interface_is_found_lazily() -> None:
    import keifu
    from keifu.checkpoints import load

    assert keifu.load is load
    assert {"load", "save", "generate"} <= set(dir(keifu))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = keifu.laod


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("genrate smollm2", "There is no verb 'genrate'. Did you mean 'generate'?"),
        ("generate smollm2 x --max-token 3", "There is no option '--max-token'. Did you mean '--max-tokens'?"),
        ("generate smollm2 x --max-token=3", "There is no option '--max-token'. Did you mean '--max-tokens'?"),
        ("generate --tempratur 3", "There is no option '--tempratur'. Did you mean '--temperature'?"),
        ("generate", "keifu generate needs MODEL: see keifu generate --help."),
        ("convert --to gguf", "keifu convert needs MODEL and OUT: see keifu convert --help."),
        ("convert a b --to gguff", "Invalid choice 'gguff' for argument '--to'. Expected one of ('hf', 'gguf', 'open_"),
        ("generate smollm2 x --max-tokens many", "--max-tokens: a whole number or None is needed, not 'many'."),
        ("generate smollm2 x --temperature hot", "--temperature: a number or None is needed, not 'hot'."),
        ("generate smollm2 Once upon", "keifu generate has no use for 'upon': put a text that has spaces in quotation"),
        ("train gtp", "There is no recipe 'gtp'."),
    ],
)
def test_a_wrong_word_is_answered_in_one_sentence(words: str, told: str, capsys: pytest.CaptureFixture) -> None:
    status, error = said(capsys, *words.split())
    assert status == 2
    assert error.startswith(told)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """A verb `fail` whose work raises what the test says."""

    def install(error: BaseException) -> None:
        def run() -> None:
            raise error

        monkeypatch.setitem(cli.VERBS, "fail", "fails")
        monkeypatch.setitem(sys.modules, "keifu.commands.fail", SimpleNamespace(parse=lambda arguments: run))

    return install


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("The file\nis empty."), 1, "The file is empty."),
        (ValueError("width 10 and 3 heads"), 1, "width 10 and 3 heads (KEIFU_DEBUG=1 shows where.)"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "There is no file 'a.txt'."),
        (OSError(28, "No space left on device", "b"), 1, "No space left on device: b."),
        (KeyboardInterrupt(), 130, "Stopped."),
        (KeyboardInterrupt("Stopped at step 7; go on with --resume."), 130, "Stopped at step 7; go on with --resume."),
        (ModuleNotFoundError(name="wandb"), 1, "This needs the Python package 'wandb', which is not installed."),
        (MemoryError(), 1, "There is not enough memory; lower the batch, the context length or the model's size."),
    ],
)
def test_errors_are_one_sentence(error, status: int, told: str, failing, capsys: pytest.CaptureFixture) -> None:
    failing(error)
    assert said(capsys, "fail") == (status, told)


def test_debugging_shows_the_traceback(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEIFU_DEBUG", "1")
    failing(UserError("no"))
    with pytest.raises(UserError):
        cli.main(["fail"])


def test_a_fault_of_our_own_keeps_its_traceback(failing) -> None:
    failing(KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(["fail"])


def test_memory_that_pytorch_could_not_have_is_said_with_its_amount() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert "4,294,967,296 MiB more were asked for" in str(explain(caught.value))
    assert explain(RuntimeError("shapes differ")) is None


def test_a_reader_that_leaves_is_no_traceback() -> None:
    code = "from keifu.cli import main; main(['models'])"
    keep = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reader = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -1'], capture_output=True, text=True, env=keep, timeout=60
    )
    assert reader.stdout.startswith("model\tparameters") and reader.stderr == ""


def test_a_table_in_a_pipe_is_tabs(capsys: pytest.CaptureFixture) -> None:
    tables.show(("name", "size"), [("a", "1"), ("b", "")])
    assert capsys.readouterr().out == "name\tsize\na\t1\nb\t\n"


@dataclass(frozen=True)
class Inner:
    """A model's settings."""

    width: int = 4

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"The width {self.width} cannot be shared by 2 heads: choose an even one")


@dataclass(frozen=True)
class Outer:
    """A recipe."""

    name: tyro.conf.Positional[str]
    model: Inner = Inner()
    rate: float = 0.1


def test_flags_reach_nested_settings() -> None:
    assert flags.parse(Outer, ["a", "--model.width", "6"], "keifu x") == Outer("a", Inner(6))
    assert flags.flags(Outer) == ["--help", "--model.width", "--rate"]


def test_an_impossible_setting_says_so_in_its_own_words() -> None:
    with pytest.raises(UserError, match=r"^The width 5 cannot be shared by 2 heads: choose an even one\.$"):
        flags.parse(Outer, ["a", "--model.width", "5"], "keifu x")


def test_a_word_that_begins_with_a_dash_can_be_an_argument() -> None:
    assert flags.parse(Outer, ["--rate", "-1", "--", "--a"], "keifu x") == Outer("--a", rate=-1.0)
