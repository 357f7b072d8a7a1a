"""Figures of evaluations against numbers that were worked out by hand or with NumPy."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keifu.commands import evaluate
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation import pairwise
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.images.distances import manifold
from keifu.evaluation.images.retrieval import split_pairs
from keifu.evaluation.intervals import bootstrap
from keifu.evaluation.registry import EvalRequest, ResultTable
from keifu.evaluation.text import few_shot, perplexity
from keifu.evaluation.text.tasks import TaskItem
from keifu.inference.text.likelihood import Likelihood
from keifu.recipes import resuming


def test_of_equally_likely_choices_the_first_one_is_given() -> None:
    assert few_shot._best([-2.0, -1.0, -1.0]) == 1


def test_bits_per_byte_count_bytes_and_not_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("名前は猫", encoding="utf-8")
    tokenizer = train_tokenizer("characters", ["名前は猫"], 64)
    ids, bytes_per_token = perplexity.tokens_of(EvalRequest(on=str(tmp_path / "a.txt")), tokenizer)
    assert len(ids) * bytes_per_token == 12


def test_columns_of_a_file_hold_no_tab_and_no_line_break_of_a_text() -> None:
    items = ResultTable(("source", "translation"), [("a\tb", "c\nd  e"), (1, None)])
    assert [*evaluate._columns(items)] == ["source\ttranslation", "a b\tc d e", "1\tNone"]


def test_minutes_of_a_resumed_run_count_at_its_pace() -> None:
    facts = {"seconds": 30.0, "step": 10, "described": {"settings": {"steps": 100}}}
    assert resuming._steps({"minutes": (5.0, 2.0)}, facts) == 40
    assert resuming._steps({"epochs": (2.0, 3.0)}, facts) == 150


def test_an_empty_answer_is_no_preference(tmp_path: Path) -> None:
    kept = pairwise.Judgements(tmp_path, {"by": "a person"})
    prompt = [{"role": "user", "content": "Who?"}]
    kept.add(pairwise.Judgement(prompt, ("", "I."), "B"))
    kept.add(pairwise.Judgement(prompt, ("You.", "I."), "A"))
    kept.add(pairwise.Judgement(prompt, ("You.", "I."), "even"))
    [line] = (tmp_path / pairwise.PREFERENCES).read_text().splitlines()
    assert json.loads(line) == {"prompt": prompt, "chosen": "You.", "rejected": "I.", "by": "a person"}
    assert kept.tally() == (1, 1, 1, 0)


def test_the_bootstrap_interval_has_95_percent() -> None:
    values = np.random.default_rng(5).normal(size=40)
    generator = np.random.default_rng(0)
    means = sorted(float(values[generator.integers(0, 40, 40)].mean()) for _ in range(1000))
    low, high = bootstrap(values.tolist())
    # place 0.025 · 999 = 24.975 among the sorted means, and the same from the other end
    assert low == pytest.approx(means[24] + 0.975 * (means[25] - means[24]))
    assert high == pytest.approx(means[974] + 0.025 * (means[975] - means[974]))


def test_precision_and_recall_count_balls_to_the_third_neighbour() -> None:
    real = torch.tensor([0.0, 1.0, 3.0, 6.0, 10.0])[:, None]
    drawn = torch.tensor([4.5, 13.5, 16.5, 18.0, 20.0, 40.0])[:, None]
    # third neighbours of the real ones: 6, 5, 3, 5, 9; so the balls are -6..6, -4..6, 0..6, 1..11, 1..19, and inside
    # are 4.5, 13.5, 16.5 and 18; the ball of the drawn 4.5 is -9..18, and has all five
    assert tuple(manifold(real, drawn)) == pytest.approx((4 / 6, 1.0))
    assert tuple(manifold(drawn, real)) == pytest.approx((1.0, 4 / 6))
    assert tuple(manifold(real, drawn, 2)) == pytest.approx((3 / 6, 1.0))  # 3..17 around 10
    assert tuple(manifold(real, drawn, 1)) == pytest.approx((2 / 6, 1.0))  # 6..14


def test_scores_divide_by_tokens_and_by_characters() -> None:
    item = TaskItem("Q", "b", ("abcdef", "b"))
    likely = [Likelihood((-1.0, -1.0, -1.0), False), Likelihood((-0.9,), False)]
    found = few_shot._scores(item, likely, [-5.0, -1.0])
    assert list(found) == list(few_shot.SCORES)
    total, by_token, by_character, beside = found.values()
    assert total == [-3.0, -0.9] and by_token == pytest.approx([-1.0, -0.9])
    assert by_character == pytest.approx([-0.5, -0.9]) and beside == pytest.approx([2.0, 0.1])
    assert few_shot._best(by_token) == 1 and few_shot._best(by_character) == 0


def test_a_clip_is_evaluated_on_the_part_for_testing() -> None:
    parts = split(read_images("emoji", 16, 3))
    assert split_pairs("emoji", 16, {}).test.names == parts.test.names
    assert not {*parts.test.names} & {*parts.validation.names, *parts.train.names}


def drawn_axes(monkeypatch: pytest.MonkeyPatch, confusion: Confusion) -> Any:
    """Return the axes of the confusion matrix's picture."""
    seen: list[Any] = []
    monkeypatch.setattr("keifu.evaluation.classification.metrics.png", lambda figure: seen.append(figure) or b"")
    confusion.picture()
    return seen[0].axes[0]


def test_rows_of_the_confusion_matrix_are_the_right_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    confusion = Confusion.of(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 0, 1]), ["cat", "dog"])
    axes = drawn_axes(monkeypatch, confusion)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("given", "right")
    shares = axes.images[0].get_array()
    assert shares.tolist() == [[pytest.approx(1 / 3), pytest.approx(2 / 3)], [0, 1]]  # two of three cats


def test_japanese_labels_have_a_font() -> None:
    confusion = Confusion.of(torch.tensor([0, 1]), torch.tensor([0, 1]), ["良い", "悪い"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a sign that no font has
        assert confusion.picture().startswith(b"\x89PNG")
