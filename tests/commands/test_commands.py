"""The verbs that a language model answers, on a model of a few thousand weights: text in from anywhere, text out."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from keifu import checkpoints, cli, memory
from keifu.commands import bench
from keifu.commands.shared.inputs import decode_utf8, join_texts, text_from
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text.engine import Engine
from keifu.models import llama, perceptron
from keifu.native import library
from keifu.native.compiler import Unavailable

LETTERS = "Once upon a time there was a small model."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny model that writes single characters."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("characters", [LETTERS + "\n"], 64)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=48, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.save(llama.build(config), tokenizer, folder)
    return str(folder)


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Give a text to standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def out(capsys: pytest.CaptureFixture, *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def test_a_missing_text_is_told_and_an_empty_one_begins_from_nothing(
    model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(SystemExit):
        cli.main(["generate", model, "--max-tokens", "2"])
    assert "There is no text: write it after the model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", model, "", "--max-tokens", "2"])
    assert "no token that begins a text" in capsys.readouterr().err  # others begin with it


def test_the_argument_a_file_and_a_pipe_are_the_same_text(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-tokens", "8", "--seed", "5")
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon\n")
    texts = [out(capsys, "generate", model, "Once upon", *options)]
    texts += [out(capsys, "generate", model, "--file", str(file), *options)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon\n")))
    texts += [out(capsys, "generate", model, *options, "--stream")]
    assert len(set(texts)) == 1 and len(texts[0].rstrip("\n")) >= 1


def test_the_argument_a_file_and_a_pipe_are_joined(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "middle.txt"
    file.write_text("time\n")
    pipe(monkeypatch, "small\n")
    assert join_texts("Once", file) == "Once\n\ntime\n\nsmall"
    assert join_texts("Once", None) == "Once"  # the pipe has been read
    pipe(monkeypatch, "small")
    told = json.loads(out(capsys, "generate", model, "a", "--json", "--max-tokens", "1"))
    assert told["prompt_tokens"] == len("a\n\nsmall")


def test_where_there_is_no_standard_input_the_argument_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as under pythonw, or where it was closed
    assert join_texts("Once", None) == "Once"


def test_what_is_not_said_is_the_models_own(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    fallback = json.loads(out(capsys, "generate", model, "Once", "--json", "--max-tokens", "3"))["sampling"]
    assert [fallback[name] for name in ("temperature", "top_k", "top_p", "min_p")] == [0.8, 40, 0.95, 0.05]
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 3}))
    own = json.loads(out(capsys, "generate", str(copy), "Once", "--json", "--max-tokens", "3"))["sampling"]
    assert [own[name] for name in ("temperature", "top_k", "top_p", "min_p")] == [0.5, 3, 1.0, 0.0]
    words = ("Once", "--json", "--max-tokens", "3", "--top-k", "9")
    given = json.loads(out(capsys, "generate", str(copy), *words))["sampling"]
    assert given == own | {"top_k": 9}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["generate", str(copy), "Once", "--max-tokens", "3", "--top-k", "9", "--seed", "6"])
    told = capsys.readouterr().err
    assert told.startswith(f"Loading {copy} ...\n")
    assert "temperature 0.5, top-k 9, seed 6 (the model's own settings except --top-k)" in told


def test_nothing_to_go_on_is_asked_for(
    model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: {"Prompt: ": "Once"}[prompt])
    typed = out(capsys, "generate", model, "--max-tokens", "4", "--seed", "5")
    assert typed == out(capsys, "generate", model, "Once", "--max-tokens", "4", "--seed", "5")
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    with pytest.raises(SystemExit):
        cli.main(["generate", model])
    assert capsys.readouterr().err.startswith("There is no text: write it after the model")


def test_json_has_all_that_is_known(model: str, capsys: pytest.CaptureFixture) -> None:
    told = json.loads(out(capsys, "generate", model, "Once", "--json", "--max-tokens", "4", "--seed", "5"))
    assert told["finish_reason"] in ("length", "stop") and told["seed"] == 5 and told["prompt_tokens"] == 4
    assert len(told["tokens"]) == len(told["log_probabilities"]) <= 4
    assert all(p <= 0 for p in told["log_probabilities"])
    plain = out(capsys, "generate", model, "Once", "--max-tokens", "4", "--seed", "5")
    assert plain == told["text"] + "\n"


def test_transcribe_without_a_file_is_refused_before_the_model_loads(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["transcribe", "no-such-model"])
    error = capsys.readouterr().err
    assert "keifu transcribe needs FILE...: see keifu transcribe --help." in error and "no-such" not in error


def test_an_empty_language_is_refused_before_the_model_loads(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["transcribe", "no-such-model", "no.wav", "--language", ""])
    assert "--language is empty: name the language, such as en or Japanese" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "amount"), [("--batch", "9" * 400), ("--tokens", "9" * 400), ("--batch", "٣")])
def test_a_plan_of_an_impossible_amount_is_one_sentence(
    option: str, amount: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "gpt3-175b", option, amount])
    assert stop.value.code == 1
    assert f"{option} is a number such as 300B or 1.4T, and not '{amount[:60]}'." in capsys.readouterr().err


def test_a_few_words_are_evaluated_with_a_warning(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("Once upon a time")
    warning = "tokens, too few for reliable figures"
    assert warning in out(capsys, "evaluate", model, "--on", str(tmp_path / "few.txt"))
    (tmp_path / "more.txt").write_text("Once upon a time " * 400)
    assert warning not in out(capsys, "evaluate", model, "--on", str(tmp_path / "more.txt"))


def test_a_full_context_is_said(model: str, capsys: pytest.CaptureFixture) -> None:
    cli.main(["generate", model, "Once", "--max-tokens", "0", "--seed", "1"])
    assert "The text fills the model's context of 48 tokens." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Once", "--file", "x.txt"], "There is no file 'x.txt'."),
        (["--file", "nowhere.txt"], "There is no file 'nowhere.txt'."),
        (["Once " * 40], "48"),
        (["Once", "--temperature", "-1"], "--temperature must be 0 or a number from 1e-06"),
    ],
)
def test_what_cannot_be_is_one_sentence(model: str, words: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", model, *words])
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_model_that_writes_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoints.save(perceptron.build(perceptron.Config()), None, tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["generate", str(tmp_path), "Once"])
    assert "writes no text: Perceptron is not a language model; choose one, such as smollm2." in capsys.readouterr().err


def test_bytes_that_are_no_text_are_named_by_their_line() -> None:
    assert decode_utf8(b"\xef\xbb\xbfa\r\n", "a.txt") == "a"
    with pytest.raises(UserError, match=r"^a\.txt is not UTF-8 text: line 2 has the byte 0xff\.$"):
        decode_utf8(b"a\n\xff", "a.txt")
    with pytest.raises(UserError, match=r"^a\.txt is not UTF-8 text: line 2 has the byte 0xff\.$"):
        decode_utf8(b"\xef\xbb\xbfa\n\xff", "a.txt")


def test_no_text_in_a_terminal_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="There is no text"):
        text_from(None, "keifu generate MODEL TEXT")


def test_convert_and_inspect_tell_what_they_do(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "copy"
    assert out(capsys, "convert", model, str(file), "--to", "hf") == f"Wrote {file}.\n"
    told = json.loads(out(capsys, "inspect", str(file), "--json"))
    assert told["settings"]["dim"] == 16 and told["rows"][0]["ours"] == "embedding.weight"
    assert "embedding.weight" in out(capsys, "inspect", model)


def test_convert_infers_the_format_and_writes_over_nothing_unasked(capsys, tmp_path: Path) -> None:
    tokenizer, model = train_tokenizer("bpe", ["one two three four"] * 9, 270), str(tmp_path / "model")
    config = llama.Config(tokenizer.vocab_size, 24, 16, 32, n_layers=1, n_heads=2)
    checkpoints.save(llama.build(config), tokenizer, model)
    for name, file in (("a.gguf", "a.gguf"), ("folder", "folder/config.json")):
        words = ("convert", model, str(tmp_path / name))
        out(capsys, *words)
        before = (tmp_path / file).read_bytes()
        assert before[:4] == (b"GGUF" if name == "a.gguf" else b"{\n  ")
        with pytest.raises(SystemExit):
            cli.main(words)
        assert capsys.readouterr().err.endswith("write over it with --replace.\n")
        (tmp_path / file).write_bytes(b"GGUF" if name == "a.gguf" else b"{}")
        out(capsys, *words, "--replace")
        assert (tmp_path / file).read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    out(capsys, "convert", model, str(tmp_path / "notes"))
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_convert_to_one_folder(model: str, tmp_path: Path) -> None:
    code = "import sys\nfrom keifu import checkpoints as c\nmodel = c.load(sys.argv[1])\nprint(flush=True)\ninput()\n"
    code += "for _ in range(9): c.save(*model, sys.argv[2])"
    words = [sys.executable, "-c", code, model, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(words, text=True, **pipes) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    for process in running:
        process.stdout.readline()
    for process in running:  # all have loaded: they write at the same time
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert not any(process.returncode for process in running), errors
    assert not [*(tmp_path / "out").glob(".*")]
    same = {file.name for file in Path(model).iterdir()} ^ {file.name for file in (tmp_path / "out").iterdir()}
    assert (
        not same
        and (tmp_path / "out" / "model.safetensors").read_bytes() == (Path(model) / "model.safetensors").read_bytes()
    )


def test_models_shows_every_published_size(capsys: pytest.CaptureFixture) -> None:
    lines = [line.split("\t") for line in out(capsys, "models").splitlines()]
    assert {"gpt2", "llama-7b", "smollm2-135m"} <= {line[0] for line in lines}
    assert next(line for line in lines if line[0] == "gpt2")[1] == "124,439,808"


def test_a_table_without_text_ends_with_its_first_problem(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "pairs.tsv").write_text("\n".join(f"猫{number}\tcat {number}" for number in range(30)))
    with pytest.raises(SystemExit):
        cli.main(["data", "check", str(tmp_path / "pairs.tsv"), "--tokenizer", model])
    said = capsys.readouterr().err
    assert "no text to train on: " in said and said.count("there is no field 'text'") == 1
    assert said.count("\n") == 1 and "is empty" not in said


def test_one_cause_gets_one_sentence(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(SystemExit):
        cli.main(["data", "check", str(tmp_path / "a.jsonl"), "--tokenizer", model])
    shown = capsys.readouterr()
    assert "line 1: the field 'text' is int, not text" in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_data_lists_its_licences_and_checks_a_file(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert "CC BY-SA 4.0" in out(capsys, "data")
    text = tmp_path / "a.txt"
    text.write_text(LETTERS)
    report = json.loads(out(capsys, "data", "check", str(text), "--tokenizer", model, "--json"))
    assert report["characters"] == len(LETTERS) and report["n_problems"] == 0


@pytest.mark.parametrize("weights", [[], ["--weights", "int8"]])
def test_bench_prints_its_figures_as_json(
    capsys: pytest.CaptureFixture, model: str, weights: list[str], request: pytest.FixtureRequest
) -> None:
    if weights:
        request.getfixturevalue("known_bandwidth")
    threads = torch.get_num_threads()
    try:
        numbers = "--prompt 9 --tokens 4 --streams 3 --threads 1 --json"
        figures = json.loads(out(capsys, "bench", model, *numbers.split(), *weights))
        pool = library.open_library().call("threads") if weights else 1
    except Unavailable as reason:
        pytest.skip(f"no native step: {reason}")
    finally:
        torch.set_num_threads(threads)
        library.use_threads(threads)
    assert (figures["threads"], figures["streams"], pool) == (1, 3, 1)
    assert figures["instructions"] == library.instructions_in_use() in library.INSTRUCTIONS
    assert all(figures[name] > 0 for name in ("prefill", "decode", "bandwidth", "peak", "share", "memory"))


@pytest.fixture
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the reading of a gigabyte."""
    monkeypatch.setattr(memory, "read_bandwidth", lambda device: 1e10)


@pytest.mark.usefixtures("known_bandwidth")
def test_bench_counts_the_tokens_of_all_streams(
    model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by half a second with each step of the engine."""
    steps = []
    step = Engine.step

    def counted(engine: Engine) -> list:
        steps.append(0.5)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: sum(steps)))
    found = {}
    for streams in (1, 3):
        words = f"--prompt 9 --tokens 4 --streams {streams} --threads {torch.get_num_threads()} --json"
        found[streams] = figures = json.loads(out(capsys, "bench", model, *words.split()))
        assert figures["prefill"] == streams * 9 / 0.5  # all prompts are read in one step
        assert figures["decode"] == streams / 0.5  # a step writes a token of each stream
    token = (found[3]["memory"] - found[1]["memory"]) / 2 / (9 + 4)  # bytes of the keys and values of a token
    for streams, figures in found.items():  # a step reads all weights, and on average half of what is written
        assert figures["bandwidth"] == pytest.approx((figures["memory"] - streams * 2 * token) * 2 / 1e9)
    with pytest.raises(SystemExit):
        cli.main(["bench", model, "--prompt", "44", "--tokens", "4"])
    assert "44 + 5 tokens exceed the context of 48" in capsys.readouterr().err


@pytest.mark.usefixtures("known_bandwidth")
def test_bench_compares_the_tokenizers_of_a_model_and_its_draft(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, tokenizer = checkpoints.load(model)
    wider, other = (tmp_path / name for name in ("wider", "other"))
    sizes = {"context_length": 48, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    more = tokenizer.vocab_size + 7  # embeddings without a token
    checkpoints.save(llama.build(llama.Config(vocab_size=more, **sizes)), tokenizer, wider)
    trained = train_tokenizer("characters", [LETTERS.replace("O", "Q") + "\n"], 64)
    checkpoints.save(llama.build(llama.Config(vocab_size=trained.vocab_size, **sizes)), trained, other)
    words = ["bench", model, "--prompt", "9", "--tokens", "4", "--json", "--draft"]
    assert json.loads(out(capsys, *words, str(wider)))["guessed"] > 0
    with pytest.raises(SystemExit):
        cli.main([*words, str(other)])
    assert "another vocabulary than the model" in capsys.readouterr().err


def test_evaluate_takes_packed_weights(capsys: pytest.CaptureFixture, model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(f"{LETTERS}\n" * 20)
    words = ["evaluate", model, "--on", str(text), "--json"]
    plain, packed = (json.loads(out(capsys, *words, *more)) for more in ([], ["--weights", "int8"]))
    assert packed["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)


def test_one_of_several_texts_is_chosen(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def last(prompt, answer, example): return answer.count('a') - len(answer)\n")
    words = ["generate", model, "Once", "--max-tokens", "2", "--temperature", "3", "--seed", "5"]
    texts = [out(capsys, *words[:-1], str(5 + number)) for number in range(3)]
    assert out(capsys, *words, "--vote", "3") in texts
    chosen = out(capsys, *words, "--best-of", "3", "--reward", f"{tmp_path / 'rewards.py'}:last")
    assert chosen == max(texts, key=lambda text: text.rstrip("\n").count("a") - len(text.rstrip("\n")))
    for wrong, said in (
        (["--vote", "3", "--best-of", "2", "--reward", "exact"], "choose in two ways"), (["--best-of", "3"], "belong"),
        (["--vote", "3", "--temperature", "0"], "all texts are the same"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            cli.main([*words[:5], *wrong])
        assert said in capsys.readouterr().err
    for wrong, said in (  # before the model, which does not exist, is loaded
        (["--vote", "3", "--temperature", "0"], "all texts are the same"),
        (["--best-of", "3", "--reward", "exat"], "exat"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["generate", "none", "Once", *wrong])
        assert said in capsys.readouterr().err
