"""Splits of image data sets into training, validation and test pictures. Similar pictures are never separated."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keifu.data.images.dataset import PARTS, ImageDataset
from keifu.errors import UserError
from keifu.untrusted import read_json_object

WHOLE_FAMILIES = {"whole_families": True}  # entry in the recipe.json of a run: see `split_of_run`


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Three parts of a set of pictures. No group is in two of them, and no family with `whole_families`."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    whole_families: bool = True

    def sentence(self) -> str:
        """Describe the sizes in a sentence."""
        sizes = len(self.train), len(self.validation), len(self.test)
        return "{:,} pictures for training, {:,} for validation, {:,} for testing.".format(*sizes)

    def evaluated(self) -> "tuple[ImageDataset, ImageDataset | None]":
        """Return the training and the test pictures. If the whole set is held out, return all of it and None."""
        return (self.train, self.test) if len(self.train) else (self.test, None)

    def clean_test(self) -> ImageDataset:
        """Return the test pictures that have no relative in training, such as another gender of the same emoji.

        These are all test pictures, unless the split was made with whole_families=False.
        """
        return self.test.subset(np.flatnonzero(~np.isin(self.test.families, self.train.families)))


def split(pictures: ImageDataset, share: float = 0.05, seed: int = 0, whole_families: bool = True) -> ImageSplit:
    """Hold out the fraction `share` of the groups for testing and as many for validation, in equal proportion of each
    class.

    The choice depends on the seed and the names of the pictures. If the source has a test part, it is used with its
    groups, and nothing is added to it.

    whole_families: whether the relatives of a held-out picture are held out too. False gives the split on which the
    weights `emoji` and `emoji-clip` of keifu 0.1 were trained; evaluate them on its `clean_test`.
    """
    if not 0 < share < 0.5:
        raise UserError(f"share is {share}, but the fraction held out for each part must be above 0 and below 0.5.")
    _, firsts, group = np.unique(pictures.groups, return_index=True, return_inverse=True)
    stated = np.array([PARTS.index(part) for part in pictures.parts], np.int8)
    part = np.zeros(len(firsts), np.int8)  # part of each group: 0 training, 1 validation, 2 testing
    np.maximum.at(part, group, stated)
    keys = [hashlib.sha256(f"{seed}\n{pictures.names[first]}".encode()).digest() for first in firsts]
    order = sorted(range(len(firsts)), key=lambda i: (int(pictures.labels[firsts[i]]), keys[i]))
    free = np.array([i for i in order if not part[i]], np.int64)
    for number, shift in ((2, 0.0), (1, 0.5)):
        if number not in stated:
            marks = np.floor(np.arange(len(free) + 1) * share + shift)
            part[free[np.diff(marks) > 0]] = number
    if whole_families:
        _, family = np.unique(pictures.families[firsts], return_inverse=True)
        of_family = np.zeros(len(firsts), np.int8)
        np.maximum.at(of_family, family, part)
        part = of_family[family]
    train, validation, test = (pictures.subset(np.flatnonzero(part[group] == number)) for number in range(3))
    return ImageSplit(train, validation, test, whole_families)


def recorded(run: Path) -> dict[str, Any]:
    """Return how a run held pictures out: see `split_of_run`. Empty for a model without a run."""
    return held_out_of(read_recipe(run))


def read_recipe(run: Path) -> dict[str, Any]:
    """Return the content of a run's recipe.json. Empty for a model without a run."""
    recipe = run / "recipe.json"
    return read_json_object(recipe) if recipe.is_file() else {}


def held_out_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run held pictures out, by its recipe. keifu 0.1 kept no record, and split relatives."""
    return {"whole_families": False, **(record.get("held_out") or {})} if record else {}


def split_of_run(pictures: ImageDataset, held_out: Mapping[str, Any]) -> ImageSplit:
    """Return the split that a run was trained on, without test pictures that have a relative in training.

    held_out: the entry of the run's recipe.json: the share, whether only distinct pictures were used, and whether whole
    families were held out. Missing settings have the defaults of `split`.
    """
    distinct_pictures = pictures.distinct() if held_out.get("distinct") else pictures
    parts = split(distinct_pictures, held_out.get("share", 0.05), whole_families=held_out.get("whole_families", True))
    return replace(parts, test=parts.clean_test())
