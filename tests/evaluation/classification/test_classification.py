"""Accuracy, F1 and the confusion matrix, beside scikit-learn's."""

import pytest
import torch

from keifu.errors import UserError
from keifu.evaluation.classification.metrics import Confusion
from keifu.inference.embeddings.classifiers import probabilities
from keifu.models import bert

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_figures_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    right, given = torch.randint(5, (200,)), torch.randint(4, (200,))  # the last label is never given
    given = torch.where(torch.rand(200) < 0.5, right.clamp(max=3), given)
    confusion = Confusion.of(right, given, ["a", "b", "c", "d", "e", "never seen"])
    assert confusion.counts[:5, :5].tolist() == metrics.confusion_matrix(right, given).tolist()
    assert confusion.accuracy == pytest.approx(metrics.accuracy_score(right, given))
    assert confusion.macro_f1 == pytest.approx(metrics.f1_score(right, given, average="macro"))
    precision, recall, f1, texts = metrics.precision_recall_fscore_support(right, given, zero_division=0)
    for found, expected in zip(confusion.scores[:5].T, (precision, recall, f1), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected).float())
    assert [row[-1] for row in confusion.result("texts").rows] == [*map(str, texts), "0"]


def test_a_label_that_is_given_and_never_right_counts_in_macro_f1() -> None:
    confusion = Confusion.of(torch.tensor([0, 0]), torch.tensor([0, 1]), ["right", "given", "never seen"])
    assert confusion.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_the_verdict_names_what_guessing_would_give() -> None:
    confusion = Confusion.of(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), ["cat", "dog"])
    assert confusion.majority == ("cat", 0.75)
    assert confusion.verdict() == "Accuracy 75.0% of 4 texts (always 'cat': 75.0%), macro F1 0.733."
    assert confusion.matrix() == (["right \\ given", "cat", "dog"], [["cat", "2", "1"], ["dog", "0", "1"]])
    assert confusion.to_json()["confusion"] == [[2, 1], [0, 1]]
    assert confusion.picture().startswith(PNG)


def test_a_model_without_labels_says_how_to_get_them() -> None:
    model = bert.build(bert.Config(vocab_size=20, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=2))
    with pytest.raises(UserError, match="no classification head: .*keifu train classifier"):
        probabilities(model, [[1, 2]], 0)
