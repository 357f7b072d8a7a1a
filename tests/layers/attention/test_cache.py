"""The key-value cache: rows that differ in length, go, go back, grow and begin alike hold what plain ones hold."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from keifu.layers.attention.kv_cache import KVState

ROWS, HEADS, DIM, LENGTH = 3, 2, 4, 31
TOKENS = torch.randn(ROWS, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


def make(rows: int = ROWS, capacity: int = LENGTH) -> KVState:
    return KVState([(HEADS, DIM), (1, DIM)], rows, capacity, torch.zeros(1))


def put(state: KVState, new: Tensor, padding: Tensor | None = None, window: int | None = None) -> Tensor:
    """Append tokens to both layers, and return the keys that the first one shows."""
    state.positions(new.shape[2], padding)
    keys, values = state.layer(0).append(new, -new, window)
    assert torch.equal(values, -keys)
    other, _ = state.layer(1).append(2 * new[:, :1], new[:, :1], window)
    assert torch.equal(other, 2 * keys[:, :1])
    state.advance()
    return keys


def fill(state: KVState, cuts: list[int], tokens: Tensor = TOKENS) -> Tensor:
    keys = tokens[:, :, :0]
    for start, end in pairwise([state.longest, *cuts]):
        keys = put(state, tokens[:, :, start:end])
    return keys


def holds(state: KVState, texts: list[Tensor]) -> None:
    """Assert that each row holds this text."""
    assert state.lengths == [text.shape[1] for text in texts]
    for row, text in enumerate(texts):
        assert torch.equal(state.keys[0][row, :, : text.shape[1]], text)
        assert torch.equal(state.values[1][row, :, : text.shape[1]], text[:1])


@pytest.mark.parametrize("cuts", [[3], [30], [2, 9, 11, 24], list(range(1, 31))])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [1, 0], [2, 2, 0, 1, 1]])
def test_selected_rows_go_on_as_if_alone(cuts: list[int], rows: list[int]) -> None:
    state = make()
    fill(state, cuts)
    state.select(torch.tensor(rows))
    holds(state, [TOKENS[row, :, : cuts[-1]] for row in rows])
    assert torch.equal(fill(state, [LENGTH], TOKENS[rows]), TOKENS[rows])


def test_rows_of_different_lengths_take_the_tokens_after_their_own() -> None:
    """Padding before the new ones is not kept; one token at a time, or several."""
    state, lengths = make(), [4, 0, 9]
    put(
        state,
        torch.stack([TOKENS[row, :, :9].roll(9 - n, 1) for row, n in enumerate(lengths)]),
        torch.tensor([5, 9, 0]),
    )
    holds(state, [TOKENS[row, :, :n] for row, n in enumerate(lengths)])
    for count in (1, 1, 5):
        new = torch.stack([TOKENS[row, :, n : n + count] for row, n in enumerate(state.lengths)])
        assert put(state, new).shape[2] == max(state.lengths)
        lengths = [n + count for n in lengths]
        holds(state, [TOKENS[row, :, :n] for row, n in enumerate(lengths)])
    state.select(torch.tensor([2, 0]))
    holds(state, [TOKENS[2, :, :16], TOKENS[0, :, :11]])


@pytest.mark.parametrize("window", [1, 4, 40])
def test_a_window_shows_what_its_tokens_see(window: int) -> None:
    state = make()
    for start, end in pairwise([0, 7, 8, 13]):
        shown = put(state, TOKENS[:, :, start:end], window=window)
        assert torch.equal(shown, TOKENS[:, :, max(0, start - window + 1) : end])


def test_a_pass_without_room_changes_nothing() -> None:
    state = make(capacity=7)
    fill(state, [6])
    with pytest.raises(ValueError, match="room for 7 tokens and was given 9"):
        fill(state, [9])
    holds(state, [TOKENS[row, :, :6] for row in range(ROWS)])
    assert state.token_bytes == 2 * (HEADS + 1) * DIM * 4


def test_an_interrupted_pass_is_written_over() -> None:
    state = make()
    fill(state, [6])
    state.positions(3)
    state.layer(0).append(*[torch.full((ROWS, HEADS, 3, DIM), 9.0)] * 2)  # and never the second layer
    assert torch.equal(fill(state, [7, 12]), TOKENS[:, :, :12])
