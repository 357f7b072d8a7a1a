"""The command line as a person meets it: help without torch, one sentence for every mistake, plain text in a pipe."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import tyro

from keifu import __version__, cli
from keifu.commands.reference import completion
from keifu.commands.shared import flags, tables
from keifu.commands.shared.errors import explain
from keifu.commands.shared.help_text import arguments_of, help_text
from keifu.commands.shared.recipe_options import computed, stored
from keifu.errors import UserError
from keifu.recipes.files import recipe_module, recipe_names

HELPED = [*cli.COMMANDS]
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
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=keep, timeout=300)


def said(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Return the exit status and stderr, which is one line without a traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return stop.value.code, error.strip()


def test_help_lists_every_verb(capsys: pytest.CaptureFixture) -> None:
    cli.main(["--help"])
    assert cli.COMMANDS.keys() <= set(capsys.readouterr().out.split())
    for words in ([], ["help"], ["help", "help"], ["help", "--help"]):
        cli.main(words)
        assert capsys.readouterr().out == cli.help_text() + "\n"


def test_help_imports_nothing_heavy_and_tyro_neither() -> None:
    done = in_new_process(LIGHT.format(["--help"], HEAVY | {"tyro"}))
    assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", "heavy:")


ALL_HELP = """
import io, sys
from contextlib import redirect_stdout
from keifu.cli import main
for words in {!r}:
    with redirect_stdout(io.StringIO()) as shown:
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            assert not stop.code, words
    assert shown.getvalue().startswith(("Usage: keifu " + " ".join(words[:2])).rstrip()), words
    print(*words, *sorted({!r} & sys.modules.keys()))
"""


def test_help_of_every_verb_and_recipe_imports_no_torch() -> None:
    asked = [*([verb] for verb in HELPED), *(["train", name] for name in recipe_names())]
    done = in_new_process(ALL_HELP.format(asked, HEAVY))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [" ".join(words) for words in asked]


@pytest.mark.parametrize("name", recipe_names())
def test_the_table_of_options_is_what_the_recipes_have(name: str) -> None:
    """Run `python -m keifu.commands.shared.recipe_options` when this fails: it writes the table again."""
    assert [*stored()] == recipe_names() and stored()[name] == computed(name)
    shown = help_text(stored()[name], "x", "")
    assert not re.search(r"\{None|default: (None|False|\)|\()|^  --no-", shown, re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """A verb.

    It has a second paragraph.
    """

    place: tyro.conf.Positional[str]
    """Where."""
    flip: bool = True
    """Mirror every second picture."""
    grey: bool = False
    """without colour."""
    size: int | None = None
    """ddim's own."""
    fit: Literal["crop", "pad"] = "crop"
    kind: Literal["one-long-name", "another-long-name"] | None = None
    """What."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    rate: float = 0.5


def test_help_is_laid_out() -> None:
    about = "A verb.\n\nIt has a second paragraph."
    assert help_text(arguments_of(Shown), "keifu x", about, width=60).splitlines() == [
        "Usage: keifu x [OPTIONS] PLACE", "", "A verb.", "", "It has a second paragraph.", "", "Arguments:",
        "  PLACE           Where.", "", "Options:",
        "  -h, --help      Show this help.",
        "  --[no-]flip     Mirror every second picture. (default:",
        "                  yes)",
        "  --grey          Without colour.",
        "  --size INT      ddim's own.",
        "  --fit crop|pad  (default: crop)",
        "  --kind NAME     What. One of one-long-name,",
        "                  another-long-name.",
        "  --stop TEXT     May be given several times.",
        "  --rate FLOAT    (default: 0.5)",
    ]  # fmt: skip
    assert flags.parse(Shown, ["a", "--no-flip"], "keifu x").flip is False
    assert {"--flip", "--no-flip", "--grey"} <= {*flags.flags(Shown)} and "--no-grey" not in flags.flags(Shown)


def test_python_m_keifu_and_help_and_version(capsys: pytest.CaptureFixture) -> None:
    run = "import runpy, sys; sys.argv[1:] = ['version']; runpy.run_module('keifu', run_name='__main__')"
    done = in_new_process(run)
    cli.main(["--version"])
    assert done.stdout == capsys.readouterr().out == f"keifu {__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["help", "train", "gpt"])
    assert capsys.readouterr().out.startswith("Usage: keifu train gpt [OPTIONS]")


def test_quiet_leaves_results_and_errors_alone(failing, capsys: pytest.CaptureFixture) -> None:
    failing(UserError("no"), "a note")
    assert said(capsys, "fail", "-q") == (1, "no")
    with pytest.raises(SystemExit):
        cli.main(["fail"])
    assert capsys.readouterr().err == "a note\nno\n"
    with pytest.raises(UserError):
        cli.main(["fail", "--verbose"])
    assert cli.without_volume(["a", "-q", "--", "-v"]) == (["a", "--", "-v"], True, False)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_recipes_and_options(shell: str) -> None:
    text = completion.script(shell, cli.COMMANDS)
    assert all(word in text for word in [*cli.COMMANDS, "gpt1-finetune", "max-tokens"])


def test_bash_completes() -> None:
    ask = 'COMP_WORDS=(keifu {}); COMP_CWORD={}; _keifu; echo "${{COMPREPLY[@]}}"'
    typed = [("ge", 1), ("train gpt", 2), ("train gpt --dep", 3), ("chat --te", 2)]
    asked = [ask.format(*words) for words in typed]
    text = completion.script("bash", cli.COMMANDS) + "\n" + "\n".join(asked)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["generate", "gpt gpt1 gpt1-finetune gpt2 gpt3", "--depth", "--temperature"]


def test_an_own_recipe_file_is_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # runs/my_own is made there
    own = tmp_path / "my_own.py"
    own.write_text(OWN_RECIPE)
    with pytest.raises(SystemExit):
        cli.main(["train", str(own), "--help"])
    assert "--size INT" in capsys.readouterr().out
    cli.main(["train", str(own), "--size", "3"])
    assert capsys.readouterr().out == "3 my_own\n"
    own.write_text("x = 1")
    assert said(capsys, "train", str(own))[1].startswith(f"{own} is no recipe: it lacks Recipe and jobs")
    assert said(capsys, "train", "nothing.py")[1].startswith("There is no file 'nothing.py'")
    wrong = {
        "torn.py": ("def f(:", "cannot be run: SyntaxError"),
        "bare.py": ("Recipe = jobs = 3", "is no dataclass"),
        "older.py": ("Recipe = run = 3", "lacks jobs, and its function run is of an earlier version"),
    }
    for name, (text, told) in wrong.items():
        Path(name).write_text(text)
        assert told in said(capsys, "train", name)[1] and told in said(capsys, "train", name, "--help")[1]


def test_an_own_recipe_may_have_the_name_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("json.py").write_text(OWN_RECIPE)
    recipe_module("json.py")
    assert sys.modules["json"] is json


OWN_RECIPE = '''"""Mine."""
from dataclasses import dataclass
import torch
from keifu.training.job import RUN_FOLDER

@dataclass
class Recipe:
    """Options."""
    size: int = 2
    """Of it."""

def jobs(recipe):
    out = yield RUN_FOLDER
    print(recipe.size, out.name)
'''


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
    from keifu.errors import UserError
    from keifu.inference.embeddings.encoders import embed

    assert keifu.load is load
    assert {"load", "save", "generate"} <= set(dir(keifu))
    assert (keifu.embed, keifu.UserError) == (embed, UserError)
    assert [name for name in keifu.__all__ if not hasattr(keifu, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = keifu.laod


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("genrate smollm2", "There is no command 'genrate'. Did you mean 'generate'?"),
        ("generate smollm2 x --max-token 3", "There is no option '--max-token'. Did you mean '--max-tokens'?"),
        ("generate smollm2 x --max-token=3", "There is no option '--max-token'. Did you mean '--max-tokens'?"),
        ("generate --tempratur 3", "There is no option '--tempratur'. Did you mean '--temperature'?"),
        ("generate", "keifu generate needs MODEL: see keifu generate --help."),
        ("convert --to gguf", "keifu convert needs MODEL and OUT: see keifu convert --help."),
        (
            "convert a b --to gguff",
            "There is no --to called 'gguff'. Did you mean 'gguf'? Known: gguf, hf, onnx, open_clip, web.",
        ),
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


def test_where_nothing_is_known_nothing_is_listed(capsys: pytest.CaptureFixture) -> None:
    assert said(capsys, "completion", "bash", "--x") == (2, "There is no option '--x'.")


def test_an_empty_path_is_told_by_its_option(capsys: pytest.CaptureFixture) -> None:
    status, error = said(capsys, "serve", "somewhere", "--api-key-file", "")
    assert status == 2 and error == "--api-key-file is empty: give the name of a file or folder."


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Return a function that installs a command `fail`, whose work raises a given error."""

    def install(error: BaseException, note: str = "") -> None:
        def run(_: Any) -> None:
            print(note, end="\n" if note else "", file=sys.stderr)
            raise error

        monkeypatch.setitem(cli.COMMANDS, "fail", "fails")
        module = SimpleNamespace(Options=make_dataclass("Options", []), run=run)
        monkeypatch.setitem(sys.modules, "keifu.commands.fail", module)

    return install


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("The file\nis empty."), 1, "The file is empty."),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "There is no file 'a.txt'."),
        (OSError(28, "No space left on device", "b"), 1, "No space left on device: b."),
        (PermissionError(13, "Permission denied", "/x/.a.png.123.part"), 1, "Permission denied: /x/a.png."),
        (KeyboardInterrupt(), 130, "Stopped."),
        (KeyboardInterrupt("Stopped at step 7; go on with --resume."), 130, "Stopped at step 7; go on with --resume."),
        (ModuleNotFoundError(name="wandb"), 1, "This needs the Python package 'wandb', which is not installed."),
        (
            ModuleNotFoundError(name="starlette"),
            1,
            "This needs the Python package 'starlette', which is not installed: pip install '.[serve]' in keifu's "
            "checkout.",
        ),
        (MemoryError(), 1, "There is not enough memory; lower the batch, the context length or the model's size."),
    ],
)
def test_errors_are_one_sentence(error, status: int, told: str, failing, capsys: pytest.CaptureFixture) -> None:
    failing(error)
    assert said(capsys, "fail") == (status, told)


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(failing, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    failing(PermissionError(13, "Permission denied", str(tmp_path / "tokenizers")))
    told = f"Permission denied: {tmp_path}/tokenizers; KEIFU_CACHE names another folder for what keifu keeps."
    assert said(capsys, "fail") == (1, told)


def test_a_home_that_is_not_there_is_named_with_the_variable(failing, monkeypatch, capsys) -> None:
    monkeypatch.delenv("KEIFU_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/nohome")
    failing(FileNotFoundError(2, "No such file or directory", "/proc/nohome"))
    told = "No such file or directory: /proc/nohome; KEIFU_CACHE names another folder for what keifu keeps."
    assert said(capsys, "fail") == (1, told)


def test_matplotlib_keeps_its_list_in_the_cache_if_home_cannot_be_written(failing, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    for home, place in (("/proc/nohome", str(tmp_path / "matplotlib")), (str(tmp_path), None)):
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("MPLCONFIGDIR", "")
        monkeypatch.delenv("MPLCONFIGDIR")
        failing(UserError("no"))
        with pytest.raises(SystemExit):
            cli.main(["fail"])
        assert os.environ.get("MPLCONFIGDIR") == place


def test_matplotlib_is_silent_about_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("KEIFU_CACHE", "MPLCONFIGDIR", "XDG_CACHE_HOME")}
    command = ["-m", "keifu", "train", "perceptron", "--data", "and", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *command], env={**environment, "HOME": "/proc/nohome"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert (tmp_path / "run/report.html").exists()
    output = (done.stderr + done.stdout).replace(str(tmp_path), "")  # whose name is that of this test
    assert "atplotlib" not in output and "font" not in done.stderr


def test_debugging_shows_the_traceback(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEIFU_DEBUG", "1")
    failing(UserError("no"))
    with pytest.raises(UserError):
        cli.main(["fail"])


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("invalid literal"), RuntimeError("shapes\ndiffer")])
def test_a_fault_of_our_own_is_called_so_and_keeps_its_traceback(
    error: Exception, failing, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a library raises is no sentence for the user, a ValueError neither."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error.add_note("The state is saved.")
    failing(error)
    status, told = said(capsys, "fail")
    [file] = tmp_path.glob("keifu-*.txt")
    assert status == 70 and "\n" not in told and str(file) in told
    assert told.startswith(f"This is a bug in keifu, not your mistake ({type(error).__name__}: ")
    assert "The state is saved." in told and "Please report it" in told
    assert "Traceback (most recent call last)" in file.read_text() and type(error).__name__ in file.read_text()
    monkeypatch.setenv("KEIFU_DEBUG", "1")
    with pytest.raises(type(error)):
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
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -1'], capture_output=True, text=True, env=keep, timeout=300
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
    bias: float = 0.1


def test_flags_reach_nested_settings() -> None:
    assert flags.parse(Outer, ["a", "--model.width", "6"], "keifu x") == Outer("a", Inner(6))
    assert flags.flags(Outer) == ["--bias", "--help", "--model.width"]


def test_an_impossible_setting_says_so_in_its_own_words() -> None:
    with pytest.raises(UserError, match=r"^The width 5 cannot be shared by 2 heads: choose an even one\.$"):
        flags.parse(Outer, ["a", "--model.width", "5"], "keifu x")


def test_a_word_that_begins_with_a_dash_can_be_an_argument() -> None:
    assert flags.parse(Outer, ["--bias", "-1", "--", "--a"], "keifu x") == Outer("--a", bias=-1.0)
