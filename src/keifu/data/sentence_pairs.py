"""Which sentences make a row for BERT: pairs of which half belong together, or one run of sentences; it knows no masks.

Axes: row, bounds = start and end of the first segment, start and end of the second, in tokens.
"""

from bisect import bisect_left, bisect_right
from random import Random

import numpy as np

from keifu.data.sentence_shards import Sentences
from keifu.errors import UserError

Bounds = tuple[int, int, int, int]


class RowPlanner:
    """Rows from all documents, drawn anew for each epoch (Devlin et al., 2018, appendix A.2).

    room: tokens of a row without the special ones. short: how often a row is meant to be shorter, of any length, so
    that a model which is fine-tuned on short texts has seen some. pairs: two segments, the second of which in half of
    the rows comes from another document; without, one segment of whole sentences (RoBERTa, Liu et al., 2019, table 2).

    A sentence longer than a row counts as several.
    """

    def __init__(self, sentences: Sentences, room: int, short: float, pairs: bool):
        self.room, self.short, self.pairs = room, short, pairs
        self.starts, self.documents = _no_longer_than(room, sentences)
        if pairs and len(self.documents) < 3:
            raise UserError("Sentence pairs need two documents or more: half of them come from another one.")

    def rows(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Bounds [row, 4], and for each row whether its second segment comes from elsewhere; documents in order."""
        chance = Random(int(random.integers(2**63)))
        make = self._pairs if self.pairs else self._runs
        found = [row for document in range(len(self.documents) - 1) for row in make(document, chance)]
        bounds = np.array([row for row, _ in found], np.int64)
        return _truncated(bounds, self.room, random), np.array([elsewhere for _, elsewhere in found], np.int64)

    def _pairs(self, document: int, chance: Random) -> list[tuple[Bounds, bool]]:
        """The document from its first sentence to its last. What a false partner displaced comes in the next row."""
        starts, rows = self.starts, []
        first, last = self.documents[document], self.documents[document + 1]
        place = first
        while place < last:
            target = self._target(chance)
            end = bisect_left(starts, starts[place] + target, place + 1, last)
            end = max(end, min(place + 2, last))
            rest = end - place == 1 and place > first  # one sentence is left: the one before it comes along again
            begin = place - rest
            cut = chance.randrange(begin + 1, end) if end - begin > 1 else end
            elsewhere = cut == end or chance.random() < 0.5
            wanted = target - (starts[cut] - starts[begin])
            second = self._elsewhere(document, wanted, chance) if elsewhere else (starts[cut], starts[end])
            rows.append(((starts[begin], starts[cut], *second), elsewhere))
            place = cut if elsewhere and not rest else end
        return rows

    def _elsewhere(self, document: int, wanted: int, chance: Random) -> tuple[int, int]:
        """Sentences of another document, about as many tokens as are wanted."""
        other = chance.randrange(len(self.documents) - 2)
        other += other >= document
        first, last = self.documents[other], self.documents[other + 1]
        place = chance.randrange(first, last)
        end = bisect_left(self.starts, self.starts[place] + wanted, place + 1, last)
        return self.starts[place], self.starts[end]

    def _runs(self, document: int, chance: Random) -> list[tuple[Bounds, bool]]:
        """As many whole sentences as fit, row after row; the second segment is empty."""
        starts, rows = self.starts, []
        place, last = self.documents[document], self.documents[document + 1]
        while place < last:
            end = bisect_right(starts, starts[place] + self._target(chance), place + 1, last + 1) - 1
            end = max(end, place + 1)
            rows.append(((starts[place], starts[end], starts[end], starts[end]), False))
            place = end
        return rows

    def _target(self, chance: Random) -> int:
        return chance.randint(2, self.room) if chance.random() < self.short else self.room


def _no_longer_than(room: int, sentences: Sentences) -> tuple[list[int], list[int]]:
    """Where sentences start and which are the first of documents, with sentences of more than `room` tokens cut."""
    sizes = np.diff(sentences.starts)
    pieces = -(-sizes // room)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces)])
    inside = np.arange(before[-1]) - np.repeat(before[:-1], pieces)
    starts = np.repeat(sentences.starts[:-1], pieces) + room * inside
    return [*starts.tolist(), int(sentences.starts[-1])], before[sentences.documents].tolist()


def _truncated(bounds: np.ndarray, room: int, random: np.random.Generator) -> np.ndarray:
    """Pairs that have no more than `room` tokens: the longer one loses tokens, at its front or at its end by chance."""
    sizes = bounds[:, 1::2] - bounds[:, ::2]
    excess = np.maximum(sizes.sum(1) - room, 0)
    levelled = np.minimum(excess, np.abs(sizes[:, 0] - sizes[:, 1]))  # until both are equally long
    longer = np.where(sizes[:, 0] > sizes[:, 1], 0, 1)[:, None] == np.arange(2)
    rest = excess - levelled  # then in turns
    lost = longer * levelled[:, None] + np.stack([rest // 2, rest - rest // 2], 1)
    front = random.binomial(lost, 0.5)
    result = bounds.copy()
    result[:, ::2] += front
    result[:, 1::2] -= lost - front
    return result
