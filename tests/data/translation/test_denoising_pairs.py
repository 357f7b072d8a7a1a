"""Texts without labels as sources and targets: nothing of a window is lost, and a batch depends on seed and step."""

import numpy as np
import pytest
import torch

from keifu.data.text.span_corruption import SpanCorruption
from keifu.data.translation.batches import SpecialIds
from keifu.data.translation.denoising import DenoisedText, HiddenEnd, HiddenSpans, token_stream
from keifu.errors import UserError

SPECIAL = SpecialIds(500, 501, 502)
SENTINELS = list(range(600, 620))
TEXT = np.arange(400, dtype=np.int32)


def data(task: HiddenSpans | HiddenEnd, **changes: int) -> DenoisedText:
    return DenoisedText(TEXT, TEXT[:90], task, SPECIAL, **{"length": 40, "rows": 6, "seed": 3} | changes)


def restored(source: list[int], target: list[int]) -> list[int]:
    """Return the window: each sentinel of the source is replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= SENTINELS[0]:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    return [t for token in source for t in (spans[token] if token >= SENTINELS[0] else [token])]


@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.5, 2.0), (0.3, 1.0)])
def test_spans_and_the_rest_are_the_window(rate: float, span: float) -> None:
    batch = data(HiddenSpans(rate, span, SENTINELS)).batch(7)
    hidden, spans = SpanCorruption("[NLU]", rate, span).counts(40)
    assert batch["source"].shape == (6, 40 - hidden + spans + 1)
    assert batch["target"].shape == (6, 1 + hidden + spans + 1)
    for source, target in zip(batch["source"].tolist(), batch["target"].tolist(), strict=True):
        assert (source[-1], target[0], target[-1]) == (SPECIAL.end, SPECIAL.start, SPECIAL.end)
        window = restored(source[:-1], target[1:-1])
        assert window == list(range(window[0], window[0] + 40))
        assert [token for token in source if token >= SENTINELS[0]] == SENTINELS[:spans]
    assert all(bool(batch[f"{side}_mask"].all()) for side in ("source", "target"))
    assert all(batch[f"{side}_mask"].shape == batch[side].shape for side in ("source", "target"))


def test_from_left_to_right_the_target_follows_the_source() -> None:
    lengths = set()
    for step in range(8):
        batch = data(HiddenEnd()).batch(step)
        lengths.add(batch["source"].shape[1])
        for source, target in zip(batch["source"].tolist(), batch["target"].tolist(), strict=True):
            window = source[:-1] + target[1:-1]
            assert window == list(range(window[0], window[0] + 40))
    assert len(lengths) > 3, "the cut differs between batches"


def test_a_batch_depends_on_seed_and_step_and_validation_is_always_the_same() -> None:
    task = HiddenSpans(0.15, 3.0, SENTINELS)
    first, again, other = data(task), data(task), data(task, seed=4)
    assert torch.equal(first.batch(5)["source"], again.batch(5)["source"])
    assert not torch.equal(first.batch(5)["source"], first.batch(6)["source"])
    assert not torch.equal(first.batch(5)["source"], other.batch(5)["source"])
    held = [batch["source"] for batch in first.validation()]
    assert all(torch.equal(a, b["source"]) for a, b in zip(held, other.validation(), strict=True))
    assert sum(map(len, held)) == 2 and max(int(s[s < 500].max()) for s in held) < 90
    assert len({each.fingerprint for each in (first, other, data(task, length=41), data(HiddenEnd()))}) == 4


def test_a_text_may_be_one_window() -> None:
    batch = DenoisedText(TEXT[:40], TEXT[:40], HiddenEnd(), SPECIAL, length=40, rows=2).batch(0)
    assert torch.cat([batch["source"][:, :-1], batch["target"][:, 1:-1]], 1).tolist() == [TEXT[:40].tolist()] * 2


def test_what_cannot_be_hidden_is_refused() -> None:
    with pytest.raises(UserError, match="has 15 hidden spans, and there are 3 sentinels"):
        data(HiddenSpans(0.4, 1.0, SENTINELS[:3]), length=38).batch(0)
    with pytest.raises(UserError, match="has 90 tokens, and a window 91"):
        data(HiddenEnd(), length=91)


def test_an_end_follows_each_text() -> None:
    stream = token_stream(lambda texts: [[ord(c) for c in text] for text in texts], ["ab", "c"], 0)
    assert stream.tolist() == [97, 98, 0, 99, 0]
