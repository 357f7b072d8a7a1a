"""N-gram models equal the formulas of Kneser and Ney, Chen and Goodman, computed term by term, and decode as they
read."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import keifu
from keifu import checkpoints
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.text.generate import generate
from keifu.models.classic import ngram

Gram = tuple[int, ...]
VOCABULARY = 9


def text(count: int = 600, seed: int = 0) -> list[int]:
    """Return tokens of which one never occurs, and neighbours depend on each other."""
    chance, tokens = np.random.default_rng(seed), [0]
    for _ in range(count - 1):
        steps = chance.choice(5, p=[0.5, 0.2, 0.15, 0.1, 0.05])
        tokens.append(int((3 * tokens[-1] + steps) % (VOCABULARY - 1)))
    return tokens


class Formulas:
    """Interpolated modified Kneser-Ney smoothing, from dictionaries of counts, in exact arithmetic."""

    def __init__(self, tokens: Sequence[int], order: int):
        grams = {n: [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)] for n in range(1, order + 1)}
        self.counts: dict[int, Counter[Gram]] = {order: Counter(grams[order])}
        for n in range(1, order):
            before = defaultdict[Gram, set[int]](set)
            for gram in grams[n + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(before[gram]) for gram in grams[n]})

    def discount(self, n: int, count: int) -> Fraction:
        found = Counter(self.counts[n].values())
        n1, n2, n3, n4 = (found[number] for number in (1, 2, 3, 4))
        if count == 0:
            return Fraction(0)
        if not (n1 and n2 and n3):
            return Fraction(min(count, 3), 2)
        share = Fraction(n1, n1 + 2 * n2)
        values = 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3
        return values[min(count, 3) - 1] if min(values) > 0 else Fraction(min(count, 3), 2)

    def probability(self, context: Gram, token: int) -> Fraction:
        n = len(context) + 1
        after = {gram[-1]: count for gram, count in self.counts[n].items() if gram[:-1] == context and count}
        lower = self.probability(context[1:], token) if context else Fraction(1, VOCABULARY)
        if not (total := sum(after.values())):
            return lower
        weight = sum((self.discount(n, count) for count in after.values()), Fraction(0)) / total
        own = Fraction(after.get(token, 0)) - self.discount(n, after.get(token, 0))
        return own / total + weight * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@torch.no_grad()
def test_every_probability_is_that_of_the_formulas(order: int) -> None:
    tokens = text()
    model, formulas = ngram.count(np.array(tokens), ngram.Config(VOCABULARY, order=order)), Formulas(tokens, order)
    read = torch.tensor([text(12, seed=1), np.random.default_rng(2).integers(0, VOCABULARY, 12).tolist()])
    found = model(read).exp()
    for row in range(2):
        for position in range(12):
            context = tuple(read[row, max(0, position - order + 2) : position + 1].tolist()) if order > 1 else ()
            expected = [float(formulas.probability(context, token)) for token in range(VOCABULARY)]
            torch.testing.assert_close(found[row, position], torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert found[..., VOCABULARY - 1].min() > 0  # a token that never occurs


def test_the_unigram_of_a_bigram_counts_different_neighbours() -> None:
    """Token 2 is frequent, but only after 1: after an unknown token, 3 is likelier."""
    tokens = [1, 2] * 20 + [0, 3, 1, 3, 2, 3, 4, 3]
    after_unknown = ngram.count(np.array(tokens), ngram.Config(6, order=2))(torch.tensor([[5]]))[0, 0]
    alone = ngram.count(np.array(tokens), ngram.Config(6, order=1))(torch.tensor([[5]]))[0, 0]
    assert after_unknown[3] > after_unknown[2]
    assert alone[2] > alone[3]


@pytest.mark.parametrize("order", [1, 4])
@torch.no_grad()
def test_decoding_equals_reading_and_documents_and_padding_are_apart(order: int) -> None:
    model = ngram.count(np.array(text()), ngram.Config(VOCABULARY, order=order))
    read = torch.tensor([text(10, seed=1), text(10, seed=2)])
    whole, state = model(read), model.new_state(2, 10)
    parts = [model(read[:, :3], state), *(model(read[:, i : i + 1], state) for i in range(3, 10))]
    assert torch.equal(torch.cat(parts, 1), whole)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    assert torch.equal(model.hidden(read, documents=documents)[:, 4:], model(read[:, 4:]))
    padded = model.hidden(torch.cat([torch.zeros(2, 3, dtype=torch.int64), read], 1), padding=torch.tensor([3, 3]))
    assert torch.equal(padded[:, 3:], whole)


def test_a_model_without_counts_has_equal_probabilities() -> None:
    found = ngram.build(ngram.Config(7, order=3))(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(found.exp(), torch.full((1, 3, 7), 1 / 7))


@torch.no_grad()
def test_a_saved_model_loads_with_the_same_bits_and_writes(tmp_path: Path) -> None:
    sentence = "the cat sat on the mat and the dog ran. "
    tokenizer = train_tokenizer("characters", [sentence], 99)
    tokens = tokenizer.encode(sentence * 5)
    model = ngram.count(np.array(tokens), ngram.Config(tokenizer.vocab_size, order=9))
    checkpoints.save(model, tokenizer, tmp_path)
    loaded, tokenizer = keifu.load(tmp_path)
    read = torch.tensor([tokens[:30]])
    assert torch.equal(loaded(read), model(read))
    assert generate(loaded, tokenizer, "the cat", raw=True, max_tokens=26, temperature=0.0) == sentence[7:33]
    checkpoints.save(loaded, tokenizer, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
