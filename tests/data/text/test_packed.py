"""Windows: each once an epoch, the same for a step whatever came before, and every held-out token predicted once."""

from collections import Counter

import numpy as np
import pytest
import torch

from keifu.data.epochs import BatchSizeSchedule, batch_size_stages, linear_batch_size
from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import Shards
from keifu.errors import UserError


def shards(training: int, validation: int = 50) -> Shards:
    """Return ids that tell their own place."""
    index = {"fingerprint": "f", "source": "numbers", "validation": {"tokens": validation, "bytes": 4 * validation}}
    return Shards(np.arange(training, dtype="<u2"), np.arange(validation, dtype="<u2"), index)


@pytest.mark.parametrize(
    ("length", "context", "batch"), [(1000, 16, 4), (1000, 7, 5), (40, 16, 3), (17, 16, 2), (500, 1, 9)]
)
def test_an_epoch_takes_every_window_once(length: int, context: int, batch: int) -> None:
    data = PackedText(shards(length), context, batch, seed=3)
    steps = range(3 * data.windows_per_epoch)  # so many batches are a whole number of epochs
    rows = torch.cat([data.batch(step)["tokens"] for step in steps])
    assert rows.shape == (len(steps) * batch, context + 1) and rows.dtype == torch.int64
    assert torch.equal(rows, rows[:, :1] + torch.arange(context + 1))  # each is a run of the text
    for first in range(0, len(rows), data.windows_per_epoch):
        starts = sorted(rows[first : first + data.windows_per_epoch, 0].tolist())
        assert np.all(np.diff(starts) == context)
        assert starts[0] < context and starts[-1] + 2 * context + 1 > length - context


def test_offsets_change_and_no_place_is_left_out() -> None:
    data = PackedText(shards(200), 8, 10)
    starts = Counter(int(row[0]) % 8 for step in range(300) for row in data.batch(step)["tokens"])
    assert set(starts) == set(range(8))
    seen = {token for step in range(300) for token in data.batch(step)["tokens"].flatten().tolist()}
    assert seen == set(range(200))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    source = shards(1000)
    one, other = PackedText(source, 16, 4, seed=1), PackedText(source, 16, 4, seed=1)
    in_order = [one.batch(step)["tokens"] for step in range(60)]
    assert all(torch.equal(other.batch(step)["tokens"], in_order[step]) for step in (59, 3, 31, 0, 15))
    assert not torch.equal(PackedText(source, 16, 4, seed=2).batch(0)["tokens"], in_order[0])
    assert not torch.equal(in_order[0], in_order[1])


def test_going_on_at_a_late_step_reads_nothing_of_the_steps_before(monkeypatch) -> None:
    data = PackedText(shards(1000), 16, 4)
    drawn = []
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed, draw=np.random.default_rng: (drawn.append(seed), draw(seed))[1]
    )
    data.batch(10**9)
    assert len(drawn) == 1


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_process_reads_only_its_rows_of_a_batch(world: int, monkeypatch) -> None:
    data = PackedText(shards(300), 7, batch_size_stages([(3, 2)], 7), seed=4)
    read = list[int]()
    make = data.make_batch
    monkeypatch.setattr(data, "make_batch", lambda part, items: (read.append(len(items)), make(part, items))[1])
    for step in (0, 3, 9):
        whole, parts = data.batch(step)["tokens"], list[torch.Tensor]()
        rows = len(whole)
        if rows < world:
            continue
        for rank in range(world):
            read.clear()
            own = rows * rank // world, rows * (rank + 1) // world
            batch, first, total = data.part(step, lambda _, own=own: own)
            assert (first, total, read) == (own[0], rows, [len(batch["tokens"])])
            parts.append(batch["tokens"])
        assert torch.equal(torch.cat(parts), whole)


def test_a_batch_may_span_epochs() -> None:
    data = PackedText(shards(40), 16, 5)  # fewer windows than rows
    rows = data.batch(0)["tokens"]
    assert data.windows_per_epoch < 5 == len(rows)


def test_rows_do_not_depend_on_how_many_stand_in_a_batch() -> None:
    source = shards(1000)
    small, large = PackedText(source, 16, 3), PackedText(source, 16, 6)
    assert torch.equal(torch.cat([small.batch(4)["tokens"], small.batch(5)["tokens"]]), large.batch(2)["tokens"])


@pytest.mark.parametrize(
    "growth",
    [
        batch_size_stages([(2, 5), (3, 11)], 7),
        linear_batch_size(1, 200, 9),
        linear_batch_size(4, 3, 5),
        linear_batch_size(2, 0, 3),
        batch_size_stages([], 4),
    ],
    ids=str,
)
def test_a_batch_that_grows_takes_the_windows_in_the_same_order(growth: BatchSizeSchedule) -> None:
    source = shards(1000)
    data, single = PackedText(source, 16, growth, seed=2), PackedText(source, 16, 1, seed=2)
    steps = [data.batch(step)["tokens"] for step in range(60)]
    assert [len(rows) for rows in steps] == [growth.at(step) for step in range(60)]
    rows = torch.cat(steps)  # no row twice, none left out, over several epochs
    assert len(rows) == growth.before(60) > data.windows_per_epoch
    assert torch.equal(rows, torch.cat([single.batch(i)["tokens"] for i in range(len(rows))]))
    late = PackedText(source, 16, growth, seed=2)
    assert all(torch.equal(late.batch(step)["tokens"], steps[step]) for step in (59, 4, 5, 12))
    assert len(data.largest()["tokens"]) == data.batch_size == max(growth.rows) == growth.at(10**9)


@pytest.mark.parametrize(("first", "over", "last"), [(16, 40_000, 244), (1, 7, 9), (3, 50, 3), (2, 1000, 3)])
def test_a_linear_ramp_grows_with_the_rows_seen(first: int, over: int, last: int) -> None:
    growth, seen = linear_batch_size(first, over, last), 0
    for step in range(1000):
        assert growth.before(step) == seen
        assert growth.at(step) == min(last, first + (last - first) * seen // over)
        seen += growth.at(step)


def test_palms_batch_grows_where_its_paper_says() -> None:
    growth = batch_size_stages([(512, 50_000), (1024, 115_000)], 2048)
    assert [growth.at(step) for step in (0, 49_999, 50_000, 114_999, 115_000, 254_999)] == [
        512, 512, 1024, 1024, 2048, 2048
    ]  # fmt: skip
    assert growth.before(255_000) * 2048 == pytest.approx(780e9, rel=0.02)  # its tokens


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: batch_size_stages([(2, 5), (3, 5)], 7), r"must ascend from above 0, but are \(5, 5\)"),
        (lambda: batch_size_stages([(2, 0)], 7), r"must ascend from above 0, but are \(0,\)"),
        (lambda: batch_size_stages([(0, 5)], 7), "batch_size is 0"),
        (lambda: linear_batch_size(8, 100, 7), "must start with 1 to 7 rows, not 8"),
        (lambda: linear_batch_size(0, 100, 7), "must start with 1 to 7 rows, not 0"),
    ],
)
def test_a_growth_that_cannot_be_is_refused(make, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_validation_is_always_the_same_and_predicts_each_token_once() -> None:
    data = PackedText(shards(100, 50), 8, 4)
    first, second = ([batch["tokens"] for batch in data.validation()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and [len(b) for b in first] == [4, 2]
    targets = torch.cat(first)[:, 1:].flatten().tolist()
    assert targets == list(range(1, 49))


def test_validation_can_be_limited_to_windows_spread_evenly() -> None:
    starts = [
        row[0].item()
        for b in PackedText(shards(100, 161), 8, 4, validation_tokens=40).validation()
        for row in b["tokens"]
    ]
    assert starts == [0, 32, 64, 96, 128]
    assert len(list(PackedText(shards(100, 161), 8, 4, validation_tokens=1).validation())) == 1


def test_the_fingerprint_names_what_the_order_depends_on() -> None:
    source = shards(100)
    prints = [PackedText(source, *given).fingerprint for given in [(8, 4, 0), (9, 4, 0), (8, 5, 0), (8, 4, 1)]]
    assert len(set(prints)) == 4 and all(each.startswith("f-context") for each in prints)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((shards(16), 16, 4), "16 tokens to train on and .* held out, but a context of 16 needs at least 17"),
        ((shards(100, 16), 16, 4), "16 held out.*hold out a share of 0.15, or lower the context length to 15"),
        ((shards(9, 2), 64, 4), "give more text, or lower the context length to 4 or less and hold out a share of 0.5"),
        ((shards(1, 1), 64, 4), "at least 65 of each: give more text[.]"),
        ((shards(100), 0, 4), "context_length is 0"),
        ((shards(100), 8, 0), "batch_size is 0"),
    ],
)
def test_what_cannot_be_is_refused(given: tuple, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PackedText(*given)


def test_steps_are_counted_from_zero() -> None:
    with pytest.raises(UserError, match="step is -1"):
        PackedText(shards(100), 8, 4).batch(-1)
