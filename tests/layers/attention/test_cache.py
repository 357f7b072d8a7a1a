"""Caches that lose rows, go back and grow must hold what caches filled in the plain way hold."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from keifu.layers.attention.kv_cache import Cache, KeyValueCache, WindowCache

BATCH, HEADS, DIM, WINDOW, LENGTH = 3, 2, 4, 5, 31
TOKENS = torch.randn(BATCH, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


def make(kind: str, batch: int = BATCH, capacity: int = LENGTH) -> Cache:
    like = torch.zeros(1)
    if kind == "window":
        return WindowCache(batch, HEADS, WINDOW, DIM, like)
    return KeyValueCache(batch, HEADS, capacity, DIM, like)


def fill(cache: Cache, cuts: list[int], tokens: Tensor = TOKENS) -> Tensor:
    """Appends tokens in pieces that end at the cuts; the keys that the last piece may see."""
    keys = tokens[:, :, :0]
    for start, end in pairwise([cache.length, *cuts]):
        keys, values = cache.append(tokens[:, :, start:end], -tokens[:, :, start:end])
        assert torch.equal(values, -keys)
    return keys


def seen(cache: Cache, keys: Tensor) -> Tensor:
    """The part of the keys that one new token's attention reads."""
    return keys[:, :, -WINDOW:] if isinstance(cache, WindowCache) else keys


@pytest.mark.parametrize("kind", ["whole", "window"])
@pytest.mark.parametrize("cuts", [[3], [12], [30], [2, 9, 11, 24], list(range(1, 31))])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [1, 0]])
@pytest.mark.parametrize("start", [0, 2])
def test_selected_rows_go_on_as_if_alone(kind: str, cuts: list[int], rows: list[int], start: int) -> None:
    cache, alone = make(kind), make(kind, len(rows))
    fill(cache, cuts)
    cache.select(torch.tensor(rows), start)
    fill(alone, [cut - start for cut in cuts if cut > start], TOKENS[rows, :, start:])
    assert cache.length == alone.length == cuts[-1] - start
    for _ in range(LENGTH - cuts[-1]):
        end = cache.length + 1
        keys = fill(cache, [end], TOKENS[rows, :, start:])
        assert torch.equal(seen(cache, keys), seen(alone, fill(alone, [end], TOKENS[rows, :, start:])))


@pytest.mark.parametrize("kind", ["whole", "window"])
@pytest.mark.parametrize("cuts", [[4], [8], [29], [3, 11, 13], list(range(1, 20))])
def test_rollback_to_any_length_that_it_allows(kind: str, cuts: list[int]) -> None:
    for length in range(cuts[-1] + 1):
        cache, plain = make(kind), make(kind)
        fill(cache, cuts)
        if length < cache.earliest:
            with pytest.raises(ValueError, match=f"between {cache.earliest} and {cuts[-1]} tokens, not to {length}"):
                cache.rollback(length)
            continue
        cache.rollback(length)
        other = torch.cat([TOKENS[:, :, :length], -TOKENS[:, :, length:]], 2)  # what follows now is another text
        fill(plain, [length] if length else [], other)
        for end in range(length + 1, LENGTH):
            keys = fill(cache, [end], other)
            assert torch.equal(seen(cache, keys), seen(plain, fill(plain, [end], other)))


def test_a_whole_cache_goes_back_to_anything_and_a_window_only_where_it_is_whole() -> None:
    whole, window = make("whole"), make("window")
    fill(whole, [20])
    fill(window, [20])
    assert whole.earliest == 0
    assert window.earliest == 20  # a long prompt leaves just the window
    fill(window, [21, 22, 23])
    assert window.earliest == 20


def test_reserve_keeps_what_is_held_and_makes_room() -> None:
    cache = make("whole", capacity=7)
    fill(cache, [6])
    with pytest.raises(ValueError, match="room for 7 tokens and was given 9"):
        fill(cache, [9])
    cache.reserve(9)
    assert torch.equal(fill(cache, [9]), TOKENS[:, :, :9])
    cache.reserve(3)  # never less
    assert cache.keys.shape[2] == 9
    window = make("window")
    window.reserve(1000)
    assert window.keys.shape[2] == 2 * WINDOW


@pytest.mark.parametrize("window", [None, 4])
def test_a_whole_cache_shows_what_a_window_sees_and_goes_back_to_anything(window: int | None) -> None:
    like = torch.zeros(1)
    made = KeyValueCache(1, 2, 20, 3, like) if window is None else WindowCache(1, 2, window, 3, like)
    cache, keys = made.whole(2, 20), torch.randn(2, 2, 20, 3)
    for start, end in ((0, 7), (7, 8), (8, 13)):
        shown, values = cache.append(keys[:, :, start:end], -keys[:, :, start:end])
        first = 0 if window is None else max(0, start - window + 1)
        assert torch.equal(shown, keys[:, :, first:end]) and torch.equal(values, -shown)
    cache.rollback(2)
    assert cache.earliest == 0 and torch.equal(cache.append(keys[:, :, 2:3], keys[:, :, 2:3])[0], keys[:, :, :3])


def test_rows_begin_with_what_one_row_holds_behind_their_padding() -> None:
    like = torch.zeros(1)
    beginning, keys = KeyValueCache(1, 2, 5, 3, like), torch.randn(1, 2, 5, 3)
    beginning.append(keys, -keys)
    cache = KeyValueCache(4, 2, 9, 3, like)
    cache.keys.fill_(torch.nan)
    cache.begin(beginning, [0, 2, 5, 7])
    assert cache.length == 5
    for row, front in enumerate((0, 2, 5, 5)):
        assert torch.equal(cache.keys[row, :, front:5], keys[0, :, : 5 - front])
        assert torch.equal(cache.values[row, :, front:5], -keys[0, :, : 5 - front])
        assert not cache.keys[row, :, :front].any()
