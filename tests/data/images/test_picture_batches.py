"""Batches of pictures: what decides them; and augmentation: what it does to one picture."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keifu.data.images.augmentation import Augmentation, uniform
from keifu.data.images.batches import ImageBatches
from keifu.data.images.dataset import ImageDataset
from keifu.data.images.io import to_bytes, to_signed
from keifu.errors import UserError
from keifu.processes import Processes, row_elements, rows_of, use
from keifu.training.loader import Loader, own_rows
from keifu.training.objectives.diffusion import add_draws
from keifu.training.objectives.mapped_data import MappedData
from keifu.training.protocols import Data

ALL = Augmentation(True, 1, 0.2, 15.0, 0.1, 0.2, 0.3)


def toys(count: int, classes: bool = True) -> ImageDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 5, 7, 3), np.uint8)
    names = tuple(map(str, range(count)))
    labels = np.arange(count) % 2 if classes else np.full(count, -1)
    named = ("even", "odd") if classes else ()
    return ImageDataset(
        "toys",
        pixels,
        np.arange(count),
        names,
        {},
        labels,
        named,
        np.arange(count),
        np.arange(count),
        ("",) * count,
        "f",
    )


@pytest.mark.parametrize("rank", range(3))
def test_a_process_reads_makes_and_copies_only_its_own_rows(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the whole batch, also after a change that needs the whole batch."""
    read = list[int]()

    def take(self: ImageDataset, items: np.ndarray, take=ImageDataset.take) -> Tensor:
        read.append(len(items))
        return take(self, items)

    def share(batch: dict[str, Tensor], step: int, first: int) -> dict[str, Tensor]:
        return batch | {"share": torch.full((len(batch["indices"]),), float(batch["indices"].sum()))}

    monkeypatch.setattr(ImageDataset, "take", take)
    data = add_draws(ImageBatches(toys(10), toys(3), 7, seed=7, augmentation=ALL, evenly=True), 3)
    device = torch.device("cpu")
    for each, made in ((data, (2, 2, 3)[rank]), (MappedData(data, share, by_row=False), 7)):
        whole = each.batch(5)
        read.clear()
        with use(Processes(rank, 3)):
            own = Loader(partial(own_rows, each), device, ahead=False).get(5)
        assert read == [made] and rows_of(own) == 7
        assert {len(tensor) for tensor in own.values()} == {(2, 2, 3)[rank]}
        assert row_elements(own) == row_elements(whole)
        for rows in (1, 2, 9):
            parts = [Processes(rank, 3).micro_batches(batch, rows) for batch in (own, whole)]
            for one, other in zip(*parts, strict=True):
                assert one[:2] == other[:2] and one.batch.keys() == other.batch.keys()
                assert all(torch.equal(one.batch[key], other.batch[key]) for key in other.batch)


def test_fewer_rows_than_processes_are_whole_on_each() -> None:
    data = ImageBatches(toys(10), toys(3), 2)
    with use(Processes(2, 3)):
        own = own_rows(data, 0)
    assert torch.equal(own["pictures"], data.batch(0)["pictures"]) and rows_of(own) == 2


def test_an_epoch_has_every_picture_once_and_a_batch_depends_on_seed_and_step_alone() -> None:
    data = ImageBatches(toys(10), toys(3), 4, seed=7)
    assert isinstance(data, Data) and data.steps_per_epoch == 2.5
    shown = torch.cat([data.batch(step)["indices"] for step in range(5)]).tolist()
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10)) and shown[:10] != shown[10:]
    again = ImageBatches(toys(10), toys(3), 4, seed=7)
    assert all(torch.equal(again.batch(3)[name], value) for name, value in data.batch(3).items())
    assert not torch.equal(ImageBatches(toys(10), toys(3), 4, seed=8).batch(0)["indices"], data.batch(0)["indices"])


def test_an_epoch_has_one_picture_of_every_group_and_in_time_each_of_them() -> None:
    grouped = replace(toys(10), groups=np.array([5, 5, 5, 5, 5, 5, 2, 9, 9, 7]))
    data = ImageBatches(grouped, toys(3), 4, evenly=True)
    assert data.steps_per_epoch == 1 and data.fingerprint != ImageBatches(grouped, toys(3), 4).fingerprint
    epochs = [data.batch(step)["indices"].numpy() for step in range(60)]
    assert all(sorted(grouped.groups[each]) == [2, 5, 7, 9] for each in epochs)
    seen = Counter(np.concatenate(epochs).tolist())
    assert sorted(seen) == list(range(10)) and seen[6] == seen[9] == 60 and max(seen[n] for n in range(6)) < 25


def test_hard_negatives_bring_the_pictures_of_a_group_one_after_another() -> None:
    grouped = replace(toys(10), groups=np.array([5, 2, 5, 9, 5, 2, 2, 9, 5, 7]))
    data = ImageBatches(grouped, toys(3), 5, seed=3, hard_negatives=True)
    assert data.fingerprint != ImageBatches(grouped, toys(3), 5, seed=3).fingerprint
    orders = [
        np.concatenate([data.batch(2 * epoch + half)["indices"].numpy() for half in (0, 1)]) for epoch in range(40)
    ]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert all(np.count_nonzero(np.diff(grouped.groups[order])) == 3 for order in orders)  # of four groups
    assert len({tuple(grouped.groups[order]) for order in orders}) > 10 and len({tuple(o) for o in orders}) > 30


def test_what_is_in_a_batch() -> None:
    data = ImageBatches(toys(10), toys(3), 4)
    batch = data.batch(0)
    assert batch.keys() == {"pictures", "indices", "labels"} and batch["pictures"].shape == (4, 3, 5, 7)
    assert torch.equal(batch["pictures"], toys(10).take(batch["indices"].numpy()))
    assert torch.equal(batch["labels"], batch["indices"] % 2)
    assert ImageBatches(toys(10, classes=False), toys(3), 4).batch(0).keys() == {"pictures", "indices"}


def test_a_picture_is_varied_anew_at_each_step_with_the_batchs_seed() -> None:
    data = ImageBatches(toys(10), toys(3), 4, seed=7, augmentation=ALL)
    for step in (0, 3):
        batch = data.batch(step)
        plain = toys(10).take(batch["indices"].numpy())
        assert torch.equal(batch["pictures"], ALL(plain, 7, step, batch["indices"].numpy()))
        for seed, other in ((7, step + 1), (8, step)):
            assert not torch.equal(batch["pictures"], ALL(plain, seed, other, batch["indices"].numpy()))


def test_held_out_pictures_come_in_order_and_as_they_are() -> None:
    data = ImageBatches(toys(10), toys(3), 2, augmentation=ALL)
    batches = list(data.validation())
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1], [2]]
    assert torch.equal(torch.cat([batch["pictures"] for batch in batches]), toys(3).take(slice(None)))
    assert not torch.equal(data.batch(0)["pictures"], toys(10).take(data.batch(0)["indices"].numpy()))


def test_the_language_of_a_caption_is_drawn_anew() -> None:
    tokens = torch.arange(3 * 10 * 2).view(3, 10, 2)
    data = ImageBatches(toys(10), toys(10), 10, training_tokens=tokens, held_tokens=tokens)
    drawn = torch.zeros(10, 3)
    for step in range(60):
        batch = data.batch(step)
        drawn[batch["indices"], batch["languages"]] += 1
        assert torch.equal(batch["tokens"], tokens[batch["languages"], batch["indices"]])
    assert drawn.min() >= 5  # each of the ten pictures in each of the three languages
    (held,) = data.validation()
    assert held["languages"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_the_fingerprint_follows_all_that_decides_a_batch() -> None:
    tokens = torch.zeros(1, 10, 2, dtype=torch.int64)
    made = [
        ImageBatches(toys(10), toys(3), 4), ImageBatches(toys(10), toys(2).subset([0]), 4),
        ImageBatches(toys(10).subset(range(9)), toys(3), 4), ImageBatches(toys(10), toys(3), 5),
        ImageBatches(toys(10), toys(3), 4, seed=1), ImageBatches(toys(10), toys(3), 4, augmentation=ALL),
        ImageBatches(toys(10), toys(3), 4, training_tokens=tokens),
        ImageBatches(toys(10), toys(3), 4, training_tokens=tokens + 1),
    ]  # fmt: skip
    assert len({data.fingerprint for data in made}) == len(made)


def test_refusals() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        ImageBatches(toys(2), toys(2), 0)
    with pytest.raises(UserError, match="No picture of toys is for training: all of them are held out"):
        ImageBatches(toys(2).subset([]), toys(2), 1)
    with pytest.raises(UserError, match="The step is -1"):
        ImageBatches(toys(2), toys(2), 1).batch(-1)
    for field, value in (("crop", 1.0), ("rotation", 181.0), ("shift", -1), ("contrast", 1.5)):
        with pytest.raises(UserError, match=f"augmentation's {field} is {value}"):
            Augmentation(**{field: value})


def random_pictures(count: int = 60, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, 9, 12), dtype=torch.uint8, generator=generator)


def varied(augmentation: Augmentation, pictures: Tensor, seed: int = 3, step: int = 5, first: int = 0) -> Tensor:
    return augmentation(pictures, seed, step, np.arange(first, first + len(pictures)))


def test_what_happens_to_a_picture_depends_on_seed_step_and_index() -> None:
    pictures = random_pictures()
    whole = varied(ALL, pictures)
    assert torch.equal(varied(ALL, pictures[20:30], first=20), whole[20:30])
    assert not torch.equal(varied(ALL, pictures, seed=4), whole)
    assert not torch.equal(varied(ALL, pictures, step=6), whole)
    assert torch.equal(varied(Augmentation(), pictures), pictures)


def test_flipping_is_exact_and_hits_half() -> None:
    pictures = random_pictures(200)
    found = varied(Augmentation(flip=True), pictures)
    kept, turned = ((found == each).flatten(1).all(1) for each in (pictures, pictures.flip(-1)))
    assert bool((kept ^ turned).all()) and 70 < int(turned.sum()) < 130


def test_shifting_is_by_whole_pixels_in_every_direction_and_repeats_the_edge() -> None:
    pictures = random_pictures(300, channels=1)
    found = varied(Augmentation(shift=1), pictures)
    wide = F.pad(pictures.float(), (1, 1, 1, 1), mode="replicate").byte()
    places = Counter()
    for place, picture in enumerate(found):
        near = wide[place]
        fits = [(y, x) for y in range(3) for x in range(3) if torch.equal(near[:, y : y + 9, x : x + 12], picture)]
        assert len(fits) == 1
        places[fits[0]] += 1
    assert len(places) == 9 and min(places.values()) > 15


def test_turning_keeps_proportions() -> None:
    """A disc in the middle of a picture that is no square stays the same disc, whatever the angle."""
    y, x = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    disc = (255 * ((7 - (x**2 + y**2).sqrt()).clamp(0, 1))).byte().expand(20, 1, -1, -1)
    found = varied(Augmentation(rotation=180.0), disc)
    assert (found.float() - disc.float()).abs().mean() < 2
    bar = (255 * (x.abs() < 2)).byte().expand(20, 1, -1, -1)
    assert (varied(Augmentation(rotation=180.0), bar) != bar).flatten(1).any(1).all()


def test_cropping_enlarges_a_part() -> None:
    ramp = torch.arange(0, 252, 12, dtype=torch.uint8).expand(50, 1, 21, 21)
    found = varied(Augmentation(crop=0.5), ramp)[:, 0, 10].float()
    steps = found.diff(dim=1)[:, 5:-5].mean(1)
    assert steps.min() >= 5.5 and steps.max() <= 12.5 and steps.std() > 1
    assert found.min() >= 0 and found.max() <= 240


def test_colours_change_within_their_limits() -> None:
    grey = torch.full((100, 3, 4, 4), 100, dtype=torch.uint8)
    found = varied(Augmentation(brightness=0.1), grey).float()
    assert found.min() >= 74 and found.max() <= 126 and found[:, 0, 0, 0].std() > 5
    assert torch.equal(varied(Augmentation(contrast=0.5, saturation=1.0), grey), grey)
    coloured = random_pictures(channels=1).expand(-1, 3, -1, -1)
    assert torch.equal(varied(Augmentation(saturation=0.9), coloured), coloured)  # grey in colour
    assert not torch.equal(varied(Augmentation(contrast=0.5), coloured), coloured)


def test_the_numbers_are_uniform_and_independent() -> None:
    numbers = np.concatenate([uniform(seed, step, np.arange(500), 4) for seed in (0, -1) for step in range(5)])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.05


def test_bytes_come_back_from_numbers() -> None:
    values = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_bytes(to_signed(values)), values)
    assert to_signed(values).min() == -1 and to_signed(values).max() == 1
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
