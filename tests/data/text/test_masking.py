"""Masked words and sentence pairs: the paper's shares, nothing special hidden, and a batch by seed and step alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keifu.data.text import sentence_shards
from keifu.data.text.masked_lm import (
    MaskedText,
    MaskingScheme,
    MaskingVocabulary,
    RowPlanner,
    _replacement,
    _truncate,
    single_tokens,
    whole_words,
)
from keifu.data.text.sentence_shards import Sentences, SentenceShards, prepare_sentences
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

CLS, SEP, PAD, MASK, UNK = range(5)
ORDINARY = np.arange(5, 400)
VOCABULARY = MaskingVocabulary(CLS, SEP, PAD, MASK, ORDINARY, np.arange(400) % 3 == 0)
Made = Callable[..., MaskedText]


def numbered(documents: list[list[int]]) -> Sentences:
    """Return documents of sentences of the given lengths, whose tokens count from 5 on and begin again after 394."""
    sizes = np.array([size for sentences in documents for size in sentences])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    firsts = np.concatenate([[0], np.cumsum([len(sentences) for sentences in documents])])
    return Sentences((5 + np.arange(starts[-1]) % 395).astype(np.int32), starts, firsts)


@pytest.fixture(scope="module")
def shards() -> SentenceShards:
    random = np.random.default_rng(0)
    documents = [random.integers(1, 30, random.integers(1, 12)).tolist() for _ in range(120)]
    return SentenceShards(numbered(documents), numbered(documents[:30]), {"fingerprint": "f"})


@pytest.fixture
def made(shards: SentenceShards) -> Made:
    def make(batch_size: int = 16, seed: int = 1, **changes) -> MaskedText:
        return MaskedText(shards, VOCABULARY, MaskingScheme(**{"length": 64, "most": 10} | changes), batch_size, seed)

    return make


def restored(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the tokens, with the hidden ones restored."""
    there = batch["targets"] != -100
    rows = torch.arange(len(there))[:, None].expand_as(there)
    tokens = batch["tokens"].clone()
    tokens[rows[there], batch["places"][there]] = batch["targets"][there]
    return tokens


def test_rows_are_cls_first_sep_second_sep(made: Made) -> None:
    for step in range(40):
        batch = made().batch(step)
        for tokens, mask, segments in zip(restored(batch), batch["mask"], batch["segments"], strict=True):
            size = int(mask.sum())
            ids = tokens[:size].tolist()
            assert ids[0] == CLS and ids[-1] == SEP and ids.count(SEP) == 2 and size <= 64
            middle = ids.index(SEP)
            assert segments.tolist() == [0] * (middle + 1) + [1] * (size - middle - 1) + [0] * (len(tokens) - size)
            assert (tokens[size:] == PAD).all() and not mask[size:].any()
            for part in (ids[1:middle], ids[middle + 1 : -1]):  # a run of the text
                assert part and all((b - a) % 395 == 1 for a, b in zip(part, part[1:], strict=False))


def test_pairs_are_neighbours_or_of_two_documents(shards: SentenceShards) -> None:
    bounds, elsewhere = RowPlanner(shards.training, 61, 0.1, True).rows(np.random.default_rng(0))
    owner = np.searchsorted(shards.training.starts[shards.training.documents], bounds, side="right") - 1
    assert ((owner[:, 0] != owner[:, 2]) == (elsewhere == 1)).all()
    untouched = (bounds[:, 3] - bounds[:, 2] + bounds[:, 1] - bounds[:, 0]) < 61
    assert (bounds[:, 1] == bounds[:, 2])[(elsewhere == 0) & untouched].all()


def test_no_sentence_is_left_out_of_an_epoch(shards: SentenceShards) -> None:
    bounds, _ = RowPlanner(shards.training, 61, 0.1, False).rows(np.random.default_rng(0))
    seen = np.concatenate([np.arange(start, end) for start, end, *_ in bounds])
    assert np.array_equal(seen, np.arange(len(shards.training.tokens)))


def test_a_sentence_longer_than_a_row_counts_as_several() -> None:
    planner = RowPlanner(numbered([[100, 3], [7]]), 20, 0.0, False)
    assert planner.starts == [0, 20, 40, 60, 80, 100, 103, 110] and planner.documents == [0, 6, 7]
    assert planner.rows(np.random.default_rng(0))[0][:, :2].tolist()[-2:] == [[100, 103], [103, 110]]


def test_truncation_takes_from_the_longer_one_at_both_ends() -> None:
    bounds = np.repeat(np.array([[10, 40, 100, 110], [0, 30, 50, 81], [0, 4, 9, 12]]), 500, 0)
    cut = _truncate(bounds, 21, np.random.default_rng(0))
    sizes = cut[:, 1::2] - cut[:, ::2]
    assert (sizes[:500] == [11, 10]).all() and (sizes[500:1000] == [11, 10]).all() and (sizes[1000:] == [4, 3]).all()
    front = (cut - bounds)[:500, 0]
    assert 8.5 < front.mean() < 10.5 and front.min() < 7 < 12 < front.max()


def test_what_replaces_a_hidden_word_is_a_mask_or_a_word(made: Made) -> None:
    data = made(most=60)
    hidden, words = 0, 0
    for step in range(60):
        batch = data.batch(step)
        there = batch["targets"] != -100
        now = batch["tokens"].gather(1, batch["places"])[there]
        target = batch["targets"][there]
        hidden, words = hidden + int(there.sum()), words + int(batch["mask"].sum())
        assert (target >= 5).all() and ((now == MASK) | (now >= 5)).all()  # nothing special
        changed = batch["tokens"] != restored(batch)
        assert int(changed.sum()) == int((now != target).sum())
    assert 0.14 < hidden / words < 0.16


def test_no_more_than_the_most_and_no_place_twice(made: Made) -> None:
    batch = made(most=3, share=0.5).batch(0)
    there = batch["targets"] != -100
    assert batch["targets"].shape == (16, 3) and (there.sum(1) == 3).all()
    assert all(len(set(row.tolist())) == 3 for row in batch["places"])


def test_unknown_words_are_not_hidden() -> None:
    words = np.array([[True, True, False, True]])
    chosen = single_tokens(words, np.array([9]), np.random.default_rng(0))
    assert chosen.tolist() == words.tolist()


def test_whole_words_are_hidden_whole() -> None:
    random = np.random.default_rng(0)
    words = np.ones((50, 40), bool)
    words[:, 0] = words[:, -1] = False
    starts = words & (random.random(words.shape) < 0.5)
    starts[:, 1] = True
    chosen = whole_words(words, starts, np.full(50, 8), random)
    numbers = np.cumsum(starts, 1)
    for row in range(50):
        hidden = {*numbers[row][chosen[row]]}
        assert {*numbers[row][words[row] & ~chosen[row]]}.isdisjoint(hidden)
        assert 5 <= chosen[row].sum() <= 8


def test_a_batch_is_a_function_of_seed_and_step_alone(made: Made) -> None:
    one, other = made(), made()
    steps = [0, 1, one.steps_per_epoch, 3 * one.steps_per_epoch + 1]
    batches = [one.batch(step) for step in steps]
    for step, batch in reversed(list(zip(steps, batches, strict=True))):
        assert all(torch.equal(value, other.batch(step)[name]) for name, value in batch.items())
    assert not torch.equal(made(seed=2).batch(0)["targets"], batches[0]["targets"])
    whole = made(batch_size=2000, short=0.0)  # more rows than there are: a batch is an epoch
    assert whole.steps_per_epoch == 1
    assert whole.batch(0)["targets"].sum() != whole.batch(1)["targets"].sum()


def test_rows_of_a_batch_are_about_equally_long_and_none_is_lost(made: Made) -> None:
    data = made(batch_size=8, sentence_pairs=False)
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    padding = sum(int((~batch["mask"]).sum()) for batch in batches) / sum(batch["mask"].numel() for batch in batches)
    assert padding < 0.1
    widths = [batch["mask"].shape[1] for batch in batches]
    assert widths != sorted(widths) and data.largest["mask"].shape == (8, max(widths))
    rows = [tuple(row[row != PAD].tolist()) for batch in batches for row in restored(batch)]
    assert len({*rows}) > 0.95 * len(rows) and len(rows) == 8 * data.steps_per_epoch


def test_validation_is_the_same_whatever_the_seed_and_weighs_all_alike(made: Made) -> None:
    first, second = (list(made(seed=seed).validation()) for seed in (1, 9))
    assert len(first) == len(second) > 2
    pairs = zip(first, second, strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    tokens, targets, rows = (
        sum(int(f(batch).sum()) for batch in first)
        for f in (lambda b: b["mask"], lambda b: b["targets"] != -100, lambda b: torch.ones(len(b["tokens"])))
    )
    for batch in first:
        assert batch["word_weight"].tolist() == pytest.approx([tokens / targets] * len(batch["tokens"]))
        assert batch["pair_weight"].tolist() == pytest.approx([tokens / rows] * len(batch["tokens"]))


def test_without_pairs_a_row_is_one_run(made: Made) -> None:
    batch = made(sentence_pairs=False).batch(0)
    assert batch.keys() == {"tokens", "mask", "places", "targets", "word_weight", "pair_weight"}
    assert ((restored(batch) == SEP).sum(1) == 1).all()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))


def write(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": each}) for each in documents))
    return path


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    text = ["The cat sat on the mat. A dog came by and the cat ran off, unhappily.", "Dogs chase cats."]
    return train_tokenizer("wordpiece", text * 4, 120, lowercase=True)


def halves(line: str) -> list[str]:
    return [part for part in line.split(". ") if part]


def test_text_becomes_sentences_once(tmp_path: Path, wordpiece: Tokenizer, monkeypatch) -> None:
    documents = [f"the {('cat', 'dog', 'mat')[n % 3]}. a dog\ncats" for n in range(200)]
    source = write(tmp_path, [*documents, "", " \n"])
    found = prepare_sentences(source, wordpiece, halves, held_out=0.1)
    assert found.index["training"]["documents"] == 180 and found.index["validation"]["documents"] == 20
    texts = []
    for part in (found.training, found.validation):
        ends = part.starts[part.documents]
        spans = [part.tokens[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]
        texts += [wordpiece.decode(ids) for ids in spans]
        assert (np.diff(part.documents) == 3).all()
    assert {*texts} == {f"the {noun} a dog cats" for noun in ("cat", "dog", "mat")} and len(texts) == 200
    monkeypatch.setattr(sentence_shards, "_encode", None)  # it is not made again
    again = prepare_sentences(source, wordpiece, halves, held_out=0.1)
    assert np.array_equal(again.training.tokens, found.training.tokens) and again.fingerprint == found.fingerprint


def test_one_long_document_counts_as_several(tmp_path: Path, wordpiece: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text("the cat sat\n" * 330)
    found = prepare_sentences(tmp_path / "book.txt", wordpiece, halves, held_out=0.2)
    assert found.index["training"]["documents"] + found.index["validation"]["documents"] == 11
    data = MaskedText(found, MaskingVocabulary.of(wordpiece), MaskingScheme(length=16), 4)
    assert data.batch(0)["tokens"].shape[0] == 4


def test_the_tokenizers_own_vocabulary(wordpiece: Tokenizer) -> None:
    found = MaskingVocabulary.of(wordpiece)
    special = [wordpiece.token_id(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")]
    assert [found.cls, found.sep, found.pad, found.mask] == special
    assert not {*found.ordinary.tolist()} & {*special, wordpiece.token_id("[UNK]")}
    pieces = [wordpiece.backend.id_to_token(n) or "" for n in range(wordpiece.vocab_size)]
    assert found.goes_on.tolist() == [piece.startswith("##") for piece in pieces] and found.goes_on.any()


def test_what_cannot_be_is_refused(tmp_path: Path, shards: SentenceShards, wordpiece: Tokenizer) -> None:
    with pytest.raises(UserError, match="0 < share < 1.*share=1.5"):
        MaskingScheme(share=1.5)
    with pytest.raises(UserError, match="has no cls_token, sep_token, pad_token, mask_token"):
        MaskingVocabulary.of(train_tokenizer("characters", ["abc"], 10))
    bare = replace(VOCABULARY, goes_on=np.zeros(400, bool))
    with pytest.raises(UserError, match="whole_words needs a tokenizer that marks"):
        MaskedText(shards, bare, MaskingScheme(whole_words=True), 4)
    with pytest.raises(UserError, match="two documents or more"):
        RowPlanner(numbered([[3, 4]]), 20, 0.1, True)
    (tmp_path / "short.txt").write_text("a cat. a dog")
    with pytest.raises(UserError, match="has 1 documents"):
        prepare_sentences(tmp_path / "short.txt", wordpiece, halves)
    with pytest.raises(UserError, match="held_out is 0.9"):
        prepare_sentences(tmp_path / "short.txt", wordpiece, halves, held_out=0.9)


def test_shares_of_masked_random_and_kept_are_exact(likely: Callable[[int, int, float], bool]) -> None:
    """80%, 10% and 10%; any ordinary token stands for the second, also the one that stood there."""
    random, count = np.random.default_rng(5), 50_000
    tokens = random.choice(ORDINARY, count)
    now = _replacement(tokens, VOCABULARY, random)
    same = 0.1 / len(ORDINARY)
    assert likely(int((now == MASK).sum()), count, 0.8)
    assert likely(int((now == tokens).sum()), count, 0.1 + same)
    others = now[(now != MASK) & (now != tokens)]
    assert likely(len(others), count, 0.1 - same)
    for third in np.array_split(ORDINARY, 3):
        assert likely(int(np.isin(others, third).sum()), len(others), len(third) / len(ORDINARY))


def test_shares_of_pairs_and_of_short_rows_are_exact(likely: Callable[[int, int, float], bool]) -> None:
    """Half of the pairs that could follow each other do; a tenth of the rows is cut short."""
    documents = numbered([[9] * 8 for _ in range(300)])
    planner = RowPlanner(documents, 16, 0.0, True)
    elsewhere = np.concatenate([planner.rows(np.random.default_rng(seed))[1] for seed in range(6)])
    assert likely(int(elsewhere.sum()), len(elsewhere), 0.5) and len(elsewhere) > 4000
    long = numbered([[1] * 4000 for _ in range(20)])
    for share in (0.1, 0.3):
        bounds, _ = RowPlanner(long, 40, share, False).rows(np.random.default_rng(1))
        sizes = (bounds[:, 1] - bounds[:, 0])[:-20]
        cut = int((sizes < 40).sum())  # a length below is drawn from 2 to all
        assert likely(round(cut * 39 / 38), len(sizes), share), (cut, len(sizes))


def test_as_many_are_hidden_as_the_share_says(made: Made) -> None:
    batch = made(share=0.15, most=60).batch(0)
    wanted = np.clip(np.rint(0.15 * batch["mask"].sum(1).numpy()), 1, 60)
    words = ((restored(batch) >= 5) & batch["mask"]).sum(1).numpy()
    assert (batch["targets"] != -100).sum(1).tolist() == np.minimum(wanted, words).tolist()
