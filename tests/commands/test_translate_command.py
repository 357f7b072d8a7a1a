"""`keifu translate` and `keifu evaluate` on a model of a few thousand weights: a line in, a line out, and every mistake
one sentence."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sacrebleu
import torch

from keifu import checkpoints, cli
from keifu.commands import evaluate, translate
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text import generate
from keifu.models import llama, perceptron, transformer
from keifu.models.variants import t5

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCI.,?!"


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: threads that wait for each other cost tiny models more than they give, and very much on a busy
    machine."""
    torch.set_num_threads(1)


def tokenizer() -> Tokenizer:
    trained = train_tokenizer("characters", [LETTERS], 64, special_tokens=["<pad>", "</s>"])
    return Tokenizer(trained.backend, {"pad_token": "<pad>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny translator of letters."""
    torch.manual_seed(0)
    letters = tokenizer()
    ids = {"start_id": letters.pad_id, "end_id": letters.eos_id, "pad_id": letters.pad_id}
    config = transformer.Config(
        letters.vocab_size, context_length=24, dim=16, hidden_dim=24, n_layers=1, n_heads=2, **ids
    )
    folder = tmp_path_factory.mktemp("translator")
    checkpoints.save(transformer.build(config), letters, folder)
    return str(folder)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny language model."""
    letters = tokenizer()
    config = llama.Config(letters.vocab_size, context_length=24, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    folder = tmp_path_factory.mktemp("writer")
    checkpoints.save(llama.build(config), letters, folder)
    return str(folder)


def out(capsys: pytest.CaptureFixture, *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Return the one line of error of a command."""
    with pytest.raises(SystemExit):
        cli.main(words)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_the_argument_a_file_and_a_pipe_give_the_same(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"a pen\r\n")
    texts = [
        out(capsys, "translate", model, "a pen"),
        out(capsys, "translate", model, "--file", str(tmp_path / "a.txt")),
    ]
    pipe(monkeypatch, b"a pen")
    texts.append(out(capsys, "translate", model))
    assert len(set(texts)) == 1 and texts[0].endswith("\n") and texts[0].count("\n") == 1
    loaded, letters = checkpoints.load(model)
    from keifu.inference.text.translation import translate as function

    assert function(loaded, letters, ["a pen"]) == [texts[0].removesuffix("\n")]


def test_a_line_in_is_a_line_out(model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a pen", "", "It is. I am!", " ", "", "an"]
    pipe(monkeypatch, "\n".join(lines).encode() + b"\n")
    found = out(capsys, "translate", model).split("\n")
    assert len(found) == 7 and found[1] == found[3] == found[4] == found[6] == "" and found[0]
    for number in (0, 2, 5):
        assert out(capsys, "translate", model, lines[number], "--batch-size", "1") == found[number] + "\n"
    for data, written in ((b"", ""), (b"\n", "\n"), (b"\n\n", "\n\n")):
        pipe(monkeypatch, data)
        assert out(capsys, "translate", model) == written


@pytest.mark.usefixtures("opened")
def test_packed_weights_translate_by_the_native_step(model: str, capsys: pytest.CaptureFixture) -> None:
    plain, packed = (
        json.loads(out(capsys, "translate", model, "It is. I am!", "--json", *words))
        for words in ((), ("--weights", "int8"))
    )
    scores = [torch.tensor([part["score"] for part in told["sentences"]]) for told in (plain, packed)]
    assert not torch.equal(*scores)
    torch.testing.assert_close(*scores, rtol=0.05, atol=0)
    assert "There is no format of weights 'int9'. Did you mean" in said(
        capsys, "translate", model, "a", "--weights", "int9"
    )


def test_json_has_each_sentence(model: str, capsys: pytest.CaptureFixture) -> None:
    told = json.loads(out(capsys, "translate", model, "It is. I am!", "--json", "--max-tokens", "3", "--beam", "2"))
    assert [part["source"] for part in told["sentences"]] == ["It is.", "I am!"]
    assert all(part["tokens"] <= 3 and part["score"] < 0 for part in told["sentences"])
    plain = out(capsys, "translate", model, "It is. I am!", "--max-tokens", "3", "--beam", "2")
    assert plain == told["translation"] + "\n"


def test_an_unfinished_translation_is_said(model: str, capsys: pytest.CaptureFixture) -> None:
    cli.main(["translate", model, "a pen\n\nan", "--max-tokens", "1", "--alpha", "0"])
    error = capsys.readouterr().err
    assert error == "The translation reached its limit of tokens before its end in line 1, 3.\n"


def test_mistakes_are_one_sentence(
    model: str, writer: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "two texts, the argument and x.txt" in said(capsys, "translate", model, "a", "--file", "x.txt")
    assert "Sentence 2 of text 1 has 31 tokens, but this model takes 24" in said(
        capsys, "translate", model, "I am. " + "B" * 30
    )
    assert "--beam must be a whole number from 1" in said(capsys, "translate", model, "a", "--beam", "0")
    told = said(capsys, "translate", writer, "a")
    assert "does not translate" in told and "keifu generate" in told
    checkpoints.save(perceptron.build(perceptron.Config()), None, tmp_path)
    assert "choose an encoder-decoder" in said(capsys, "translate", str(tmp_path), "a")
    pipe(monkeypatch, b"a\n\xff\n")
    assert "standard input is not UTF-8 text: line 2" in said(capsys, "translate", model)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="There is no text"):
        translate.lines_from(None, None)


def test_evaluate_prints_figures_and_writes_the_translations(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    pairs, output = tmp_path / "pairs.tsv", tmp_path / "out.tsv"
    pairs.write_text("I am.\tIt is.\na pen\tan egg\n")
    words = ("evaluate", model, "--on", str(pairs), "--language", "en", "--by-length")
    lines = dict(
        line.split("\t", 1) for line in out(capsys, *words, "--output", str(output)).splitlines() if "\t" in line
    )
    assert lines["pairs"] == "2" and lines["BLEU signature"].startswith("nrefs:1|")
    assert lines["source words"] == "pairs\tBLEU\tchrF" and lines["1-5"].startswith("2\t")
    rows = [line.split("\t") for line in output.read_text().split("\n")]
    chrf = sacrebleu.corpus_chrf([row[2] for row in rows[1:3]], [[row[1] for row in rows[1:3]]]).score
    assert float(lines["chrF"]) == pytest.approx(chrf, abs=0.06)
    assert rows[0] == ["source", "reference", "translation"] and rows[2][:2] == ["a pen", "an egg"] and rows[3] == [""]
    assert rows[2][2] + "\n" == out(capsys, "translate", model, "a pen")
    told = json.loads(out(capsys, *words, "--json"))
    assert str(told["chrF"]) == lines["chrF"] and told["by length"][0]["pairs"] == 2


def test_evaluate_measures_a_language_model_on_a_text(
    writer: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a pen and an egg. " * 5)
    told = json.loads(out(capsys, "evaluate", writer, "--on", str(text), "--json"))
    assert told["tokens"] == 91 and told["bits per byte"] > 0 and "window of 24 tokens" in told["notes"][0]
    assert "--by-length has no meaning" in said(capsys, "evaluate", writer, "--on", str(text), "--by-length")
    items = tmp_path / "windows.jsonl"
    out(capsys, "evaluate", writer, "--on", str(text), "--output", str(items))
    windows = [json.loads(line) for line in items.read_text().splitlines()]
    assert sum(window["tokens"] for window in windows) == 91
    assert not generate.generate_batch(*checkpoints.load(writer), [], [])  # the model is still one that writes


def test_data_that_does_not_fit_names_what_does(model: str, writer: str, capsys: pytest.CaptureFixture) -> None:
    assert "Did you mean 'tatoeba-ja-en'?" in said(capsys, "evaluate", model, "--on", "tatoba-ja-en")
    assert "evaluates a language model" in said(capsys, "evaluate", model, "--on", "sotu")
    assert "evaluates a translator" in said(capsys, "evaluate", writer, "--on", "tatoeba-en-ja")
    said_of_zero = said(capsys, "evaluate", model, "--on", "tatoeba-ja-en", "--limit", "0")
    assert "--limit must be a whole number from 1" in said_of_zero


def test_the_languages_are_read_from_a_run(tmp_path: Path) -> None:
    assert evaluate.training_facts(tmp_path) == {}
    (tmp_path / "recipe.json").write_text('{"languages": ["ja", "en"]}')
    assert evaluate.training_facts(tmp_path)["languages"] == ("ja", "en")
    (tmp_path / "recipe.json").write_text('{"title": "gpt"}')
    assert "languages" not in evaluate.training_facts(tmp_path)


def test_every_task_offers_what_the_verb_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    known = {field for field in evaluate.Options.__dataclass_fields__}
    for name in evaluate.TASKS:
        task = import_module(f"keifu.evaluation.{name}")
        assert known >= task.OPTIONS and task.ABOUT and task.NAMES and not task.accepts("no such thing")
    with pytest.raises(UserError, match="cannot be evaluated yet"):
        evaluate.select_task(torch.nn.Linear(1, 1), "sotu")


def test_unknown_tokens_are_counted_among_those_of_the_source(capsys: pytest.CaptureFixture) -> None:
    parts = [SimpleNamespace(complete=True, unknown=number, source_tokens=9, tokens=5) for number in (2, 0)]
    translate._warn(cast(Any, [parts]))
    assert capsys.readouterr().err == "2 of 18 tokens are unknown to the model's vocabulary.\n"


def test_a_t5_translates_and_its_refusals_name_this_command(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    letters = tokenizer()
    ids: dict[str, Any] = {"start_id": letters.pad_id, "end_id": letters.eos_id, "pad_id": letters.pad_id}
    sizes: dict[str, Any] = dict(context_length=24, dim=16, hidden_dim=24, n_layers=1, n_heads=2, head_dim=8)
    checkpoints.save(t5.build(t5.Config(letters.vocab_size, **sizes, **ids)), letters, tmp_path)
    cli.main(["translate", str(tmp_path), "put it, an apple", "--max-tokens", "5", "--json"])
    [sentence] = json.loads(capsys.readouterr().out)["sentences"]
    assert sentence["source_tokens"] == 17 and sentence["tokens"] <= 5
    with pytest.raises(SystemExit):
        cli.main(["generate", str(tmp_path), "put it"])
    assert "use keifu translate" in capsys.readouterr().err
