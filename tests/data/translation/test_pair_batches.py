"""Batches of pairs: whole, bounded, once an epoch, the same for a seed and a step; and what a tokenizer can spell."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from keifu.data.epochs import by_rows
from keifu.data.text.dataset_report import coverage
from keifu.data.tokenizers.train import train_tokenizer
from keifu.data.translation.batches import EncodedPairs, EncodedSide, PairData, SpecialIds, by_tokens, encode
from keifu.errors import UserError

SPECIAL = SpecialIds(start=1, end=2, pad=0)


class Numbers:
    """Sentences of numbers, which are their own ids."""

    def encode_batch(self, texts, special=False, allow_special=False):
        return [[int(word) for word in text.split()] for text in texts]


def pairs(count: int = 300, longest: int = 12, seed: int = 0) -> EncodedPairs:
    """Pair i is i + 10 several times over, in both languages."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, (2, count))
    sides = [[" ".join([str(i + 10)] * n) for i, n in enumerate(row)] for row in lengths]
    return EncodedPairs(*(encode(Numbers().encode_batch, side) for side in sides))


def data(tokens: int = 200, seed: int = 0, train: EncodedPairs | None = None) -> PairData:
    train = train or pairs()
    return PairData(train, pairs(20, seed=9), SPECIAL, by_tokens(train.sizes(), tokens), seed, tokens_at_once=60)


def rows(batch: dict) -> list[int]:
    return (batch["target"][:, 1] - 10).tolist()


def size(batch: dict) -> int:
    return batch["source"].numel() + batch["target"].numel()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sentences_are_encoded_kept_and_padded() -> None:
    found = encode(Numbers().encode_batch, ["5 6 7", "8", "", "9 9"])
    assert found.lengths.tolist() == [3, 1, 0, 2] and found.ids.dtype == np.int32
    assert found.keep(np.array([3, 0])).ids.tolist() == [9, 9, 5, 6, 7]
    ids, mask = found.padded(np.array([1, 0, 2]), SPECIAL, begins=True)
    assert ids.tolist() == [[1, 8, 2, 0, 0], [1, 5, 6, 7, 2], [1, 2, 0, 0, 0]]
    assert mask.sum(1).tolist() == [3, 5, 2] and ids.dtype == torch.int64
    assert found.padded(np.array([1, 3]), SPECIAL, begins=False)[0].tolist() == [[8, 2, 0], [9, 9, 2]]


def test_many_sentences_are_encoded_in_parts(monkeypatch) -> None:
    whole = encode(Numbers().encode_batch, [str(n) for n in range(10)])
    monkeypatch.setattr("keifu.data.translation.batches.CHUNK", 3)
    parts = encode(Numbers().encode_batch, [str(n) for n in range(10)])
    assert np.array_equal(whole.ids, parts.ids) and np.array_equal(whole.starts, parts.starts)
    assert isinstance(encode(Numbers().encode_batch, []), EncodedSide)


def test_a_batch_has_the_fields_that_the_objective_takes() -> None:
    batch = data().batch(3)
    assert set(batch) == {"source", "source_mask", "target", "target_mask"}
    for side, begin in (("source", 0), ("target", 1)):
        ids, mask = batch[side], batch[f"{side}_mask"]
        lengths = mask.sum(1)
        assert mask.dtype == torch.bool and ids.shape == mask.shape and lengths.max() == ids.shape[1]
        assert torch.equal(mask, torch.arange(ids.shape[1]) < lengths[:, None])
        assert (ids[~mask] == SPECIAL.pad).all() and (ids[range(len(ids)), lengths - 1] == SPECIAL.end).all()
        assert not begin or (ids[:, 0] == SPECIAL.start).all()
    assert (batch["source"][:, 0] - 10).tolist() == rows(batch)  # sides belong together


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(2, 20), st.integers(45, 400), st.integers(0, 5))
def test_every_pair_comes_once_an_epoch_in_bounded_batches(count: int, longest: int, tokens: int, epoch: int) -> None:
    made = data(tokens, train=pairs(count, longest))
    first = epoch * made.steps_per_epoch
    batches = [made.batch(step) for step in range(first, first + made.steps_per_epoch)]
    assert sorted(row for batch in batches for row in rows(batch)) == list(range(count))
    assert max(map(size, batches)) <= tokens
    assert size(made.largest()) == max(map(size, batches))  # in every epoch


def test_rows_of_a_batch_are_of_similar_length() -> None:
    made = data(tokens=400, train=pairs(2000))
    batches = [made.batch(step) for step in range(made.steps_per_epoch)]
    padding = sum(int((~batch[f"{side}_mask"]).sum()) for batch in batches for side in ("source", "target"))
    assert padding / sum(map(size, batches)) < 0.05


def test_a_batch_is_a_function_of_the_seed_and_the_step_alone() -> None:
    one, other = data(), data()
    in_order = [one.batch(step) for step in range(3 * one.steps_per_epoch)]
    assert all(same(other.batch(step), in_order[step]) for step in reversed(range(len(in_order))))
    assert not same(data(seed=1).batch(0), in_order[0])
    lengths = [batch["target"].shape[1] for batch in in_order[: one.steps_per_epoch]]
    assert lengths != sorted(lengths)  # batches are shuffled too
    epochs = [in_order[i : i + one.steps_per_epoch] for i in (0, one.steps_per_epoch)]
    assert {frozenset(rows(b)) for b in epochs[0]} != {frozenset(rows(b)) for b in epochs[1]}
    with pytest.raises(UserError, match="step is -1"):
        one.batch(-1)


def test_validation_is_always_the_same_and_whole() -> None:
    made = data()
    first, second = list(made.validation()), list(made.validation())
    assert len(first) > 1 and all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(row for batch in first for row in rows(batch)) == list(range(20))
    assert all(size(batch) <= 60 for batch in first)


def test_bahdanaus_batches_are_cut_from_sorted_pools() -> None:
    train = pairs(100)
    made = PairData(train, pairs(5), SPECIAL, by_rows(train.sizes(), rows=8, pool=32), seed=3)
    assert made.steps_per_epoch == 13
    batches = [rows(made.batch(step)) for step in range(13)]
    assert sorted(map(len, batches)) == [4, *[8] * 12] and sorted(sum(batches, [])) == list(range(100))
    order = np.concatenate(made.batching.batches(np.random.default_rng(0)))
    lengths = train.sizes().sum(1)[order]
    assert all((np.diff(lengths[i : i + 32]) >= 0).all() for i in range(0, 100, 32)) and (np.diff(lengths) < 0).any()


def test_pairs_too_long_for_the_model_are_counted() -> None:
    every = pairs(100, 12)
    found = every.fitting(9)
    assert 0 < len(found) < 100 and {*found.indices} <= {*range(100)}
    assert found.target.lengths.tolist() == [every.target.lengths[place] for place in found.indices]
    assert max(found.source.lengths.max(), found.target.lengths.max()) == 8  # and a start or an end
    with pytest.raises(UserError, match="All 100 pairs have a side longer than 1 tokens, .* the shortest needs"):
        pairs(100).fitting(1)


def test_a_batch_too_small_for_a_pair_is_refused() -> None:
    with pytest.raises(UserError, match="A batch of 5 tokens cannot hold the longest pair, which has"):
        data(tokens=5)


def test_the_fingerprint_names_what_the_order_depends_on() -> None:
    prints = [data(), data(tokens=240), data(seed=1), data(train=pairs(seed=1))]
    train = pairs()
    prints += [PairData(train, train, SPECIAL, by_rows(train.sizes(), 8, pool)) for pool in (32, 64)]
    assert len({each.fingerprint for each in prints}) == 6 and data().fingerprint == prints[0].fingerprint


def test_coverage_tells_what_is_unknown_from_what_is_spelled_in_bytes(corpus) -> None:
    learned = train_tokenizer("bpe", ["a cat sat on the mat"] * 3, 300)
    full, partly = coverage(learned, ["cats sat", " at "]), coverage(learned, ["cat ねこ ね"])
    assert full.share == 1.0 and full.sentence("it") == "Every character of it is in the tokenizer's vocabulary."
    assert (partly.characters, partly.missing_count, partly.lost) == (6, 3, 0) and partly.examples == "ねこ"
    assert partly.sentence("it").startswith("50.00% of the characters of it")
    assert "nothing is unknown" in partly.sentence("it")
    words = train_tokenizer("wordpiece", ["a cat sat on the mat"] * 3, 60)
    lost = coverage(words, ["cat ねこ ね"])
    assert lost.lost == 3 and "3 of 6 characters become unknown" in lost.sentence("it")
    characters = coverage(train_tokenizer("characters", ["abc"], 60), ["abd"])
    assert (characters.missing_count, characters.lost) == (1, 1)
