"""`keifu train bert`: a run from a text to a checkpoint that others load, the same bits when resumed, and going on."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import keifu
from keifu import cli
from keifu.inference.text.fill import fill

SMALL = {
    "model.dim": 32, "model.hidden-dim": 48, "model.n-layers": 2, "model.n-heads": 2, "model.context-length": 32,
    "masking.length": 32, "vocab-size": 150, "batch-size": 8, "warmup": 1, "precision": "float32",
}  # fmt: skip
NOUNS, COMMANDS = ("cat", "dog", "bird", "fish", "horse"), ("sees", "hears", "likes", "leaves")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 120 short documents, each about one animal."""
    folder = tmp_path_factory.mktemp("text")
    documents = [
        " ".join(f"The {NOUNS[n % 5]} {COMMANDS[(n + i) % 4]} the {NOUNS[(n * i) % 5]}." for i in range(6))
        for n in range(120)
    ]
    (folder / "animals.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in documents))
    return folder / "animals.jsonl"


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path_factory.getbasetemp() / "bert-cache"))


def train(text: Path, out: Path, *words: str, **changes: object) -> None:
    options = SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    gaps = ["--gaps", "The [MASK] sees the cat."]
    cli.main(["train", "bert", "--data", str(text), "--out", str(out), *flags, *gaps, *words])


def test_a_run_leaves_a_bert_that_transformers_loads(text: Path, tmp_path: Path, capsys) -> None:
    train(text, tmp_path, steps=4)
    said = capsys.readouterr()
    assert "perplexity" in said.out
    figures = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {name for line in figures for name in line}
    assert {"word_loss", "pair_loss", "pair_accuracy", "tokens_per_second"} <= told
    last = {name: value for line in figures for name, value in line.items() if name.startswith("validation")}
    assert last["validation_loss"] == pytest.approx(last["validation_word_loss"] + last["validation_pair_loss"])
    assert 0 <= last["validation_word_accuracy"] <= 1 and 0 <= last["validation_pair_accuracy"] <= 1
    _, sample = sorted((tmp_path / "samples").iterdir())  # before the first step and after the last
    assert sample.read_text().startswith("The [MASK] sees the cat.\n    ") and "%" in sample.read_text()

    model, tokenizer = keifu.load(tmp_path)
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path)
    row = transformers.AutoTokenizer.from_pretrained(tmp_path)("The cat [MASK].", "It likes fish.", return_tensors="pt")
    assert row["token_type_ids"].max() == 1
    with torch.no_grad():
        hidden = model.encode(row["input_ids"], row["token_type_ids"], row["attention_mask"].bool())
        expected = theirs(**row)
        assert torch.allclose(model.words(hidden), expected.prediction_logits, atol=1e-5)
        pairs = model.next_sentence(model.pool(hidden))
        assert torch.allclose(pairs, expected.seq_relationship_logits, atol=1e-5)
    assert len(fill(model, tokenizer, "a [MASK]")[0]) == 5


def test_without_pairs_and_on_from_there_with_them(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path / "words", "--masking.no-sentence-pairs", "--masking.whole-words", steps=2)
    first, _ = keifu.load(tmp_path / "words")
    assert not first.config.next_sentence and not first.config.pooled and first.config.words
    train(text, tmp_path / "pairs", "--start-from", str(tmp_path / "words"), steps=1, learning_rate=0.0)
    second, _ = keifu.load(tmp_path / "pairs")
    assert second.config.next_sentence and second.config.dim == 32
    kept = second.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in first.state_dict().items())


def test_a_sentence_that_is_longer_than_the_context_does_not_end_the_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = ["--masking.length", "12", "--model.context-length", "12"]
    gaps = ["--gaps", "The cat [MASK].", "The cat sees the dog and the dog sees the cat and the fish in the [MASK]."]
    train(text, tmp_path, *sizes, *gaps, steps=1)
    said = capsys.readouterr().err
    for step in (0, 1):
        reason = r"The text has \d\d tokens, and the model reads 12: shorten it\. Training goes on\."
        assert re.search(rf"The sample of step {step} was not made: {reason}", said)
    assert keifu.load(tmp_path)[0].config.context_length == 12


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--masking.length", "64"], "Rows of 64 tokens do not fit: the model has 32 positions"),
        (["--tokenizer", "bpe"], "which bpe does not have: learn wordpiece"),
        (["--masking.lenght", "32"], "Did you mean '--masking.length'?"),
        (["--start-from", "minilmm"], "minilm"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, sentence, text: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        train(text, tmp_path, *words, steps=1)
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1]
