"""Networks of neurons: their accuracy on held-out rows, and the class of a picture's file."""

import json

import pytest
import torch
from PIL import Image

from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.evaluation.classification import neurons
from keifu.evaluation.intervals import wilson
from keifu.evaluation.registry import EvalRequest
from keifu.inference.embeddings import row_classifiers
from keifu.models import mlp, perceptron


def brightness(dim: int) -> mlp.MLP:
    """Return a network that says "dark" if the inputs' sum is less than half of its maximum, else "bright"."""
    model = mlp.build(mlp.Config(dim=dim, hidden_dims=(), n_outputs=2, classes=("dark", "bright"))).eval()
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.stack([torch.zeros(dim), torch.ones(dim)]))
        model.layers[0].bias.copy_(torch.tensor([dim / 2, 0.0]))
    return model


def test_accuracy_is_that_of_the_rows_counted_by_hand(tmp_path) -> None:
    rows = [(0.9, 0.9, "b"), (0.1, 0.2, "a"), (0.3, 0.1, "b")]  # the last is wrong
    (tmp_path / "t.csv").write_text("x,y,label\n" + "\n".join(f"{x},{y},{label}" for x, y, label in rows) + "\n")
    found = neurons.evaluate(brightness(2), None, EvalRequest(str(tmp_path / "t.csv")))
    interval = "{:.4f} to {:.4f}".format(*wilson(2, 3))
    assert found.figures == {"accuracy": 0.6667, "accuracy, 95% interval": interval, "rows": 3}
    assert found.items and found.items.columns == ("right", "given")
    assert found.items.rows == [("b", "b"), ("a", "a"), ("b", "a")]


def test_a_neuron_that_knows_and_is_right_on_all_four_rows() -> None:
    neuron = perceptron.build(perceptron.Config())
    x, targets = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).double(), torch.tensor([0.0, 0, 0, 1]).double()
    list(perceptron.learn(neuron, x, targets))
    assert neurons.evaluate(neuron, None, EvalRequest("and")).figures["accuracy"] == 1
    assert neurons.evaluate(neuron, None, EvalRequest("or")).figures["accuracy"] == 0.5


def test_other_rows_are_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match="rows of 784 numbers in 10 classes, and the network is for 9 in 2"):
        neurons.evaluate(brightness(9), None, EvalRequest("mnist"))


def test_ink_on_paper_and_light_on_dark_are_the_same_row() -> None:
    model = brightness(100)
    picture = Image.new("L", (20, 20), 0)
    picture.paste(255, (3, 3, 17, 17))
    row = row_classifiers.row_of(model, picture)
    assert row.shape == (1, 100) and row[0, 0] == 0 and row[0, 55] == 1
    inverted = picture.point(lambda value: 255 - value).convert("RGB")
    torch.testing.assert_close(row_classifiers.row_of(model, inverted), row)
    with pytest.raises(UserError, match="reads 99 numbers, which are no square picture"):
        row_classifiers.row_of(brightness(99), picture)


def test_the_verbs_take_such_a_network(tmp_path, capsys) -> None:
    checkpoints.save(brightness(784), None, tmp_path / "net")
    Image.new("L", (28, 28), 20).save(tmp_path / "a.png")
    cli.main(["classify", str(tmp_path / "net"), str(tmp_path / "a.png"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["label"] == "dark" and sum(told["probabilities"].values()) == pytest.approx(1)
    with pytest.raises(SystemExit):
        cli.main(["classify", str(tmp_path / "net"), str(tmp_path / "a.png"), "--labels", "a,b"])
    assert "has labels of its own: leave --labels out" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("x,y,label\n1,2,a\n2,1,b\n")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "net"), "--on", str(tmp_path / "t.csv")])
    assert "rows of 2 numbers" in capsys.readouterr().err
