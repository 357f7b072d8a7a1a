"""Epochs: every item once an epoch, in an order that the seed and the epoch decide, with random access by step."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from keifu.data.epochs import BatchSizeSchedule, Epochs, batch_size_stages
from keifu.errors import UserError


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 3))
def test_batches_are_the_stream_of_epochs_in_numpys_order(n: int, batch_size: int, seed: int) -> None:
    """A resumed run depends on these very orders."""
    stream = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(100)])
    epochs = Epochs(n, batch_size, seed)
    for step in (2, 0, 1):  # random access
        assert epochs.batch(step).tolist() == stream[step * batch_size : (step + 1) * batch_size].tolist()
    assert sorted(epochs.items(np.arange(n, 2 * n))) == list(range(n))
    assert epochs.steps == n / batch_size


def test_an_order_of_its_own() -> None:
    """Items may be whole batches; an epoch's order is computed once while it is in use."""
    seen = []

    def order(epoch: int) -> list[str]:
        seen.append(epoch)
        return [f"{epoch}a", f"{epoch}b"]

    epochs = Epochs(2, 1, 0, order)
    assert [epochs.item(step) for step in (0, 1, 2, 3, 0)] == ["0a", "0b", "1a", "1b", "0a"]
    assert seen == [0, 1]


def test_a_negative_step_is_an_error() -> None:
    """Of whatever is asked for by step."""
    schedule: BatchSizeSchedule = batch_size_stages([(2, 3)], 4)
    for ask in (Epochs(3, 2, 0).batch, Epochs(3, 1, 0).item, schedule.before, schedule.numbers):
        with pytest.raises(UserError, match="The step is -1, but steps are counted from 0"):
            ask(-1)
