"""Beam search by the exact rule against brute force, where the two rules for lengths choose different texts."""

from collections.abc import Callable
from functools import cache, partial
from itertools import product

import pytest
import torch
from beam_rules import power_penalty

from keifu.inference.text.beam_search import Search, beam_search, paper_penalty

VOCAB, END, LIMIT = 3, 0, 6


class Markov:
    """A decoder whose next token depends on the last one and the place; it knows each source's table."""

    def __init__(self, tables: torch.Tensor):
        self.tables, self.last, self.place = tables, torch.zeros(len(tables), dtype=torch.long), 0

    def first(self) -> torch.Tensor:
        return self.tables[torch.arange(len(self.tables)), 0, self.last].clone()

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        self.place, self.last = self.place + 1, tokens
        return self.tables[torch.arange(len(self.tables)), self.place, tokens].clone()

    def select(self, rows: torch.Tensor) -> None:
        self.tables = self.tables[rows]


TEXTS = [
    text
    for length in range(1, LIMIT + 1)
    for text in product(range(VOCAB), repeat=length)
    if END not in text[:-1] and (text[-1] == END or length == LIMIT)
]


@cache
def logs() -> torch.Tensor:
    """Return ln P of every text by each table, [tables, texts]."""
    shares = tables().double().log_softmax(-1)
    paths = [(range(len(text)), (0, *text[:-1]), text) for text in TEXTS]
    return torch.stack([shares[:, list(places), list(before), list(text)].sum(1) for places, before, text in paths], 1)


def best_of_all(penalty: Callable[[float], float]) -> list[tuple[list[int], float]]:
    """List by each table the text whose ln P over the penalty of its length, its end counted, is the largest."""
    scores, places = (logs() / torch.tensor([penalty(len(text)) for text in TEXTS])).max(1)
    texts = ([token for token in TEXTS[place] if token != END] for place in places.tolist())
    return list(zip(texts, scores.tolist(), strict=True))


RULES = {
    "paper 0.6": (partial(paper_penalty, alpha=0.6), lambda n: ((5 + n) / 6) ** 0.6),
    "paper 1.4": (partial(paper_penalty, alpha=1.4), lambda n: ((5 + n) / 6) ** 1.4),
    "power 1": (partial(power_penalty, exponent=1.0), lambda n: n),
    "power 0": (partial(power_penalty, exponent=0.0), lambda n: 1.0),
    "power -0.7": (partial(power_penalty, exponent=-0.7), lambda n: n**-0.7),
}


def tables() -> torch.Tensor:
    found = torch.randn(60, LIMIT, VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))
    found[..., END] += 0.3
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_exact_rule_finds_the_best_text_of_all(rule: str) -> None:
    ours, written_out = RULES[rule]
    search = Search(ends=(END,), beams=VOCAB**LIMIT, penalty=ours)
    found = beam_search(Markov(tables()), search, [LIMIT] * 60)
    for best, (tokens, score) in zip(found, best_of_all(written_out), strict=True):
        assert best.tokens == tokens and best.score == pytest.approx(score, abs=1e-5)


def test_the_two_rules_differ_here() -> None:
    """Else the test above could not tell one from the other, nor a length that is off by one."""

    def chosen(penalty: Callable[[float], float]) -> list[list[int]]:
        return [text for text, _ in best_of_all(penalty)]

    rules = [chosen(written_out) for _, written_out in RULES.values()]
    assert all(a != b for place, a in enumerate(rules) for b in rules[:place])
    assert chosen(lambda n: ((5 + n) / 6) ** 1.4) != chosen(lambda n: ((4 + n) / 6) ** 1.4)
    assert chosen(lambda n: n) != chosen(lambda n: n - 0.5)
