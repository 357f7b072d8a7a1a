"""README, guides and the pages on extending run as they are written: in order, in one folder, as the reader has them.

The environment is that of `make demo`: what only the development tools install cannot be imported. One rule makes long
commands short: `SMALLER` lowers the numbers of what trains, draws or writes for long, and nothing else. Commands
of other pages run on small data too, and their Python is run by other tests. A block
of ```text below a command that is not made smaller and does not train is its output, and must be printed.
"""

import gc
import re
import shlex
import shutil
import subprocess
import sys
import wave
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from keifu.cli import main
from keifu.memory import release

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALLER = [  # what keeps a command as it is and makes it short
    (r"--steps \d+", "--steps 2"),
    (r"--depth \d+", "--depth 1"),
    (r"--max-tokens \d+", "--max-tokens 3"),
    (r"--count \d+", "--count 2"),
    (r"--limit \d+", "--limit 4"),
    (r"--warmup \d+", "--warmup 1"),
    (r"--minutes \d+", "--steps 2"),
    (
        r"^keifu train transformer.*",
        r"\g<0> --vocab-size 300 --model.dim 32 --model.n-layers 1 --model.n-decoder-layers 1",
    ),
    (r"^keifu train ddpm.*", r"\g<0> --dim 16 --multipliers 1 2 --attention 1 --batch-size 4"),
    (r"^keifu translate.*", r"\g<0> --max-tokens 3"),
    (r"^keifu evaluate runs/translator.*", r"\g<0> --limit 1"),
    (r"^keifu draw runs/ddpm.*", r"\g<0> --steps 2"),
    (r"^keifu evaluate runs/ddpm.*", r"\g<0> --steps 2"),
    (r"^keifu train sft --model smollm2.*", r"\g<0> --batch-size 1 --context-length 64"),
]
BLOCK_SIZES = "--model.dim 32 --model.hidden-dim 64 --model.n-layers 1 --model.n-heads 2"
ENOUGH = {  # options that a training gets, each only if the page gives none; other recipes get --steps 2
    "bert": f"--steps 2 --warmup 1 --batch-size 2 {BLOCK_SIZES}",
    "classifier": "",
    "clip": "--steps 2 --warmup 1 --batch-size 8",
    "dalle": "--clip-steps 2 --vae-steps 2 --steps 2 --batch-size 4",
    "dpo": "--steps 2 --batch-size 2 --context-length 128",
    "gpt1": f"--steps 2 --batch-size 2 {BLOCK_SIZES}",
    "gpt2": f"--steps 2 --warmup 1 --batch-size 2 {BLOCK_SIZES}",
    "gpt3": f"--steps 2 --batch-size 2 {BLOCK_SIZES}",
    "grpo": "--steps 2 --prompts 2 --group 2 --max-tokens 4 --sums.count 20",
    "instruct": "--sft.steps 2 --reward.steps 2 --ppo.steps 1 --ppo.rollouts 4 --ppo.warmup 1 --ppo.max-tokens 8",
    "latent-diffusion": "--clip-steps 2 --autoencoder-steps 2 --steps 2 --batch-size 4",
    "llama": f"--steps 2 --warmup 1 --batch-size 2 {BLOCK_SIZES}",
    "lstm": "--steps 2 --warmup 1 --batch-size 2 --model.dim 32 --model.n-layers 1",
    "ngram": "",
    "palm": f"--steps 2 --batch-size 2 {BLOCK_SIZES} --model.head-dim 16",
    "palm2": f"--steps 2 --warmup 1 --batch-size 2 {BLOCK_SIZES} --model.head-dim 16",
    "perceptron": "",
    "gan": "--steps 2 --batch-size 4 --model.widths 4 6",
    "ppo": "--steps 1 --rollouts 4 --warmup 1 --max-tokens 8",
    "mean-flow": "--steps 2 --warmup 1 --batch-size 4 --n-layers 1 --head-dim 4",
    "score": "--steps 2 --warmup 1 --sampling.sampling-steps 3",
    "see": "--steps 2 --batch-size 2 --image.dim 32 --image.hidden-dim 64 --image.n-layers 1 --image.n-heads 2",
    "seq2seq": "--steps 2 --vocab-size 300 --model.dim 32 --model.embedding-dim 32 --model.maxout-dim 16",
    "t5": f"--steps 2 --pretraining.steps 2 --pretraining.window 16 --vocab-size 400 {BLOCK_SIZES} --model.head-dim 16",
    "vq": "--steps 2 --warmup 1 --batch-size 2 --model.widths 16 16",
    "word2vec": "--steps 2 --warmup 1 --batch-size 8 --min-count 1 --neighbours.window 2",
    "whisper": "--steps 2 --warmup 1 --batch-size 2",
    "unclip": "--clip-steps 2 --steps 2 --batch-size 4",
}
DATA = {  # large data sets, and the small files of the repository that stand for them on pages of landmarks
    **dict.fromkeys(("english", "wiki-summaries", "sotu"), "examples/data/my-texts/"),
    **dict.fromkeys(("tatoeba-ja-en", "tatoeba-en-ja"), "examples/data/pairs.csv"),
    **dict.fromkeys(("emoji", "openmoji"), "examples/data/pictures/"),
}
DEFAULTS = {"bert": "wiki-summaries", "transformer": "tatoeba-ja-en", "clip": "emoji"}  # of recipes that name no data
QUICK = ["../README.md", "extending/model.md", "extending/pieces.md"]
WAITS = re.compile(r"keifu (?:serve|compare|data clear|chat \S+ *(?:#|$))")  # these ask a person or wait for requests
# files of a reader, and weights that are too large for a test
READERS = re.compile(r"my-stable-diffusion/|v1-5-pruned\.safetensors|mine\.yaml|runs/causal|openai/whisper-small")
LANDMARKS = sorted(path.stem for path in (ROOT / "docs/lineage").glob("*.md") if not path.name.endswith(".ja.md"))
REFUSED = "# refuses"  # a remark of a command that must end with an error
SLOW = [
    f"guides/{name}.md"
    for name in ("own_chat", "translator", "drawing", "search", "finetuning", "attention", "evaluating")
]


def parts(page: str) -> list[tuple[str, str]]:
    """Return the commands and Python blocks of a page in their order, with the output shown below each."""
    found = []
    for language, text in BLOCK.findall(page):
        if language in ("python", "text"):
            found.append((language, text))
        elif not language:
            lines = text.replace("\\\n", " ").splitlines()
            for before, line in zip(["", *lines], lines, strict=False):
                if line.startswith("keifu ") and not WAITS.match(line):
                    found.append(("refused" if before.startswith(REFUSED) else "command", line))
    return found


def smaller(command: str) -> str:
    """Return the command with small numbers, and without its comment."""
    command = shlex.join(shlex.split(command, comments=True))
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    words = command.split()
    if words[1] != "train" or len(words) < 3 or words[2].startswith("-"):
        return command
    given = re.findall(r"--\S+(?: [^-]\S*)?", ENOUGH.get(words[2], "--steps 2"))
    return " ".join([command, *(option for option in given if option.split()[0] not in words)])


def is_exact(command: str) -> bool:
    """Return whether a command prints here what the page shows: it has its own numbers, and no run of this page is in
    it."""
    words = shlex.join(shlex.split(command, comments=True))
    return smaller(command) == words and not command.startswith("keifu train") and "runs/" not in command


def run(page: Path, capsys: pytest.CaptureFixture) -> int:
    """Run a page in the current folder, and return the number of parts that it ran."""
    names: dict = {"__name__": "guide"}
    found = parts(page.read_text(encoding="utf-8"))
    before: list[str] = []
    capsys.readouterr()
    for kind, text in found:
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)
        elif kind == "command":
            main(shlex.split(smaller(text))[1:])
        else:
            printed = capsys.readouterr().out
            missing = [line for line in text.splitlines() if line.strip() not in printed]
            assert not (before and all(map(is_exact, before)) and missing), f"{missing} not in {printed}"
        before = [*before, text] if kind == "command" else []
    return len([kind for kind, _ in found if kind != "text"])


def on_small_data(command: str) -> str:
    """Return a training on the small files of the repository instead of a large data set."""
    words = command.split()
    if words[1] == "evaluate" and "--limit" not in words:
        return f"{command} --limit 4"
    if words[1] == "train" and "--data" not in words and words[-1] != "train" and words[2] in DEFAULTS:
        words[3:3] = ["--data", DEFAULTS[words[2]]]
    if words[1:3] == ["train", "gpt1-finetune"]:
        return command.replace("--data wiki-summaries", "--data examples/data/reviews.csv --label label")
    if words[1:3] == ["train", "clip"] and "zh" in words:
        words.remove("zh")  # the small pictures have captions in English and Japanese
    named = [before.endswith("data") for before in ["", *words[:-1]]]
    return " ".join(DATA.get(word, word) if data else word for data, word in zip(named, words, strict=True))


def finish(words: list[str]) -> None:
    """Run a command, and free its memory; `--help` ends with an exit that says success."""
    if words[0] == "train" and words[1] in WITH_MANY_MODELS:
        modules = f"import sys; sys.modules |= dict.fromkeys({not_in_the_demonstration()})"
        command = f"{modules}; from keifu.cli import main; main(sys.argv[1:])"
        subprocess.run([sys.executable, "-c", command, *words], check=True)
        return
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise
    gc.collect()
    release(torch.device("cpu"))


def run_commands(page: Path) -> int:
    """Run the commands of a page in the current folder, but not its Python; return how many there were."""
    found = [(kind, text) for kind, text in parts(page.read_text(encoding="utf-8")) if kind in ("command", "refused")]
    found = [(kind, text) for kind, text in found if not READERS.search(text)]
    if not shutil.which("espeak-ng"):
        found = [(kind, text) for kind, text in found if "spoken-digits" not in text]
    for kind, text in found:
        if kind == "command":
            finish(shlex.split(on_small_data(smaller(text)))[1:])
        else:
            with pytest.raises(SystemExit):
                main(shlex.split(smaller(text))[1:])
    return len(found)


def not_in_the_demonstration() -> list[str]:
    """Return packages that `make demo` does not install: those of the development tools and of the other extras."""
    return [
        "transformers", "diffusers", "peft", "sklearn", "openai", "trl", "open_clip", "lm_eval", "llama_cpp", "pyarrow",
        "reasoning_gym", "tensorboard", "wandb", "MeCab", "ipadic", "mkdocs", "playwright", "torchvision",
    ]  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the files that the guides read, into which they may write."""
    for name in ("examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "picture.png").symlink_to(ROOT / "examples/data/pictures/red-circle.png")
    for name in ("talk.wav", "digits.wav"):  # a reader's recordings, here a second of silence
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, 16000, 16000, "NONE", ""))
            file.writeframes(bytes(32000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for package in not_in_the_demonstration():
        monkeypatch.setitem(sys.modules, package, None)
    return tmp_path


@pytest.mark.parametrize("page", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_guide_runs_as_it_is_written(page: str, checkout: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(ROOT / "docs" / page, capsys) >= 2


LARGE = {"palm2"}  # its mixture of many languages is encoded for ten minutes before the first step
COMMANDS = ["commands.md", "own-data.md"]
COMMANDS += [f"lineage/{name}.md" for name in LANDMARKS if name not in {"index", *LARGE}]
WITH_MANY_MODELS = {"ppo", "grpo", "instruct"}  # recipes that have a process of their own
FAST = ["lineage/perceptron.md", "lineage/mixture.md"]


@pytest.mark.timeout(1800)  # the command guide has 78 commands
@pytest.mark.parametrize(
    "page", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_commands_of_a_page_run_in_order(page: str, checkout: Path) -> None:
    assert run_commands(ROOT / "docs" / page)


def test_every_guide_with_commands_is_run() -> None:
    folders = [ROOT / "docs" / name for name in ("guides", "extending")]
    pages = [path for folder in folders for path in folder.glob("*.md") if not path.name.endswith(".ja.md")]
    run_here = {path for path in pages if {kind for kind, _ in parts(path.read_text("utf-8"))} - {"text"}}
    found = {path.relative_to(ROOT / "docs").as_posix() for path in run_here}
    assert found - {"extending/testing.md"} == {*QUICK, *SLOW} - {"../README.md"}  # its Python is a test


def test_a_guide_that_does_not_run_would_be_seen(checkout: Path, capsys: pytest.CaptureFixture) -> None:
    page = checkout / "page.md"
    page.write_text("```\nkeifu data check nowhere/\n```\n")
    with pytest.raises(SystemExit):
        run(page, capsys)
    page.write_text("```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page, capsys)
    page.write_text("```text\nkeifu data check nowhere/\n```\n")
    assert run(page, capsys) == 0
    page.write_text("```\n# refuses\nkeifu data check examples/data/lines.txt\n```\n")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run_commands(page)


def test_only_numbers_become_smaller() -> None:
    assert (
        smaller("keifu train gpt --depth 4 --data a/ --steps 200  # long")
        == "keifu train gpt --depth 1 --data a/ --steps 2"
    )


def test_the_environment_is_that_of_the_demonstration(checkout: Path) -> None:
    asked = [Requirement(text) for text in requires("keifu") or []]
    plain = {each.name for each in asked if not each.marker or each.marker.evaluate({"extra": "serve"})}
    distributions = packages_distributions()
    for package in not_in_the_demonstration():
        assert not plain & {*distributions.get(package, [])}
        with pytest.raises(ImportError):
            __import__(package)


def test_other_output_than_the_page_shows_would_be_seen(checkout: Path, capsys: pytest.CaptureFixture) -> None:
    page = checkout / "page.md"
    page.write_text("```\nkeifu data check examples/data/lines.txt\n```\n\n```text\n7 documents\n```\n")
    with pytest.raises(AssertionError, match="7 documents"):
        run(page, capsys)
