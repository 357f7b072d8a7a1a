"""Each step from logits to the distribution sampled from, beside transformers' on the same logits."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from keifu.inference.text import logits_processors, sampler
from keifu.inference.text.request import Request
from keifu.inference.text.sampler import History, RowSettings, Sampler, sample
from keifu.inference.text.sampling_params import SamplingParams, Setting, rows_of

ROWS, VOCAB = 4, 203
CPU = torch.device("cpu")


def logits() -> Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(5)) * 4


def rows(*values: float) -> Tensor:
    return torch.tensor(values)


def each_row(kind: Any, values: list[float], tokens: Tensor | None = None) -> Tensor:
    """Return the result of transformers' processor with another parameter for every row."""
    ids = torch.zeros(ROWS, 1, dtype=torch.long) if tokens is None else tokens
    pairs = enumerate(values)
    return torch.cat([kind(value)(ids[i : i + 1], logits()[i : i + 1].clone()) for i, value in pairs])


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (logits_processors.temperature, hf.TemperatureLogitsWarper, [0.3, 0.7, 1.0, 2.0]),
        (logits_processors.top_k, hf.TopKLogitsWarper, [1, 7, 50, VOCAB + 9]),
        (logits_processors.top_p, hf.TopPLogitsWarper, [0.1, 0.5, 0.9, 0.999]),
        (logits_processors.min_p, hf.MinPLogitsWarper, [0.0, 0.01, 0.3, 1.0]),
    ],
)
def test_filters_equal_transformers_row_by_row(ours: Any, theirs: Any, values: list[float]) -> None:
    agree(ours(logits(), torch.tensor(values)), each_row(theirs, values))


def test_repetition_penalty_equals_transformers() -> None:
    tokens = torch.randint(0, VOCAB, (ROWS, 30), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter_(1, tokens, True)
    values = [0.5, 1.0, 1.3, 2.0]
    ours = logits_processors.repetition_penalty(logits(), seen, torch.tensor(values))
    agree(ours, each_row(hf.RepetitionPenaltyLogitsProcessor, values, tokens))


def test_logit_bias_equals_transformers_row_by_row() -> None:
    pairs = [((3, 2.5), (7, -100.0)), (), ((202, 1.0), (0, 4.0), (5, -1.0)), ((3, -2.0),)]
    settings = RowSettings([SamplingParams(logit_bias=each) for each in pairs], CPU)
    ours = settings.apply_penalties(logits(), History(None, None))
    for row, each in enumerate(pairs):
        own = logits()[row : row + 1]
        theirs = hf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in each}) if each else None
        agree(ours[row : row + 1], own if theirs is None else theirs(torch.zeros(1, 1, dtype=torch.long), own))


def test_one_bias_serves_many_distributions() -> None:
    ours = RowSettings([SamplingParams(logit_bias=((3, 9.0),))], CPU).apply_penalties(logits(), History(None, None))
    agree(ours - logits(), torch.zeros(ROWS, VOCAB).index_fill(1, torch.tensor(3), 9.0))


class OnlyEleven:
    def allowed(self) -> Tensor:
        return torch.arange(VOCAB) == 11

    def accept(self, token: int) -> None:
        pass


def test_only_allowed_tokens_are_chosen_and_the_likeliest_are_reported_of_all() -> None:
    settings = [SamplingParams(seed=n, log_probabilities=n != 1, top_log_probabilities=n) for n in range(ROWS)]
    sampler = Sampler([Request([0], each, None, VOCAB, 9, OnlyEleven()) for each in settings], VOCAB, CPU)
    rows_found = torch.tensor(sampler.choose(logits()).tolist())
    logs = logits().log_softmax(-1)
    assert rows_found[:, 0].tolist() == [11] * ROWS
    torch.testing.assert_close(rows_found[:, 2].float(), logs[:, 11])
    torch.testing.assert_close(rows_found[:, 3].float(), torch.zeros(ROWS))
    values, tokens = logs.topk(3)
    torch.testing.assert_close(rows_found[:, 5::2].float(), values)
    assert torch.equal(rows_found[:, 4::2].long(), tokens)


def test_presence_and_frequency_follow_the_formula_of_openai() -> None:
    """mu[j] - c[j] · frequency - (c[j] > 0) · presence."""
    x, counts = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    assert logits_processors.presence_penalty(x, counts, rows(0.5)).tolist() == [[0, -0.5, -0.5, -0.5]]
    assert logits_processors.frequency_penalty(x, counts, rows(0.5)).tolist() == [[0, -0.5, -1.0, -2.5]]


def test_neutral_values_in_a_mixed_batch_change_nothing() -> None:
    x = logits()
    assert torch.equal(logits_processors.top_k(x, torch.tensor([0, 3, 0, 0]))[[0, 2, 3]], x[[0, 2, 3]])
    assert torch.equal(logits_processors.top_p(x, rows(1, 0.5, 1, 1))[[0, 2, 3]], x[[0, 2, 3]])
    assert torch.equal(logits_processors.min_p(x, rows(0, 0.5, 0, 0))[[0, 2, 3]], x[[0, 2, 3]])


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.tensor([[0.05, 0.4, 0.25, 0.3]])
    for p, kept in [
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.94, [1, 2, 3]),
        (0.97, [0, 1, 2, 3]),
    ]:
        found = logits_processors.top_p(probabilities.log(), rows(p)).isfinite()[0].nonzero()[:, 0].tolist()
        assert found == kept, p


def test_equals_stay_together() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert logits_processors.top_k(x, torch.tensor([2])).isfinite().tolist() == [[True, True, True, False]]
    assert logits_processors.top_p(x, rows(0.6)).isfinite().tolist() == [[True, True, True, False]]


def test_greedy_keeps_exactly_one() -> None:
    assert logits_processors.likeliest(torch.tensor([[1.0, 2.0, 2.0]])).isfinite().sum() == 1


@pytest.mark.parametrize("t", [0.7, 3.0])
@pytest.mark.parametrize(("k", "p", "fraction"), [(40, 0.9, 0.02), (12, 0.8, 0.3), (30, 0.6, 0.5), (4, 0.7, 0.6)])
def test_all_settings_together_equal_transformers_in_its_order(t: float, k: int, p: float, fraction: float) -> None:
    sampling = SamplingParams(temperature=t, top_k=k, top_p=p, min_p=fraction, repetition_penalty=1.4)
    prompt = torch.randint(0, VOCAB, (ROWS, 9), generator=torch.Generator().manual_seed(3))
    written = torch.randint(0, VOCAB, (ROWS, 5), generator=torch.Generator().manual_seed(4))
    settings = RowSettings([sampling] * ROWS, CPU)
    history = History.of_texts(settings, prompt.tolist(), [[]] * ROWS, VOCAB)
    for tokens in written.unbind(1):
        history.add(tokens)
    theirs = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.4),
            hf.TemperatureLogitsWarper(t),
            hf.TopKLogitsWarper(k),
            hf.TopPLogitsWarper(p),
            hf.MinPLogitsWarper(fraction),
        ]
    )
    agree(settings(logits(), history), theirs(torch.cat([prompt, written], 1), logits()))  # type: ignore[arg-type]


def test_every_row_has_its_own_settings() -> None:
    """A batch of different settings gives each row what a batch of that row alone gives it."""
    samplings = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, top_k=3, presence_penalty=0.4),
        SamplingParams(top_p=0.5, repetition_penalty=1.5),
        SamplingParams(min_p=0.2, frequency_penalty=0.9, top_n_sigma=1.5),
    ]
    prompt = torch.randint(0, VOCAB, (ROWS, 9), generator=torch.Generator().manual_seed(3)).tolist()
    texts = [text[skipped:] for text, skipped in zip(prompt, (0, 3, 2, 0), strict=True)]

    def processed(chosen: list[int]) -> Tensor:
        settings = RowSettings([samplings[row] for row in chosen], CPU)
        history = History.of_texts(settings, [texts[row] for row in chosen], [[]] * len(chosen), VOCAB)
        history.add(logits()[chosen].argmax(-1))
        return settings(logits()[chosen], history)

    together = processed([0, 1, 2, 3])
    assert not torch.equal(together, logits())
    for row in range(ROWS):
        assert torch.equal(together[row], processed([row])[0])


LIMITS = [(0, 1.0), (0, 0.3), (0, 0.98), (1, 1.0), (7, 0.6), (40, 1.0), (300, 0.9), (255, 1.0), (256, 1.0)]


def wide_logits(kind: str) -> Tensor:
    """Return logits with a row for each limit, over a vocabulary larger than a shortlist: peaked, flat, with many equal
    values, or with few allowed tokens."""
    random = torch.Generator().manual_seed(11)
    x = torch.randn(len(LIMITS), 1301, generator=random)
    scaled = {"peaked": x * 6, "flat": x / 9, "equals": (x * 2).round(), "few": x * 3}[kind]
    return scaled.masked_fill(torch.rand(x.shape, generator=random) < 0.97, -torch.inf) if kind == "few" else scaled


@pytest.mark.parametrize("kind", ["peaked", "flat", "equals", "few"])
def test_a_shortlist_holds_what_top_k_and_top_p_leave(kind: str) -> None:
    x = wide_logits(kind)
    k, p = torch.tensor([k for k, _ in LIMITS]), rows(*(p for _, p in LIMITS))
    few, names, whole = logits_processors.shortlist(x, k, p, bool(k.all()))
    left = torch.full_like(x, -torch.inf).scatter_(1, names, few)
    expected = logits_processors.top_p(logits_processors.top_k(x, k), p)
    assert torch.equal(left[whole], expected[whole])
    assert torch.equal(names, names.sort(-1).values)
    assert not whole[0] and not whole[-1]  # of unlimited choice, and where the last of the list is left
    assert whole.sum() >= {"peaked": 6, "flat": 4, "equals": 2, "few": 3}[kind]


@pytest.mark.parametrize("kind", ["peaked", "flat", "equals", "few"])
def test_rows_of_a_large_vocabulary_draw_what_they_draw_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shortlist or the whole distribution, which is what their settings say."""
    monkeypatch.setattr(sampler, "LARGE", 1301)
    samplings = [SamplingParams(temperature=0.7, top_k=k, top_p=p, min_p=0.01) for k, p in LIMITS]
    samplings[3] = SamplingParams(temperature=0)
    samplings[4] = replace(samplings[4], top_n_sigma=1.0)
    samplings[6] = replace(samplings[6], top_n_sigma=2.5)
    x, nothing = wide_logits(kind), History(None, None)
    u = torch.rand(len(LIMITS), 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    settings = RowSettings(samplings, CPU)
    whole = settings(x, nothing)
    alone = [RowSettings([each], CPU) for each in samplings]
    for draw in u.T:
        tokens, logs, _ = settings.choose(x, nothing, draw)
        for row, each in enumerate(alone):
            token, log, _ = each.choose(x[row : row + 1], nothing, draw[row : row + 1])
            assert (token.item(), log.item()) == (tokens[row].item(), logs[row].item())
        torch.testing.assert_close(logs.float(), logits_processors.log_probability(whole, tokens))
        assert torch.equal(tokens, sample(whole, draw))


def test_penalties_see_the_prompt_or_only_what_was_written() -> None:
    settings = RowSettings([SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)] * 2, CPU)
    history = History.of_texts(settings, [[7], [7]], [[], [3, 3, 8]], 9)
    assert history.seen is not None and history.seen.nonzero().tolist() == [[0, 7], [1, 3], [1, 7], [1, 8]]
    assert history.counts is not None and history.counts[1].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 1]


def test_rows_that_come_and_go_draw_what_they_draw_alone() -> None:
    """Rows with and without penalties, added one after another, taken out, and chosen for in part."""
    samplings = [
        SamplingParams(temperature=0, seed=1),
        SamplingParams(temperature=2.0, frequency_penalty=0.9, seed=2),
        SamplingParams(temperature=2.0, repetition_penalty=1.5, seed=3),
        SamplingParams(temperature=2.0, seed=2),
    ]
    texts = [[1, 2, 3], [4, 9], [5, 6], [7, 8, 9, 1]]

    def requests() -> list[Request]:
        found = [Request(text[:-1], each, None, VOCAB, 99) for text, each in zip(texts, samplings, strict=True)]
        for request, text in zip(found, texts, strict=True):
            request.take(float(text[-1]), 0.0)
        return found

    def choose(rows: list[int], some: list[Request], before: Sampler | None = None) -> Sampler:
        chosen = [some[row] for row in rows]
        now = before if before and before.requests == chosen else Sampler(chosen, VOCAB, CPU, before)
        for row, figures in zip(rows, now.choose(logits()[rows]).tolist(), strict=True):
            some[row].take(*figures)
        return now

    expected = requests()
    for row, count in enumerate((3, 4, 4, 3)):
        last = None
        for _ in range(count):
            last = choose([row], expected, last)
    for keeps in (False, True):  # the one before, so that what it has counted is not counted again
        together, last = requests(), None
        for rows in ([0], [0, 1], [0, 1, 2, 3], [1, 3], [3, 1, 2], [2], [2]):
            last = choose(rows, together, last if keeps else None)
        assert [each.tokens for each in together] == [each.tokens for each in expected]
    assert last is not None and last.history.seen is not None
    assert set(last.history.seen[0].nonzero()[:, 0].tolist()) == {*together[2].prompt, *together[2].tokens}


def test_a_step_computes_nothing_that_its_rows_do_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """No random numbers for greedy rows, no shortlist of a small vocabulary, and no text counted a second time."""
    monkeypatch.setattr(sampler.UniformStreams, "next", lambda *_: pytest.fail("random numbers"))
    greedy = Request([1, 2], SamplingParams(temperature=0, repetition_penalty=1.3), None, VOCAB, 99)
    before = Sampler([greedy], VOCAB, CPU)
    greedy.take(*before.choose(logits()[:1]).tolist()[0])
    monkeypatch.setattr(logits_processors, "shortlist", lambda *_: pytest.fail("a shortlist"))
    RowSettings([SamplingParams(top_k=5)], CPU).choose(torch.randn(1, 8000), History(None, None), torch.rand(1))
    counted = []
    of_texts = History.of_texts
    monkeypatch.setattr(History, "of_texts", lambda *texts: counted.append(texts[1]) or of_texts(*texts))
    more = Sampler([Request([5, 6], greedy.sampling, None, VOCAB, 99), greedy], VOCAB, CPU, before)
    assert [list(prompt) for prompt in counted[0]] == [[5, 6], []]
    assert more.history.seen is not None
    assert set(more.history.seen[1].nonzero()[:, 0].tolist()) == {1, 2, *greedy.tokens}


def test_top_p_keeps_no_token_more_than_the_mass_needs() -> None:
    """Also where the likeliest tokens have exactly that mass."""
    halves = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    kept = logits_processors.top_p(halves, rows(0.5, 0.5)).isfinite().sum(1)
    assert kept.tolist() == [2, 1]  # equals of the last one stay
    quarters = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert logits_processors.top_p(quarters, rows(0.5)).isfinite().tolist() == [[True, False, False, False]]
    assert logits_processors.top_p(quarters, rows(0.75)).isfinite().tolist() == [[True, True, False, False]]


def test_top_n_sigma_by_hand() -> None:
    """Mean 1 and deviation √5 of -2, 0, 2, 4; a removed token counts for nothing."""
    x = torch.tensor([[-2.0, 0.0, 2.0, 4.0]]).repeat(4, 1)
    left = logits_processors.top_n_sigma(x, rows(0.5, 0.9, 1.8, 0.0)).isfinite()
    assert left.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    constrained = torch.tensor([[-2.0, 0.0, -torch.inf, 2.0, 4.0], [-torch.inf, -torch.inf, 7.0, -torch.inf, -9.0]])
    left = logits_processors.top_n_sigma(constrained, rows(0.9, 1.0))
    assert left.isfinite().int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    only = torch.tensor([[-torch.inf, 3.0]])
    assert torch.equal(logits_processors.top_n_sigma(only, rows(1.0)), only)


@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_top_n_sigma_is_the_papers_rule_at_every_temperature(n: float) -> None:
    x = logits()
    expected = x < x.amax(-1, keepdim=True) - n * x.double().std(-1, correction=0, keepdim=True)
    for t in (0.5, 1.0, 3.0):
        left = logits_processors.top_n_sigma(x / t, rows(n))
        assert torch.equal(left.isneginf(), expected) and 0 < expected.sum() < expected.numel()
        assert torch.equal(left[~expected], (x / t)[~expected])


def test_top_n_sigma_of_a_structured_answer_draws_an_allowed_token() -> None:
    setting = SamplingParams(seed=3, top_n_sigma=1.0, log_probabilities=True)
    only = Sampler([Request([0], setting, None, VOCAB, 9, OnlyEleven())], VOCAB, CPU)
    assert only.choose(logits()[:1]).tolist()[0][0] == 11


@dataclass(frozen=True)
class ToyParams(SamplingParams):
    """Settings with one more filter, in the stage that its row names."""

    before: Annotated[float, Setting("Toy", "before shortlist")] = 0.0
    after: Annotated[float, Setting("Toy", "after shortlist")] = 0.0


def only_the_third(logits: Tensor, strength: Tensor) -> Tensor:
    """Return -inf for all but the third likeliest token."""
    third = logits.topk(3).values[:, 2:]
    return logits.masked_fill((logits != third) & (strength[:, None] > 0), -torch.inf)


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize("vocab", [203, 32_000])
@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_a_new_filter_is_one_function_and_one_row(
    name: str, vocab: int, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It acts for small and large vocabularies, with and without a shortlist, beside rows that do not have it."""
    for each in ("before", "after"):
        monkeypatch.setitem(vars(logits_processors), each, only_the_third)
    monkeypatch.setattr(sampler, "PROCESSORS", sampler.processors_of(rows_of(ToyParams)))
    x = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1)) * 4
    toy: dict[str, Any] = {**cut, name: 1.0}
    settings = RowSettings([ToyParams(**toy), ToyParams(**cut)], CPU)
    nothing = History(None, None)
    drawn = [settings.choose(x, nothing, torch.rand(2))[0].tolist() for _ in range(20)]
    assert {row[0] for row in drawn} == {x[0].topk(3).indices[2].item()}
    assert len({row[1] for row in drawn}) > 1
    assert settings(x, nothing).isfinite()[0].sum() == 1


def test_stages_decide_the_order() -> None:
    expected = ["repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_n_sigma"]
    assert [*sampler.PROCESSORS] == [*expected, "top_k", "top_p", "min_p"]
