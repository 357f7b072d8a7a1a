"""`keifu train classifier`: what it learns, saves and refuses, from an encoder at hand and from nothing."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import keifu
from keifu import checkpoints
from keifu.cli import main
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.layers.lazy import settle
from keifu.models import bert, llama
from keifu.processes import Processes, use
from keifu.recipes.assistant import reward
from keifu.recipes.classification import classifier
from keifu.recipes.classification.classifier import Recipe
from keifu.recipes.running import train_job
from keifu.training.run import checkpoint

ANIMALS, THINGS = ["cat", "dog", "horse", "cow"], ["table", "lamp", "chair", "spoon"]
ROWS = [
    (f"{a} and {b} number {n}", label)
    for label, words in (("animal", ANIMALS), ("thing", THINGS))
    for n in range(5)
    for a, b in zip(words, words[1:] + words[:1], strict=True)
]
SMALL = bert.Config(context_length=16, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
FLAGS = ("--epochs", "10", "--learning-rate", "1e-2", "--batch-size", "8", "--cut", "12")


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)  # products this small only wait for a second


def table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pretrained encoder that has the head for masked words."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer("wordpiece", [text for text, _ in ROWS] * 2, 120)
    model = bert.build(replace(SMALL, vocab_size=tokenizer.vocab_size, pooled=False, next_sentence=False))
    folder = tmp_path_factory.mktemp("base")
    checkpoints.save(model, tokenizer, folder)
    return folder


def train(*words: object) -> None:
    main(["train", "classifier", *map(str, words)])


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the table, and a run that has learned it."""
    folder = tmp_path_factory.mktemp("trained")
    rows = table(folder, ROWS)
    train("--data", rows, "--model", base, *FLAGS, "--out", folder / "run")
    return rows, folder / "run"


def test_an_encoder_learns_the_labels_and_its_run_says_how_well(trained: tuple[Path, Path]) -> None:
    _, run = trained
    sample = sorted((run / "samples").glob("*.txt"))[-1].read_text()
    assert sample.startswith("Accuracy 100.0% of 4 texts (always ") and "precision  recall" in sample
    page = (run / "report.html").read_text()
    assert "confusion" in page and "data:image/png" in page and "validation accuracy" in page
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["data"][0]["labels"] == "animal, thing" and recipe["data"][0]["held out"] == 4


def test_transformers_reads_the_run_with_its_labels(trained: tuple[Path, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    _, run = trained
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run).eval()
    ours, tokenizer = keifu.load(run)
    ids = torch.tensor([tokenizer.encode("cat and spoon number 3", special=True)])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.classify(ids), atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "animal", 1: "thing"} and ours.config.labels == ("animal", "thing")


def test_the_weights_of_the_encoder_are_taken_and_a_head_for_the_same_labels_too(
    base: Path, trained: tuple[Path, Path]
) -> None:
    recipe, texts = Recipe(model=str(base)), tuple(text for text, _ in ROWS)
    model, _ = classifier.start_model(recipe, ("animal", "thing"), texts)
    weights = keifu.load(base)[0].state_dict()
    taken = [name for name in model.state_dict() if name in weights]
    assert len(taken) == len(model.state_dict()) - 4  # pooler and classifier are new
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in taken)
    learned = keifu.load(trained[1])[0].classifier.weight
    again = Recipe(model=str(trained[1]))
    same, other = (classifier.start_model(again, labels, texts)[0] for labels in (("animal", "thing"), ("a", "b")))
    assert torch.equal(same.classifier.weight, learned) and not torch.equal(other.classifier.weight, learned)


def test_a_model_that_is_split_is_not_asked_in_the_end(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    class Split(Processes):
        is_replicated = False

        def split(self, module: nn.Module, *_: object) -> nn.Module:
            settle(module)
            return module

    with use(Split()):
        train("--data", table(tmp_path, ROWS), "--model", base, *FLAGS[2:], "--out", tmp_path / "run")
        with pytest.raises(UserError, match="A reward model is trained whole on each process: leave out --mesh.shard"):
            reward.prepare(reward.Recipe())
    assert "On held-out" not in capsys.readouterr().out
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_new_model_learns_with_a_tokenizer_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ("--size.dim", "16", "--size.hidden-dim", "32", "--size.n-layers", "1", "--size.n-heads", "2")
    words = ("--model", "scratch", "--tokenizer", "wordpiece", "--size.vocab-size", "120", *sizes)
    train("--data", table(tmp_path, ROWS), *words, *FLAGS, "--out", tmp_path / "run")
    assert "On held-out texts: Accuracy 100.0% of 4 texts" in capsys.readouterr().out
    model, tokenizer = keifu.load(tmp_path / "run")
    assert model.config.dim == 16 and model.config.vocab_size == tokenizer.vocab_size <= 120


def final(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train a run and return its last state."""
    train_job(classifier.job_of(recipe, classifier.prepare(recipe), out), out, resume)
    return checkpoint.latest(out)[0].tensors


@pytest.mark.parametrize(
    ("rows", "flags", "sentence"),
    [
        (ROWS, ("--label", "lable"), "Did you mean 'label'?"),
        ([(text, "one") for text, _ in ROWS], (), "There is nothing to tell apart in"),
        (ROWS, ("--cut", "200"), "cut must be from 3 to 16 tokens"),
        (ROWS, ("--held-out", "1"), "--held-out must be a number from 0 and below 1"),
        (ROWS, ("--size.dim", "64"), "--size and --tokenizer are for a new model"),
        ([("cat " * 40, "animal"), *ROWS], (), "has 42 tokens; the model takes 16"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    base: Path, rows: list[tuple[str, str]], flags: tuple[str, ...], sentence: str, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        train("--data", table(tmp_path, rows), "--model", base, "--out", tmp_path / "run", *flags)
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_model_that_only_writes_cannot_be_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = train_tokenizer("characters", ["abc "], 16)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=48, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    checkpoints.save(llama.build(config), tokenizer, tmp_path / "causal")
    with pytest.raises(SystemExit):
        train("--data", table(tmp_path, ROWS), "--model", tmp_path / "causal", "--out", tmp_path / "run")
    assert "choose an encoder, such as minilm" in capsys.readouterr().err
