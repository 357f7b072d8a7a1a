"""What is written is true: the tree, the commands and the recipes that the pages name are the real ones."""

import re
import shlex
from pathlib import Path

import pytest

from keifu.cli import parse
from keifu.errors import UserError
from keifu.recipes.files import recipes

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples/data/README.md"
REFUSED = {"errors.md", "errors.ja.md"}  # pages of commands that are refused, which tests/docs runs
WRITTEN = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in REFUSED]
PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", EXAMPLES, *WRITTEN]
IN_ORDER = [  # pages whose commands can be run as printed, from top to bottom
    ROOT / "README.md", EXAMPLES, *(ROOT / "docs" / name for name in ("commands.md", "own-data.md", "threads.md")),
]  # fmt: skip
RUN = re.compile(r"(?:\w+=\S* )*keifu |[^#]*\| keifu ")  # perhaps after variables of the environment, or behind a pipe
PLACEHOLDERS = {"RECIPE": "gpt", "COMMAND": "train"}
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Return every line of the page's code blocks that runs `keifu`, and every `keifu COMMAND ...` in backquotes in
    text."""
    blocks = [line for block in FENCE.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    shown = [line.removeprefix("$ ").strip() for line in blocks]
    inline = re.findall(r"`(keifu [a-z][^`]*)`", FENCE.sub("", page))
    return [line for line in [*shown, *inline] if RUN.match(line)]


def words_of(command: str) -> list[str]:
    """Return the words after `keifu` in a line that may have pipes."""
    words = shlex.split(command, comments=True)
    given = words[words.index("keifu") + 1 :]
    return given[: given.index("|")] if "|" in given else given


def check(command: str) -> None:
    """Parse one command, with a recipe instead of RECIPE. Parse `--help` if the command has no arguments."""
    words = [PLACEHOLDERS.get(word, word) for word in words_of(command)]
    try:
        parse(words if len(words) > 1 else [*words, "--help"])
    except SystemExit as stop:
        assert not stop.code


SHOWN = [(command, page.name) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
FOUND = [(page, command) for command, page in dict(reversed(SHOWN)).items()]  # each once, of the first page


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_command_is_one_that_the_command_line_takes(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run stands whose options --resume would take
    check(command)


@pytest.mark.parametrize("command", ["keifu chatt smollm2", "keifu chat smollm2 --sistem x", "keifu train gtp"])
def test_a_wrong_command_would_be_seen(command: str) -> None:
    assert commands(f"```\n{command}  # with a remark\n```\n") == [f"{command}  # with a remark"]
    with pytest.raises(UserError):
        check(command)


def test_the_pages_show_commands() -> None:
    assert len(FOUND) >= 8


SUFFIXES = "txt|md|html|[ct]sv|jsonl?|ya?ml|png|jpg|npy|py|gguf|safetensors|parquet"
FILE = re.compile(rf"(runs|examples|docs)/.*|.*/|[^ ]*\.({SUFFIXES})")
OUTPUTS = ("--out", "-o", "--output", "--cache-folder")


def named_files(command: str) -> list[str]:
    """Return the files and folders that a command reads. A,B are two, and :SCALE or :FUNCTION is not part of a name."""
    words = shlex.split(command, comments=True)
    given = [word for before, word in zip(["", *words], words, strict=False) if before not in OUTPUTS]
    pieces = [re.sub(r"(?<=.):[\w.]+$", "", piece) for word in given for piece in word.split(",")]
    return [piece for piece in pieces if FILE.fullmatch(piece) and piece not in made_files(command)]


def made_files(command: str) -> set[str]:
    """Return the files and folders that a command makes: its named outputs, or its recipe's runs/NAME."""
    words = words_of(command)
    made = {word for before, word in zip(words, words[1:], strict=False) if before in OUTPUTS}
    if words[0] == "convert":
        return {words[2]}
    trains = words[0] == "train" and words[1:2] != ["--resume"] and "--help" not in words
    return made or ({f"runs/{words[1]}"} if trains and len(words) > 1 else set())


def not_yet_there(page: str) -> list[str]:
    """Return the files that commands of a page read before an earlier one has made them, in a published checkout."""
    made: set[str] = set()
    missing: list[str] = []
    for command in commands(page):
        for name in named_files(command):
            inside_made = any(name == each or name.startswith(f"{each}/") for each in made)
            if not inside_made and (name.startswith("runs/") or not (ROOT / name).exists()):
                missing.append(f"{command}: {name}")
        made |= made_files(command)
    return missing


@pytest.mark.parametrize("page", IN_ORDER, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_file_that_a_command_names_is_there_or_was_made_by_an_earlier_one(page: Path) -> None:
    assert not_yet_there(page.read_text(encoding="utf-8")) == []


def trained_twice(page: str) -> list[str]:
    """Return the folders into which two or more trainings of a page would write. The second one would refuse."""
    lines = [line.strip() for block in FENCE.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    words = [words_of(line) for line in lines if RUN.match(line)]
    trains = [each for each in words if each[0] == "train" and len(each) > 1 and not each[1].startswith("-")]
    started = [each for each in trains if not {"--help", "--replace"} & {*each} and each[1] not in PLACEHOLDERS]
    folders = [made for each in started for made in made_files(shlex.join(["keifu", *each]))]
    return sorted({folder for folder in folders if folders.count(folder) > 1})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_trains_only_once_into_a_folder(page: Path) -> None:
    assert trained_twice(page.read_text(encoding="utf-8")) == []


def test_two_trainings_into_one_folder_would_be_seen() -> None:
    first = "keifu train gpt --depth 2\n"
    assert trained_twice(f"```\n{first}keifu train gpt --depth 3\n```\n") == ["runs/gpt"]
    rest = "keifu train gpt --depth 3 --out runs/b\nkeifu train --resume runs/gpt\n"
    assert trained_twice(f"```\n{first}{rest}```\n") == []


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ("keifu generate runs/gpt x\nkeifu train gpt", ["runs/gpt"]),
        ("keifu train gpt --out runs/a\nkeifu generate runs/gpt x", ["runs/gpt"]),
        ("keifu train gpt --help\nkeifu generate runs/gpt x", ["runs/gpt"]),
        ("keifu train --resume runs/gpt", ["runs/gpt"]),
        ("keifu train dalle\nkeifu draw runs/dalle x --clip runs/dalle/clip", []),
        ("keifu train ddpm\nkeifu draw runs/ddpm -o runs/a.png\nkeifu draw --again runs/a.png", []),
        ("keifu train classifier --data reviews.csv", ["reviews.csv"]),
        ("cat letter.txt | keifu chat smollm2 x", ["letter.txt"]),
        ("keifu train grpo --reward rewards.py:score", ["rewards.py"]),
        ("keifu train transformer --data a.txt,b.txt", ["a.txt", "b.txt"]),
        ("keifu convert smollm2 runs/out --to hf\nkeifu inspect runs/out", []),
        ("keifu convert runs/out runs/other --to hf", ["runs/out"]),
        ("OMP_NUM_THREADS=1 keifu train gpt --data a.txt\nkeifu generate runs/gpt x", ["a.txt"]),
        ("keifu chat owner/name 'How high is Mt. Fuji?'", []),
    ],
)  # fmt: skip
def test_a_file_that_is_not_there_would_be_seen(lines: str, missing: list[str]) -> None:
    assert [line.rpartition(": ")[2] for line in not_yet_there(f"```\n{lines}\n```\n")] == missing


RECIPES = sorted((ROOT / "src/keifu/recipes").rglob("[!_]*.py"))
SAID = [(p.stem, line) for p in RECIPES for line in re.findall(r"(?m)^Command: (keifu .*)$", p.read_text("utf-8"))]


@pytest.mark.parametrize(("recipe", "command"), SAID)
def test_the_command_that_a_recipe_names_is_one(recipe: str, command: str, capsys: pytest.CaptureFixture) -> None:
    check(command)


def test_every_recipe_that_a_recipe_names_exists() -> None:
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "src/keifu/recipes").rglob("*.py")]
    named = {name for text in files for name in re.findall(r"keifu train ([a-z][\w-]*)", text)}
    assert named <= recipes().keys()


def test_tree_is_the_real_one() -> None:
    page = (ROOT / "docs/extending/index.md").read_text(encoding="utf-8")
    block = next(block for block in FENCE.findall(page) if block.startswith("src/keifu/"))
    lines = [line for line in block.splitlines() if line.startswith("  ")]
    written = {line.split()[0].rstrip("/") for line in lines if len(line.split()) > 1}
    real = {path.parent.name for path in (ROOT / "src/keifu").glob("*/__init__.py")}
    assert written == real
    assert len(written) == len(lines)
    assert all((ROOT / line.split()[0]).is_dir() for line in block.splitlines() if not line.startswith(" "))


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_readme_is_short_and_says_where_it_was_measured(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    start = lines.index("make demo")
    assert lines[start - 1 : start + 3] == ["```", "make demo", "make test", "```"]
    assert start < 20
    assert any("CPU" in line and "GPU" in line and "**" in line for line in lines)


FROM_AN_INDEX = re.compile(r"(?:uvx|pipx run|uv tool install|pip install(?: -\S+)*) ['\"]?keifu\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_page_runs_or_installs_keifu_by_its_name_from_an_index(page: Path) -> None:
    assert FROM_AN_INDEX.findall(page.read_text(encoding="utf-8")) == []


def test_no_message_installs_keifu_by_its_name_from_an_index() -> None:
    files = (ROOT / "src").rglob("*.py")
    assert [file.name for file in files if FROM_AN_INDEX.search(file.read_text(encoding="utf-8"))] == []


def test_an_installation_by_name_would_be_seen() -> None:
    assert all(
        FROM_AN_INDEX.search(line) for line in ("uvx keifu chat", "pip install -U keifu", "pip install 'keifu[a]'")
    )
    assert not FROM_AN_INDEX.search("uvx --find-links dist keifu chat; pip install -e '.[serve]'")
