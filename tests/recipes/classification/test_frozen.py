"""`keifu train classifier` with few labels: frozen embeddings and logistic regression, chosen by itself and said so."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import keifu
from keifu import checkpoints
from keifu.cli import main
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.embeddings.encoders import embed
from keifu.models import bert
from keifu.recipes.classification import frozen

WORDS = {"animal": ["cat", "dog", "horse", "cow"], "thing": ["table", "lamp", "chair", "spoon"]}
ROWS = [(f"{a} and {b} number {n}", label) for label, w in WORDS.items() for n in range(4) for a in w for b in w]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an encoder with random weights, whose tokenizer knows the words."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer("wordpiece", [text for text, _ in ROWS], 120)
    small = bert.Config(tokenizer.vocab_size, 16, 16, 32, 1, 2, pooled=False, words=False, next_sentence=False)
    folder = tmp_path_factory.mktemp("base")
    checkpoints.save(bert.build(small), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return path


def train(base: Path, table: Path, out: Path, *more: str) -> None:
    main(["train", "classifier", "--data", str(table), "--model", str(base), "--out", str(out), *more])


def config(run: Path) -> bert.Config:
    model: Any = keifu.load(run)[0]
    return model.config


@pytest.fixture(scope="module")
def trained(base: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "frozen"
    train(base, table, out, "--frozen", "--held-out", "0.2")
    return out


def test_the_regression_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(90, 7, generator=generator)
    targets = (inputs[:, :3] + torch.randn(90, 3, generator=generator)).argmax(1)
    for strength in (0.3, 30.0):
        theirs = linear_model.LogisticRegression(C=strength, max_iter=5000, tol=1e-10).fit(inputs, targets)
        weight, bias = frozen.fit(inputs, targets, 3, strength)
        np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=2e-4)
        np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-4)


def test_cross_validation_tests_each_row_once_and_never_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    fold = frozen.folds(targets, 3)
    assert fold.bincount().tolist() == [3, 3, 2]
    assert [len(set(fold[targets == label].tolist())) for label in range(3)] == [3, 2, 2]
    inputs, seen = torch.arange(8.0)[:, None], []

    def fit(inputs: torch.Tensor, targets: torch.Tensor, labels: int, strength: float, start: object = None):
        seen.append(sorted(inputs[:, 0].int().tolist()))
        return torch.zeros(labels, 1).double(), torch.tensor([1.0, 0, 0]).double()  # always label 0

    monkeypatch.setattr(frozen, "fit", fit)
    figures = frozen.cross_validate(inputs, targets, 3, 3)
    loss = math.log(math.e + 2) - 0.5  # by hand: four of eight rows have label 0, whose logit is 1, and the others 0
    assert all(found == pytest.approx((loss, 0.5)) for found in figures.values())
    left_out = [sorted({*range(8)} - {*rows}) for rows in seen]
    assert sorted(row for rows in {tuple(rows) for rows in left_out} for row in rows) == [*range(8)]


def test_a_run_classifies_and_embeds_and_its_head_reads_the_frozen_embedding(trained: Path, base: Path, capsys) -> None:
    capsys.readouterr()
    main(["classify", str(trained), "horse and cow number 9", "lamp and chair number 9", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["animal", "thing"]
    model: Any
    before: Any
    model, tokenizer = keifu.load(trained)
    before, _ = keifu.load(base)
    assert model.config == replace(before.config, labels=("animal", "thing"), sentence_head=True)
    texts = ["cat and lamp", "a much longer cat and horse and cow number 3"]
    points = embed(before, tokenizer, texts)
    assert torch.equal(points, embed(model, tokenizer, texts))  # the encoder did not change
    head = model.sentence_head.project
    logits = (points @ head.weight.T + head.bias).detach()
    ids = torch.tensor([tokenizer.encode(texts[1], special=True)])
    torch.testing.assert_close(model.classify(ids), logits[1:], atol=1e-5, rtol=0)


def test_keifu_evaluate_takes_the_run_and_says_how_sure_the_figure_is(trained: Path, tmp_path: Path, capsys) -> None:
    rows = [("cat and dog number 7", "animal"), ("lamp and spoon number 7", "thing"), ("cow and horse", "thing")]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    capsys.readouterr()
    main(["evaluate", str(trained), "--on", str(tmp_path / "new.csv"), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["accuracy"] == 0.6667 and figures["texts"] == 3 and figures["always 'thing'"] == 0.6667
    assert figures["accuracy, 95% interval"] == "0.2077 to 0.9385"  # Wilson's of 2 of 3
    (tmp_path / "new.csv").write_text("text,label\ncat,plant\n")
    with pytest.raises(SystemExit):
        main(["evaluate", str(trained), "--on", str(tmp_path / "new.csv")])
    assert "the model has no label 'plant'; it knows 'animal', 'thing'" in capsys.readouterr().err


def test_transformers_reads_the_encoder_of_the_run(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours: Any
    ours, tokenizer = keifu.load(trained)
    theirs = transformers.AutoModel.from_pretrained(trained).eval()
    ids = torch.tensor([tokenizer.encode("cat and spoon", special=True)])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, ours.encode(ids), atol=1e-5, rtol=0)


def test_few_labels_choose_it_and_options_of_fine_tuning_do_not(
    base: Path, table: Path, tmp_path: Path, capsys
) -> None:
    train(base, table, tmp_path / "few")
    said = capsys.readouterr().out
    assert "labelled rows are fewer than 3,000" in said and "--fine-tune trains all weights" in said
    assert "Cross-validation on the 115 training rows: accuracy" in said and "On held-out texts: Accuracy" in said
    assert config(tmp_path / "few").sentence_head
    assert (tmp_path / "few" / "confusion.png").exists() and (tmp_path / "few" / "report.html").exists()
    train(base, table, tmp_path / "steps", "--steps", "1")
    assert "--frozen is usually better than fine-tuning (--steps)" in capsys.readouterr().out
    train(base, table, tmp_path / "tuned", "--fine-tune", "--epochs", "1")
    assert "--frozen" not in capsys.readouterr().out
    for name in ("steps", "tuned"):
        assert config(tmp_path / name).pooled and not config(tmp_path / name).sentence_head
    train(tmp_path / "few", table, tmp_path / "again", "--steps", "1")  # a frozen run is an encoder to begin with
    assert not config(tmp_path / "again").sentence_head


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--frozen", "--fine-tune"], "--frozen and --fine-tune are two ways to learn"),
        (["--frozen", "--learning-rate", "0.1"], "--learning-rate is for fine-tuning"),
    ],
)
def test_options_that_contradict_are_refused(more, sentence, base: Path, table: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        train(base, table, tmp_path / "out", *more)
    assert sentence in capsys.readouterr().err
