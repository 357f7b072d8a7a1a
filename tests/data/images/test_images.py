"""Digits and their split."""

import gzip
from pathlib import Path

import pytest
import torch

from keifu.data.catalogue.catalogue import CATALOGUE
from keifu.data.images.catalogued import mnist, stratified_sample
from keifu.errors import UserError


def test_mnist_is_read_into_bytes_row_by_row(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    folder = tmp_path / CATALOGUE["mnist"].archive.folder
    folder.mkdir()
    pixels = [list(range(200)) + [0] * 584, [255] * 784]
    with gzip.open(folder / CATALOGUE["mnist"].member, "wt") as file:
        file.writelines(",".join(map(str, [*row, label])) + "\n" for row, label in zip(pixels, (7, 2), strict=True))
    pictures, labels = mnist()
    assert pictures.shape == (2, 28, 28) and pictures.dtype == torch.uint8
    assert pictures[0, 1, :3].tolist() == [28, 29, 30] and labels.tolist() == [7, 2]


@pytest.mark.parametrize("held_out", [1000, 333, 7])
def test_the_split_has_every_label_in_proportion(held_out: int) -> None:
    labels = torch.arange(10).repeat_interleave(500)
    train, test = stratified_sample(labels, held_out, seed=5)
    counts = labels[test].bincount(minlength=10)
    assert len(test) == held_out and counts.max() - counts.min() <= 1
    assert sorted(torch.cat([train, test]).tolist()) == list(range(5000))


def test_the_split_follows_the_seed() -> None:
    labels = torch.arange(10).repeat_interleave(50)
    first, again, other = (stratified_sample(labels, 100, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("held_out", [0, 50, 51])
def test_an_impossible_split_is_refused(held_out: int) -> None:
    with pytest.raises(UserError, match=f"{held_out} of 50"):
        stratified_sample(torch.zeros(50, dtype=torch.int64), held_out)
