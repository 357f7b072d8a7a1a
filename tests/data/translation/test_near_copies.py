"""Near copies between held-out and training sentences, against edit distances computed by brute force."""

import random

import numpy as np
import pytest

from keifu.data.text.normalization import near_training, units, within_one_edit


def edit_distance(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Return the Levenshtein distance by the usual table."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    table[:, 0], table[0] = np.arange(len(one) + 1), np.arange(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return int(table[-1, -1])


def sentences(chance: random.Random, letters: str, between: str, count: int) -> list[str]:
    return [between.join(chance.choices(letters, k=chance.randint(1, 7))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_they_are_those_of_brute_force(seed: int) -> None:
    chance = random.Random(seed)

    def pairs(count: int) -> list[tuple[str, str]]:
        sides = sentences(chance, "猫犬魚鳥", "", count), sentences(chance, "abcd", " ", count)
        return list(zip(*sides, strict=True))

    held_out, training = pairs(60), pairs(25)
    expected = [
        any(edit_distance(units(a), units(b)) <= 1 for other in training for a, b in zip(pair, other, strict=True))
        for pair in held_out
    ]
    assert near_training(held_out, training) == expected
    assert 5 < sum(expected) < 55  # neither none nor all
    swapped = near_training([pair[::-1] for pair in held_out], [pair[::-1] for pair in training])
    assert swapped == expected


def test_every_edit_of_two_short_sequences_is_judged_as_by_the_table() -> None:
    chance = random.Random(0)
    texts = [tuple(chance.choices("ab", k=chance.randint(0, 4))) for _ in range(80)]
    assert all(within_one_edit(a, b) == (edit_distance(a, b) <= 1) for a in texts for b in texts)


def test_words_are_compared_in_english_and_characters_in_japanese() -> None:
    training = [("私達は彼の申し出を受け入れた。", "We accepted his offer.")]
    held_out = [
        ("彼女は断らなかった。", "She accepted his offer!"),  # one word
        ("彼女は断らなかった。", "She accepted their offer."),  # two words
        ("私達は彼の申し出を受け入れたよ。", "No one refused at all."),  # one character more
        ("僕達は彼の申し出を受け入れたよ。", "No one refused at all."),  # two characters
        ("彼女は断らなかった。", "we ACCEPTED his offer"),  # the same
    ]
    assert near_training(held_out, training) == [True, False, True, False, True]


def test_without_training_pairs_nothing_is_near() -> None:
    assert near_training([("猫", "cat")], []) == [False]
