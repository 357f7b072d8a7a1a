"""Examples in batches, distorted pictures, toy sets and tables."""

import math

import pytest
import torch

from keifu.data.classification import tables
from keifu.data.classification.batches import LabelledTensors, TensorBatches
from keifu.data.classification.examples import sorted_labels
from keifu.data.classification.tables import read_table, standardisation
from keifu.data.images.augmentation import Distortion
from keifu.errors import UserError

ROWS = LabelledTensors(torch.arange(10.0)[:, None].repeat(1, 3), torch.arange(10))


def test_every_epoch_shows_every_row_once_in_an_order_of_its_own():
    data = TensorBatches(ROWS, ROWS, batch_size=4, seed=1)
    stream = torch.cat([data.batch(step)["targets"] for step in range(10)])
    epochs = stream.view(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_batch_is_a_function_of_the_seed_and_the_step():
    def shifted(inputs, generator):
        return inputs + torch.rand(inputs.shape, generator=generator)

    one, two = (TensorBatches(ROWS, ROWS, 3, seed=5, augment=shifted) for _ in range(2))
    late = two.batch(7)
    for step in range(9):
        torch.rand(1)  # the global generator does not matter
        batch = one.batch(step)
        assert torch.equal(batch["inputs"].floor()[:, 0].long(), batch["targets"])  # inputs stay with their class
    assert torch.equal(one.batch(7)["inputs"], late["inputs"])
    assert not torch.equal(
        one.batch(7)["inputs"], TensorBatches(ROWS, ROWS, 3, seed=6, augment=shifted).batch(7)["inputs"]
    )
    assert torch.equal(next(iter(one.validation()))["inputs"], ROWS.inputs)


def test_the_fingerprint_changes_with_any_number_and_with_what_is_held_out():
    changed = ROWS.inputs.clone()
    changed[3, 1] += 1e-6
    variants = [TensorBatches(ROWS, ROWS, 4, 0), TensorBatches(LabelledTensors(changed, ROWS.targets), ROWS, 4, 0)]
    variants.append(TensorBatches(ROWS, LabelledTensors(ROWS.inputs[:5], ROWS.targets[:5]), 4, 0))
    assert len({data.fingerprint for data in variants}) == 3
    assert variants[0].fingerprint == TensorBatches(ROWS, ROWS, 2, 9).fingerprint


def moments(pictures):
    """Return each picture's mass and centre in pixels."""
    grid = torch.arange(28.0)
    mass = pictures.sum((1, 2))
    return mass, torch.stack([(pictures.sum(1) * grid).sum(1), (pictures.sum(2) * grid).sum(1)], 1) / mass[:, None]


def test_distortion_moves_as_far_as_it_says_and_differs_from_picture_to_picture():
    pictures = torch.zeros(200, 28, 28)
    pictures[:, 10:18, 12:16] = 1.0
    still = Distortion(shift=0.0, turn=0.0, zoom=0.0, shear=0.0, bend=0.0)(pictures, torch.Generator())
    torch.testing.assert_close(still, pictures, atol=1e-5, rtol=0)
    moved = Distortion(shift=2.0, turn=0.0, zoom=0.0, shear=0.0, bend=0.0)(pictures, torch.Generator().manual_seed(0))
    mass, centre = moments(moved)
    off = centre - moments(pictures)[1]
    torch.testing.assert_close(mass, pictures.sum((1, 2)), rtol=1e-3, atol=0)
    assert 1.8 < float(off.abs().max()) <= 2.001 and abs(float(off.mean())) < 0.2
    turned = Distortion(shift=0.0, turn=45.0, zoom=0.0, shear=0.0, bend=0.0)(pictures, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments(turned)[0], mass, rtol=0.06, atol=0)
    assert float((turned[0] - turned[1]).abs().max()) > 0.2
    bent = Distortion(shift=0.0, turn=0.0, zoom=0.0, shear=0.0, bend=1.0)(pictures, torch.Generator().manual_seed(0))
    assert 0.1 < float((moments(bent)[1] - moments(pictures)[1]).norm(dim=1).mean()) < 2


def test_moons_and_spirals_are_balanced_apart_and_the_same_each_time():
    for make in (tables.moons, tables.spirals):
        x, targets = make(200)
        assert torch.equal(x, make(200)[0]) and not torch.equal(x, make(200, seed=1)[0])
        assert targets.bincount().tolist() == [100, 100]
        clean, kinds = make(200, noise=0.0)
        far = torch.cdist(clean[kinds == 0], clean[kinds == 1]).min()
        assert float(far) > 0.1


def test_a_table_knows_its_header_separator_label_and_classes(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\ufeffkind;a;b\n10;1.5;2\n9;-1e3;4\n\n10;0;0\n", encoding="utf-8")
    table = read_table(path, "kind")
    assert (table.columns, table.classes, table.targets.tolist()) == (("a", "b"), ("9", "10"), [1, 0, 1])
    assert table.inputs.tolist() == [[1.5, 2], [-1000, 4], [0, 0]]
    path.write_text("1,2,x\n3,4,y\n")
    assert read_table(path).columns == ("1", "2")
    assert read_table(path, "3").classes == ("x", "y")


def test_standardisation_leaves_a_constant_column_alone():
    mean, scale = standardisation(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert (mean.tolist(), scale.tolist()) == ([2.0, 5.0], [1.0, 1.0])
    assert math.isfinite(float(((torch.tensor([1.0, 5.0]) - mean) / scale).sum()))


def test_a_label_that_two_columns_have_is_an_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,kind,kind\n1,2,a\n3,4,b\n")
    assert read_table(path).classes == ("a", "b")
    with pytest.raises(UserError, match="has 2 columns called 'kind'; rename all but one"):
        read_table(path, "kind")


def test_labels_are_in_the_order_of_their_numbers_whatever_their_length():
    long = "9" * 5000  # Python converts no more than 4,300 digits
    assert sorted_labels(["b", long, "10", "9", "b"]) == ("9", "10", long, "b")


def test_a_label_for_a_toy_set_is_an_error():
    with pytest.raises(UserError, match="--label names a column of a CSV file"):
        tables.toy_table("xor", "kind")
