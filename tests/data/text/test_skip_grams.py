"""Words and pairs of neighbours: frequencies, distances and thinning as in the paper."""

import numpy as np
import pytest
import torch

from keifu.data.text.skip_grams import SkipGrams, count_words, word_ids, word_tokenizer
from keifu.errors import UserError

TEXT = ["The cat, the DOG.", "a dog? The end"]


def pairs(ids: np.ndarray, counts: list[int], **different: float) -> SkipGrams:
    values = {"window": 3, "negatives": 2, "sample": 1.0, "batch_size": 20_000, "seed": 1, "held_out": 0.0} | different
    return SkipGrams(ids, counts, **values)  # pyright: ignore[reportArgumentType]


def test_words_are_counted_in_lower_case_and_rare_ones_left_out() -> None:
    words, counts = count_words(TEXT, 4, 1)
    assert (words, counts) == (["<unk>", "the", "dog", "a"], [0, 3, 2, 1])
    assert count_words(TEXT, 9, 2)[0] == ["<unk>", "the", "dog"]
    assert word_ids(TEXT, words).tolist() == [1, 1, 2, 3, 2, 1]
    tokenizer = word_tokenizer(words)
    assert tokenizer.encode("A dog, the elk") == [3, 2, 0, 1, 0]
    with pytest.raises(UserError, match="Only 0 words occur 9 times"):
        count_words(TEXT, 9, 9)


def test_a_neighbour_is_within_the_window_and_near_ones_are_drawn_more_often() -> None:
    ids = np.arange(1000, dtype=np.int32)
    drawn = pairs(ids, [1] * 1000).batch(0)
    away = (drawn["words"][:, 0] - drawn["centers"] + 500) % 1000 - 500
    shares = [float((away.abs() == distance).float().mean()) for distance in (1, 2, 3)]
    assert set(away.abs().tolist()) == {1, 2, 3}
    np.testing.assert_allclose(
        shares, [11 / 18, 5 / 18, 2 / 18], atol=0.015
    )  # windows of 1, 2 and 3 are equally likely
    assert abs(float((away > 0).float().mean()) - 0.5) < 0.02


def test_noise_has_the_frequencies_to_the_power_of_three_quarters() -> None:
    counts = [0, 16, 81, 256]
    drawn = pairs(np.array([1, 2, 3] * 20, dtype=np.int32), counts).batch(0)["words"][:, 1:]
    found = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    np.testing.assert_allclose(found, np.array([0, 8, 27, 64]) / 99, atol=0.01)


def test_frequent_words_are_thinned() -> None:
    ids = np.repeat(np.array([1, 2], dtype=np.int32), [90_000, 10_000])
    kept = pairs(ids, [0, 90_000, 10_000], sample=0.1).training
    assert (kept == 2).sum() == 10_000
    assert abs((kept == 1).sum() / 90_000 - (0.1 / 0.9) ** 0.5) < 0.01


def test_batches_are_functions_of_seed_and_step_and_held_out_words_are_apart() -> None:
    ids = np.arange(1000, dtype=np.int32)
    first, again, other = (pairs(ids, [1] * 1000, seed=seed, held_out=0.2) for seed in (1, 1, 2))
    assert torch.equal(first.batch(5)["words"], again.batch(5)["words"])
    assert not torch.equal(first.batch(5)["words"], first.batch(6)["words"])
    assert not torch.equal(first.batch(5)["words"], other.batch(5)["words"])
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.batch(0)["centers"].max() < 800 <= min(int(batch["centers"].min()) for batch in first.validation())
    with pytest.raises(UserError, match="too few for a window of 3"):
        pairs(np.array([1, 1, 1], dtype=np.int32), [0, 3])
