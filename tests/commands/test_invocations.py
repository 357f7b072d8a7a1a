"""Wrong invocations of every verb: one sentence and the right exit status, before any work; a table of 300 and more."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from keifu import checkpoints, cli
from keifu.commands.shared.command_names import COMMANDS
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama
from keifu.recipes.files import recipe_names

WRONG = (
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e308",
    "-1",
    "x",
    "",
    "99999999999999999999",
    str(2**64),
    "²",
    "0x10",
)
NUMBERS = {  # the words of a verb, and its numeric options; those in the second part may be 0, inf or a fraction
    "generate {model} Hi": ("max-tokens top-k seed", "temperature top-p min-p repetition-penalty"),
    "chat {model}": ("max-tokens top-k seed", "temperature top-p"),
    "draw {model}": ("count steps seed batch-size", "eta"),
    "evaluate {model} --on perplexity": ("limit", ""),
    "bench {model}": ("prompt tokens", ""),
    "translate {model} Hi": ("beam max-tokens batch-size", ""),
    "transcribe {model} a.wav": ("beams", ""),
    "embed {model} Hi": ("nearest batch-size", ""),
    "train grpo": ("steps prompts group max-tokens", ""),
    "train gpt": ("depth batch-size context-length vocab-size seed", "learning-rate"),
    "train ddpm": ("dim noise-steps size", ""),
    "train dit": ("n-layers patch-size head-dim", "dropout"),
    "train mlp": ("seed", "dropout"),
    "serve {model}": ("port slots", ""),
    "data show pictures": ("count", ""),
}
WITH_MODELS = {  # verbs, and what they need besides
    **dict.fromkeys(("generate", "chat", "translate", "embed", "classify", "draw", "inspect", "bench"), ""),
    "evaluate": "--on perplexity",
}
NO_MODELS = {  # what stands where a model should; none is one
    "": "no name of a model", "   ": "no name", "nosuch": "There is no", "/dev/null": "no model", "{text}": "no model",
    "{empty}": "no model", "{binary}": "no model", "{model}/model.safetensorss": "There is no", "a/b/c": "There is no",
}  # fmt: skip
OTHER = [  # exit status, words
    (2, "nosuch"), (2, "generat x"), (2, "--nosuch"), (2, "help nosuch"), (2, "help train nosuch"), (2, "train nosuch"),
    (2, "generate"), (2, "generate {model} --nosuch"), (2, "generate {model} Hi there you --temprature 1"),
    (2, "train gpt --out="), (2, "train gpt --out {text}"), (2, "train gpt --out {text}/deeper"),
    (2, "train gpt --resume --replace --out {empty}"),
    (2, "train gpt --steps 1 --steps"), (2, "train gpt --device gpu9"), (1, "train --resume {empty}"),
    (1, "train --resume nosuch"), (1, "train gpt --resume --out {empty}"), (1, "train gpt --data nosuch --out {new}"),
    (1, "train gpt --data {empty} --out {new}"), (1, "train gpt --data {binary} --out {new}"),
    (1, "train sft --model nosuch --out {new}"), (1, "train grpo --model {model} --reward nosuch --out {new}"),
    (1, "train grpo --model {model} --reward {text}:score --out {new}"),
    (1, "train grpo --model {model} --reward {leaves}:score --out {new}"),
    (1, "train grpo --model {model} --reward nosuch.py:score --out {new}"),
    (2, "draw {model} --out {empty}"), (1, "draw {model} --out a.jpg"),
    (2, "draw {model} --strip {empty}"), (2, "draw {model} --count 1000000000000"), (1, "draw {model} --size ²"),
    (1, "draw {model} --size 0"), (1, "draw {model} --size 64x64x64"), (1, "draw {model} --size 9999999999999"),
    (1, "draw"), (1, "draw --again {text}"), (1, "draw --again nosuch.png"), (1, "draw {model} --sampler nosuch"),
    (1, "data check {binary}"), (1, "data check {empty}"), (1, "data check nosuch"), (1, "data get nosuch"),
    (1, "data show {empty}"), (2, "data nosuch"), (1, "data get"), (2, "data show {empty} --output {empty}"),
    (1, "convert {model} {new} --to hf --dtype q8_0"), (2, "convert {model} {new} --to nosuch"), (2, "convert {model}"),
    (1, "evaluate {model} --on nosuch"), (2, "evaluate {model} --on"),
    (2, "evaluate {model} --on perplexity --output {empty}"), (1, "generate {model} --file nosuch"),
    (1, "generate {model} --file {binary}"), (1, "generate {model} --file {empty}"),
    (1, "generate {model} --weights int3 Hi"),
    (1, "train --resume ''"), (2, "bench {model} --device nosuch"), (1, "models nosuch"), (1, "classify {model}"),
    (2, "train gpt --data a\udcff --out {new}"), (2, "train a\udcff"), (1, "generate a\udcff Hi"),
    (1, "inspect a\udcff"),
    (1, "data check a\udcff"), (1, "convert a\udcff {new} --to hf"), (1, "evaluate a\udcff --on perplexity"),
    (1, "inspect {pipe}"), (1, "generate {pipe} Hi"), (1, "data check {pipe}"),
    (1, "train gpt --data {pipe} --out {new}"),
    (1, "draw --again {pipe}"), (1, "draw --again {empty}"), (1, "classify {model} --on {pipe}.csv"),
    (1, "evaluate {model} --on {pipe}.yaml"), (1, "translate {model} --file nosuch"), (1, "inspect /dev/zero"),
    (1, "data check /dev/zero"), (1, "inspect {loop}"), (1, "data check {loop}"), (2, "train --resume --replace"),
    (1, "embed {model} --file nosuch"), (1, "translate {model} Hi"), (2, "completion nosuch"), (2, "completion"),
    (1, f"serve {{model}} --memory {'9' * 400}G"), (1, "serve {model} --cache 9e9G"), (1, "serve {model} --memory ²G"),
    (1, "serve {model} --cache-size 1G"), (1, "chat {model} Hi --cache-folder {text}"),
    (1, "chat {model} Hi --cache-folder {new} --cache-size 1X"),
    (1, "serve {model} --max-body 99999999999999T"), (1, "plan gpt3-175b --devices ²xA100-80G"),
    (1, f"plan gpt3-175b --devices {'9' * 30}xA100-80G"), (1, "plan gpt3-175b --devices 0xA100-80G"),
    (2, "train {leaves}"), (2, "draw {model} --out /proc/x.png"), (2, "train gpt --out /proc/run"),
    (1, "convert {model} {text}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the paths of a model, and of files that are not models."""
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", ["one two three four"] * 9, 270)
    config = llama.Config(tokenizer.vocab_size, 24, 16, 32, n_layers=1, n_heads=2)
    checkpoints.save(llama.build(config), tokenizer, folder / "model")
    (folder / "text").write_text("no model\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 9)
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    names = {name: str(folder / name) for name in ("model", "text", "binary", "empty", "new", "pipe", "loop")}
    return {**names, "leaves": str(folder / "leaves.py")}


def numbers(every: bool) -> Iterator[tuple[set[int], str]]:
    """Yield each option with every wrong number, or by turns with one of them."""
    turns = count()

    def some(words: str, option: str, values: list[str]) -> Iterator[tuple[set[int], str]]:
        for value in values if every else [values[next(turns) % len(values)]]:
            yield {2}, f"{words} --{option} {value or chr(39) * 2}"

    for words, (whole, real) in NUMBERS.items():
        for option in whole.split():
            yield from some(words, option, [*WRONG, "0.5"])
        for option in real.split():
            yield from some(words, option, [value for value in WRONG if not value.isdigit()])


def rows(every: bool = True) -> list[tuple[set[int], str]]:
    """Return every invocation, or one of each sort, and the exit statuses that it may have."""
    missing = [({1}, f"{verb} '{model}' {more}") for verb, more in WITH_MODELS.items() for model in NO_MODELS]
    unknown = [({2}, f"{verb} --no-such-option") for verb in COMMANDS]
    unknown += [({2}, f"train {name} --nosuch") for name in recipe_names()]
    helped = [({0}, f"help {verb}") for verb in COMMANDS] + [({0}, f"help train {name}") for name in recipe_names()]
    return [*missing, *numbers(every), *unknown, *helped, *(({status}, words) for status, words in OTHER)]


def status(words: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    try:
        cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_the_table_has_300_invocations() -> None:
    assert len(rows()) >= 300


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("verb", sorted({words.split()[0] for _, words in rows()}))
def test_a_wrong_invocation_is_one_sentence_with_the_right_status(
    verb: str, every: bool, places: dict[str, str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    import shlex

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEIFU_DEBUG", raising=False)
    wrong = []
    for allowed, words in rows(every):
        if words.split()[0] == verb:
            code, said = status(shlex.split(words.format(**places)), capsys)
            last = said.strip().splitlines()[-1:] or [""]
            fine = code in allowed and "Traceback" not in said and "bug in keifu" not in said
            if not fine or (code and (said.count("\n") > 3 or len(last[0]) < 10)):
                wrong.append(f"{words} -> {code}, not {allowed}: {said.strip()[-300:]}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert not [*tmp_path.iterdir()], "nothing is begun that cannot end"


def run(arguments: list[str], closing: str) -> subprocess.CompletedProcess[str]:
    """Run `keifu` in a shell that closes or redirects a stream."""
    command = f'"$0" -m keifu "$@" {closing}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["bash", "-c", command, sys.executable, *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_closed_streams_and_full_disks_leave_no_traceback(closing: str) -> None:
    done = run(["models", "gpt2"], closing)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode == (1 if "full" in closing else 0)


def test_in_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, said = status(["generate", "nosuch", "Hi"], capsys)
    assert code in (1, 2) and "Traceback" not in said
