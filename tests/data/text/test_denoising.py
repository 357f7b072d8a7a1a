"""Hidden spans: as many as T5 hides, never two that touch, and nothing of a text lost in inputs and targets."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from keifu.data.interleaving import source_of_row
from keifu.data.text.span_corruption import (
    MODES,
    CausalBatches,
    InfillingExamples,
    Markers,
    SpanCorruption,
    SpanCorruptionBatches,
    corrupt,
    random_spans,
    special_tokens,
    ul2,
)
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
END, PAD = 200, 201
MARKERS = Markers(dict(zip(MODES, (101, 102, 103), strict=True)), np.arange(1000, 1100), END, PAD)
SEED = st.integers(0, 10**6)


def t5_counts(length: int, rate: float, span: float) -> tuple[int, int]:
    """Return the numbers of T5's `random_spans_noise_mask`, as its documentation gives them."""
    hidden = min(max(int(np.round(length * rate)), 1), length - 1)
    return hidden, max(int(np.round(hidden / span)), 1)


def runs(places: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of hidden places."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], places.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """Return the original tokens: each sentinel of the inputs is replaced by its span in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= 1000:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    return [t for token in inputs for t in (spans[token] if token >= 1000 else [token])]


@given(st.integers(2, 300), st.sampled_from([(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]), SEED)
@settings(max_examples=60, deadline=None)
def test_spans_are_t5s_and_nothing_is_lost(length, kind, seed) -> None:
    span, rate = kind
    hidden, spans = SpanCorruption("[NLU]", rate, span).counts(length)
    expected = t5_counts(length, rate, span)
    assert (hidden, spans) == (expected[0], min(expected[1], expected[0], length - expected[0]))
    random = np.random.default_rng(seed)
    places = random_spans(4, length, hidden, spans, random)
    tokens = random.integers(0, 100, (4, length))
    inputs, targets = corrupt(tokens, places, MARKERS.sentinels)
    assert inputs.shape[1] == length - hidden + spans and targets.shape[1] == hidden + spans
    for row in range(4):
        found = runs(places[row])
        assert places[row].sum() == hidden and len(found) == spans
        assert not places[row, 0] and places[row, -1]
        assert all(b - a >= 1 for (_, a), (b, _) in zip(found, found[1:], strict=False))  # never merged
        for side in (inputs[row], targets[row]):
            assert [t for t in side.tolist() if t >= 1000] == list(range(1000, 1000 + spans))  # ascending, each once
        assert restored(inputs[row].tolist(), targets[row].tolist()) == tokens[row].tolist()


def test_all_divisions_are_equally_likely() -> None:
    places = random_spans(6000, 6, 3, 2, np.random.default_rng(0))
    kinds, counts = np.unique(places, axis=0, return_counts=True)
    assert len(kinds) == 4  # two ways to divide what is kept, two to divide what is hidden
    assert counts.min() > 1350 and counts.max() < 1650


def test_the_mixture_is_the_papers_table() -> None:
    found = [(each.mode, each.span, each.rate) for each in ul2()]
    assert found == [
        ("[NLU]", 3, 0.15), ("[NLU]", 8, 0.15), ("[NLG]", 3, 0.5), ("[NLG]", 8, 0.5), ("[NLG]", 64, 0.15),
        ("[NLG]", 64, 0.5), ("[S2S]", None, 0.5),
    ]  # fmt: skip
    assert [each.share for each in ul2((0.4, 0.4, 0.2), prefix=0.25)] == pytest.approx([0.2, 0.2, *[0.1] * 4, 0.2])
    assert [each.mode for each in ul2((0, 0, 1))] == ["[S2S]"]


def rows_of(context: int, count: int = 40, seed: int = 0):
    task = SpanCorruptionBatches(ul2(), MARKERS, context)
    windows = np.random.default_rng(seed + 1).integers(0, 100, (count, task.width))
    return task, windows, task.rows(windows, np.arange(count), np.random.default_rng(seed))


@pytest.mark.parametrize("context", [16, 37, 64, 129, 256])
def test_a_decoders_rows_hold_a_run_of_the_text_each(context: int) -> None:
    task, windows, rows = rows_of(context)
    tokens, mask = rows["tokens"], rows["mask"]
    assert tokens.shape == mask.shape == (40, context + 1) and tokens.dtype == np.int64
    seen = {mode: 0 for mode in (101, 102, 103)}
    for window, row, wanted in zip(windows.tolist(), tokens, mask, strict=True):
        seen[int(row[0])] += 1
        first, last = int(wanted.argmax()), len(wanted) - int(wanted[::-1].argmax())
        assert wanted[first:last].all() and first >= 2  # one run of targets, after at least one input
        assert (row[last:] == PAD).all()
        inputs, targets = row[1:first].tolist(), row[first:last].tolist()
        if row[0] == 103:
            assert inputs + targets == window[:context]  # the end of the text, and no end token: it went on
        else:
            assert targets.pop() == END
            text = restored(inputs, targets)
            assert any(window[i : i + len(text)] == text for i in range(task.width - len(text) + 1))
            assert context + 1 - last <= 2  # the row is as full as it can be
    assert seen == {101: 10, 102: 10, 103: 20}


def test_what_s_hides_is_drawn_evenly() -> None:
    for rate, least in ((0.5, 1), (0.25, 64)):
        task = SpanCorruptionBatches([SpanCorruption("[S2S]", rate, None)], MARKERS, 128)
        rows = task.rows(np.zeros((4000, 128), int), np.arange(4000), np.random.default_rng(0))
        cuts = rows["mask"].argmax(1) - 1
        assert cuts.min() >= least and cuts.max() == 127
        assert abs((128 - cuts).mean() / 128 - rate) < 0.02


def test_a_row_is_a_function_of_its_randomness_alone() -> None:
    first, second, other = (rows_of(64, seed=seed)[2]["tokens"] for seed in (3, 3, 4))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_hidden_tokens_alone_are_asked_for_without_the_marks() -> None:
    task = SpanCorruptionBatches([SpanCorruption("[NLU]", 0.15, 3)], MARKERS, 64)
    windows = np.random.default_rng(0).integers(0, 100, (5, task.width))
    rows = InfillingExamples(task).rows(windows, np.arange(5), np.random.default_rng(1))
    chosen = rows["tokens"][rows["mask"]]
    assert chosen.max() < 100 and len(chosen) == 5 * SpanCorruption("[NLU]", 0.15, 3).counts(task.width)[0]


def test_hidden_tokens_from_the_left_are_the_same_ones(monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    rows = import_module("mixture").CausalRows
    denoisers = [SpanCorruption("[NLU]", 0.15, 3), SpanCorruption("[NLG]", 0.5, 8)]
    both, left = (form(denoisers, MARKERS, 64) for form in (SpanCorruptionBatches, rows))
    windows, numbers = np.random.default_rng(0).integers(0, 100, (6, both.width)), np.arange(6)
    hidden = InfillingExamples(both).rows(windows, numbers, np.random.default_rng(1))
    read = left.rows(windows, numbers, np.random.default_rng(1))
    assert np.array_equal(hidden["tokens"][hidden["mask"]], read["tokens"][read["mask"]])
    for window, row, wanted in zip(windows.tolist(), read["tokens"], read["mask"], strict=True):
        text = row[: len(wanted) - int(wanted[::-1].argmax())].tolist()  # a text ends with something hidden
        assert any(window[i : i + len(text)] == text for i in range(len(window) - len(text) + 1))


def test_left_to_right_predicts_the_same_tokens_with_a_mode_and_without() -> None:
    windows, random = np.arange(60).reshape(3, 20), np.random.default_rng(0)
    plain, moded = CausalBatches(19), CausalBatches(20, mode=7)
    assert plain.width == moded.width == 20
    rows = moded.rows(windows, np.arange(3), random)
    assert np.array_equal(rows["tokens"][:, 1:], windows) and (rows["tokens"][:, 0] == 7).all()
    targets = rows["tokens"][rows["mask"]].reshape(3, -1)
    assert np.array_equal(targets, plain.rows(windows, np.arange(3), random)["tokens"][:, 1:])


def test_markers_are_the_tokenizers_own_and_text_cannot_spell_them() -> None:
    tokenizer = train_tokenizer("bpe", ["some text to learn from"] * 3, 400, special_tokens(20), split_digits=True)
    markers = Markers.of(tokenizer, 20)
    assert list(markers.modes) == list(MODES) and len(set(markers.sentinels.tolist())) == 20
    marks = {*markers.modes.values(), *markers.sentinels.tolist()}
    assert marks.isdisjoint(tokenizer.encode("[NLU] the <extra_id_0> and [S2S]"))
    assert len(tokenizer.encode("2024")) == 4
    with pytest.raises(UserError, match="no token '<extra_id_20>'"):
        Markers.of(tokenizer, 21)
    with pytest.raises(UserError, match="no end-of-text token"):
        Markers.of(train_tokenizer("characters", ["abc"], 10))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SpanCorruption("[NLX]", 0.15, 3), r"Did you mean '\[NL"),
        (lambda: SpanCorruption("[NLU]", 1.5, 3), "this one has rate 1.5"),
        (lambda: SpanCorruption("[S2S]", 0.6, None), "at most 0.5"),
        (lambda: ul2((0.5, 0.5, 0.5)), "whose sum is 1.5"),
        (lambda: SpanCorruptionBatches(ul2(), MARKERS, 8), "needs 16 or more"),
        (
            lambda: SpanCorruptionBatches(ul2(), MARKERS, 1024),
            "hidden spans, and the tokenizer has 100 sentinels",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(make, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_shares_of_the_denoisers_are_exact() -> None:
    """Of every stretch of rows each denoiser has its share, to a row; all of it known by the row's number alone."""
    shares = np.array([each.share for each in ul2((0.4, 0.4, 0.2))])
    whose = source_of_row(shares, np.arange(5000))
    for first, last in ((0, 5000), (1234, 1334), (77, 777)):
        counts = np.bincount(whose[first:last], minlength=len(shares))
        assert (np.abs(counts - shares * (last - first)) <= 1.5).all(), counts
    assert np.array_equal(source_of_row(shares, np.arange(300, 400)), whose[300:400])


@pytest.mark.parametrize(
    ("rate", "span", "length", "hidden", "spans"),
    [(0.15, 3, 512, 77, 26), (0.15, 8, 512, 77, 10), (0.5, 3, 512, 256, 85), (0.5, 64, 512, 256, 4),
     (0.15, 64, 512, 77, 1), (0.5, 8, 100, 50, 6), (0.15, 3, 10, 2, 1)],
)  # fmt: skip
def test_how_much_is_hidden_is_t5s_rule(rate: float, span: int, length: int, hidden: int, spans: int) -> None:
    denoiser = SpanCorruption("[NLU]", rate, span)
    assert denoiser.counts(length) == (hidden, spans)
    places = random_spans(50, length, hidden, spans, np.random.default_rng(0))
    assert (places.sum(1) == hidden).all()
    starts = places[:, 0] + (places[:, 1:] & ~places[:, :-1]).sum(1)
    assert (starts == spans).all()


def test_s_hides_any_length_alike(likely) -> None:
    task = SpanCorruptionBatches([SpanCorruption("[S2S]", 0.5, None)], MARKERS, 16)
    rows = task.rows(np.zeros((8000, 16), int), np.arange(8000), np.random.default_rng(0))
    lengths = np.bincount(rows["mask"].sum(1), minlength=17)
    used = np.flatnonzero(lengths)
    assert used.tolist() == list(range(int(used[0]), int(used[-1]) + 1)) and len(used) >= 14
    assert all(likely(int(lengths[each]), 8000, 1 / len(used)) for each in used)
