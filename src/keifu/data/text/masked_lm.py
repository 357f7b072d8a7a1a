"""BERT's pretraining data: masked language modelling (MLM) and next-sentence prediction (NSP).

Axes: row (of a batch), position = tokens of a row, masked = the masked positions of a row. bounds = start and end of
the first segment, start and end of the second, in tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random

import numpy as np
import torch
from torch import Tensor

from keifu.data.epochs import Epochs, sort_pools
from keifu.data.padding import offsets
from keifu.data.text.sentence_shards import Sentences, SentenceShards
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.ranges import Count, Share

Bounds = tuple[int, int, int, int]


class RowPlanner:
    """Planner of the rows of an epoch from all documents (Devlin et al., 2018, appendix A.2).

    room: tokens of a row without special tokens. short: share of rows with a random shorter length, because a model
    that is later fine-tuned on short texts must have seen some. pairs: whether a row has two segments, the second of
    which comes from another document in half of the rows; otherwise it has one segment of whole sentences (RoBERTa, Liu
    et al., 2019, table 2).

    A sentence longer than a row is split into several.
    """

    def __init__(self, sentences: Sentences, room: int, short: float, pairs: bool):
        self.room, self.short, self.pairs = room, short, pairs
        self.starts, self.documents = _no_longer_than(room, sentences)
        if pairs and len(self.documents) < 3:
            raise UserError("Sentence pairs need two documents or more: half of them come from another one.")

    def rows(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return bounds [row, 4], and for each row whether the second segment is from another document."""
        chance = Random(int(random.integers(2**63)))
        make = self._pairs if self.pairs else self._runs
        pairs = [row for document in range(len(self.documents) - 1) for row in make(document, chance)]
        bounds = np.array([row for row, _ in pairs], np.int64)
        return _truncate(bounds, self.room, random), np.array([elsewhere for _, elsewhere in pairs], np.int64)

    def _pairs(self, document: int, chance: Random) -> list[tuple[Bounds, bool]]:
        """Return the pairs of a document, from its first to its last sentence. Sentences replaced by those of another
        document come in the next row."""
        starts, rows = self.starts, []
        first, last = self.documents[document], self.documents[document + 1]
        position = first
        while position < last:
            target = self._target(chance)
            end = bisect_left(starts, starts[position] + target, position + 1, last)
            end = max(end, min(position + 2, last))
            repeats_last = end - position == 1 and position > first  # one sentence is left: repeat the one before it
            begin = position - repeats_last
            cut = chance.randrange(begin + 1, end) if end - begin > 1 else end
            elsewhere = cut == end or chance.random() < 0.5
            length = target - (starts[cut] - starts[begin])
            second = self._elsewhere(document, length, chance) if elsewhere else (starts[cut], starts[end])
            rows.append(((starts[begin], starts[cut], *second), elsewhere))
            position = cut if elsewhere and not repeats_last else end
        return rows

    def _elsewhere(self, document: int, length: int, chance: Random) -> tuple[int, int]:
        """Return the bounds of sentences of another document, of about `length` tokens."""
        other = chance.randrange(len(self.documents) - 2)
        other += other >= document
        first, last = self.documents[other], self.documents[other + 1]
        position = chance.randrange(first, last)
        end = bisect_left(self.starts, self.starts[position] + length, position + 1, last)
        return self.starts[position], self.starts[end]

    def _runs(self, document: int, chance: Random) -> list[tuple[Bounds, bool]]:
        """Fill rows with as many whole sentences as fit. The second segment is empty."""
        starts, rows = self.starts, []
        position, last = self.documents[document], self.documents[document + 1]
        while position < last:
            end = bisect_right(starts, starts[position] + self._target(chance), position + 1, last + 1) - 1
            end = max(end, position + 1)
            rows.append(((starts[position], starts[end], starts[end], starts[end]), False))
            position = end
        return rows

    def _target(self, chance: Random) -> int:
        return chance.randint(2, self.room) if chance.random() < self.short else self.room


def _no_longer_than(room: int, sentences: Sentences) -> tuple[list[int], list[int]]:
    """Return the starts of sentences and documents. Sentences of more than `room` tokens are split."""
    pieces = -(-np.diff(sentences.starts) // room)
    before = offsets(pieces)
    inside = np.arange(before[-1]) - np.repeat(before[:-1], pieces)
    starts = np.repeat(sentences.starts[:-1], pieces) + room * inside
    return [*starts.tolist(), int(sentences.starts[-1])], before[sentences.documents].tolist()


def _truncate(bounds: np.ndarray, room: int, random: np.random.Generator) -> np.ndarray:
    """Cut pairs to `room` tokens. The longer segment loses tokens, randomly at its front or its end."""
    sizes = bounds[:, 1::2] - bounds[:, ::2]
    excess = np.maximum(sizes.sum(1) - room, 0)
    levelled = np.minimum(excess, np.abs(sizes[:, 0] - sizes[:, 1]))  # until both have the same length
    longer = np.where(sizes[:, 0] > sizes[:, 1], 0, 1)[:, None] == np.arange(2)
    remaining_excess = excess - levelled  # then alternately
    lost = longer * levelled[:, None] + np.stack([remaining_excess // 2, remaining_excess - remaining_excess // 2], 1)
    front = random.binomial(lost, 0.5)
    result = bounds.copy()
    result[:, ::2] += front
    result[:, 1::2] -= lost - front
    return result


NOT_COUNTED = -100  # target of unused entries of `places`
POOL = 16  # batches whose rows are sorted by length together
VALIDATION = 20_181_011  # fixed seed of the held-out rows, so that runs with different seeds can be compared


@dataclass(frozen=True)
class MaskingScheme:
    """Length of a row, and its masked part (Devlin et al., 2018, section 3.1)."""

    length: Count = 128
    """Tokens of a row, [CLS] and [SEP] included."""
    share: Share = 0.15
    """Share of a row's tokens that are to be predicted: 80% of them become [MASK], 10% another token, 10% stay."""
    most: Count = 20
    """The most that are predicted in a row; the released scripts have 20 for rows of 128."""
    whole_words: bool = False
    """Hide all pieces of a word or none."""
    sentence_pairs: bool = True
    """Rows are pairs of sentences of which half follow each other; without, rows are runs of sentences (RoBERTa)."""
    short: Share = 0.1
    """Share of rows that are cut short."""

    def __post_init__(self) -> None:
        if self.length < 8 or self.most < 1 or not 0 < self.share < 1 or not 0 <= self.short <= 1:
            raise UserError(f"Masking needs length >= 8, most >= 1, 0 < share < 1, short from 0 to 1; it has {self}.")


@dataclass(frozen=True, eq=False)
class MaskingVocabulary:
    """Ids of the special tokens, the ids that may replace a masked token, and which ids continue a word."""

    cls: int
    sep: int
    pad: int
    mask: int
    ordinary: np.ndarray
    goes_on: np.ndarray

    @cached_property
    def is_ordinary(self) -> np.ndarray:
        """Mask of the ids in `ordinary`."""
        return np.isin(np.arange(len(self.goes_on)), self.ordinary)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "MaskingVocabulary":
        """Return the tokenizer's vocabulary. Raises `UserError` if [CLS], [SEP], [PAD] or [MASK] is missing."""
        roles = ("cls_token", "sep_token", "pad_token", "mask_token")
        if missing_roles := [role for role in roles if role not in tokenizer.special]:
            raise UserError(
                f"The tokenizer has no {', '.join(missing_roles)}: BERT needs one such as wordpiece or minilm's."
            )
        ids = [tokenizer.token_id(tokenizer.special[role]) for role in roles]
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(tokenizer.special_ids))
        mark = tokenizer.description()["model"].get("continuing_subword_prefix") or ""
        tokens = [tokenizer.backend.id_to_token(n) or "" for n in range(tokenizer.vocab_size)]
        goes_on = np.array([bool(mark) and token.startswith(mark) for token in tokens])
        return cls(*ids, ordinary=ordinary, goes_on=goes_on)


class MaskedText:
    """Training data for BERT: new rows and masks in each epoch. A batch depends only on the seed and the step.

    A batch has "tokens" [row, position] with masked words, "mask" (True on real tokens), "places" [row, masked]
    (positions of masked tokens) and "targets" (their original ids, -100 for unused entries). Sentence pairs also have
    "segments" and "random_next" [row], 1 if the second sentence does not follow the first. "word_weight" and
    "pair_weight" [row] are the number of tokens of the whole batch divided by the number of targets and of pairs, so
    that a batch can be split (see `keifu.training.objectives.language_modeling`).
    """

    def __init__(
        self, shards: SentenceShards, vocabulary: MaskingVocabulary, masking: MaskingScheme, batch_size: int,
        seed: int = 0, validation_rows: int = 1024,
    ):  # fmt: skip
        if masking.whole_words and not vocabulary.goes_on.any():
            raise UserError("whole_words needs a tokenizer that marks what goes on with a word, as wordpiece does.")
        self.shards, self.vocabulary, self.masking = shards, vocabulary, masking
        self.batch_size, self.seed, self.validation_rows = batch_size, seed, validation_rows
        self._planner = self._row_planner(shards.training)
        self.steps_per_epoch = max(1, len(self._planner.rows(np.random.default_rng([seed, 0]))[1]) // batch_size)
        self._epochs = Epochs(self.steps_per_epoch, 1, seed, self._order)
        options = "-".join(f"{name}{value}" for name, value in asdict(masking).items())
        self.fingerprint = f"{shards.fingerprint}-{options}-batch{batch_size}-seed{seed}"

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0. It is the same in every process and does not depend on earlier
        calls."""
        bounds, elsewhere = self._epochs.item(step)
        random = np.random.default_rng([self.seed, step, 1])
        return _loss_weights([self._make_batch(self.shards.training, bounds, elsewhere, random)])[0]

    @property
    def largest(self) -> dict[str, Tensor]:
        """Batch of the longest rows, for measuring memory."""
        bounds, elsewhere = map(np.concatenate, zip(*self._order(0), strict=True))
        longest = np.argsort(-_sizes(bounds), kind="stable")[: self.batch_size]
        random = np.random.default_rng(self.seed)
        return _loss_weights([self._make_batch(self.shards.training, bounds[longest], elsewhere[longest], random)])[0]

    def validation(self) -> Iterable[dict[str, Tensor]]:
        """Return batches of evenly spaced held-out rows with fixed masks. Every row has the same weight."""
        return self._validation

    @cached_property
    def _validation(self) -> list[dict[str, Tensor]]:
        random = np.random.default_rng(VALIDATION)
        bounds, elsewhere = self._row_planner(self.shards.validation).rows(random)
        count = min(len(bounds), self.validation_rows)
        row_indices = np.arange(count) * len(bounds) // count
        parts = [row_indices[start : start + self.batch_size] for start in range(0, count, self.batch_size)]
        batches = [self._make_batch(self.shards.validation, bounds[part], elsewhere[part], random) for part in parts]
        return _loss_weights(batches)

    def _row_planner(self, sentences: Sentences) -> RowPlanner:
        masking = self.masking
        return RowPlanner(sentences, masking.length - 2 - masking.sentence_pairs, masking.short, masking.sentence_pairs)

    def _order(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return bounds and `random_next` of each batch of an epoch. All epochs have as many rows as the first: a few
        rows are left out or repeated.

        Rows are shuffled; then those of `POOL` batches are sorted by length; then the batches are shuffled. So there is
        little padding, and the order stays nearly random.
        """
        random = np.random.default_rng([self.seed, epoch])
        bounds, elsewhere = self._planner.rows(random)
        order = np.resize(random.permutation(len(bounds)), self.steps_per_epoch * self.batch_size)
        order = sort_pools(order, _sizes(bounds), self.batch_size * POOL).reshape(-1, self.batch_size)
        order = random.permutation(order)
        return list(zip(bounds[order], elsewhere[order], strict=True))

    def _make_batch(
        self, sentences: Sentences, bounds: np.ndarray, elsewhere: np.ndarray, random: np.random.Generator
    ) -> dict[str, Tensor]:
        pairs, v = self.masking.sentence_pairs, self.vocabulary
        first, second = bounds[:, 1:2] - bounds[:, :1], bounds[:, 3:4] - bounds[:, 2:3]
        total = first + second + 2 + pairs
        position = np.arange(total.max())[None]
        one = (position >= 1) & (position <= first)
        two = (position >= first + 2) & (position < first + 2 + second)
        index = np.where(one, bounds[:, :1] + position - 1, np.where(two, bounds[:, 2:3] + position - first - 2, 0))
        tokens = np.where(one | two, sentences.tokens[index], np.where(position < total, v.sep, v.pad)).astype(np.int64)
        tokens[:, 0] = v.cls
        positions, targets = self._hide(tokens, (one | two) & v.is_ordinary[tokens], total[:, 0], random)
        batch = {"tokens": tokens, "mask": position < total, "places": positions, "targets": targets}
        if pairs:
            segments = (position >= first + 2) & (position < total)
            batch |= {"segments": segments.astype(np.int64), "random_next": elsewhere}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _hide(
        self, tokens: np.ndarray, words: np.ndarray, total: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask some words in `tokens`, in place. Return their positions and their original ids."""
        masking, v = self.masking, self.vocabulary
        n_hidden = np.clip(np.rint(masking.share * total), 1, masking.most).astype(np.int64)
        if masking.whole_words:
            hidden = whole_words(words, words & ~(v.goes_on[tokens] & np.roll(words, 1, 1)), n_hidden, random)
        else:
            hidden = single_tokens(words, n_hidden, random)
        count = hidden.sum(1)
        positions = np.argsort(~hidden, axis=1, kind="stable")[:, : max(1, count.max())]
        there = np.arange(positions.shape[1]) < count[:, None]
        targets = np.where(there, np.take_along_axis(tokens, positions, 1), NOT_COUNTED)
        tokens[hidden] = _replacement(tokens[hidden], v, random)
        return np.where(there, positions, 0), targets


def _sizes(bounds: np.ndarray) -> np.ndarray:
    """Return the number of tokens of each row, without special tokens."""
    return (bounds[:, 1::2] - bounds[:, ::2]).sum(1)


def single_tokens(words: np.ndarray, n_words: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a mask [row, position] of tokens to hide: `n_words` of each row, or all if it has fewer."""
    scores = np.where(words, random.random(words.shape), 2.0)
    ranks = np.argsort(np.argsort(scores, axis=1), axis=1)
    return words & (ranks < n_words[:, None])


def whole_words(words: np.ndarray, starts: np.ndarray, n_words: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a mask of tokens to hide that contains all tokens of a word or none. Words come in a random order; a word
    that would exceed `n_words` is skipped."""
    numbers = np.where(words, np.cumsum(starts, axis=1), 0)
    hidden = np.zeros_like(words)
    for row, number in enumerate(numbers):
        sizes, remaining = np.bincount(number), n_words[row]
        for word in 1 + random.permutation(len(sizes) - 1):
            if sizes[word] <= remaining:
                hidden[row] |= number == word
                remaining -= sizes[word]
            if not remaining:
                break
    return hidden


def _replacement(tokens: np.ndarray, vocabulary: MaskingVocabulary, random: np.random.Generator) -> np.ndarray:
    """Replace hidden tokens: 80% by [MASK], 10% by a random ordinary token; 10% stay."""
    draw, random_tokens = random.random(len(tokens)), random.choice(vocabulary.ordinary, len(tokens))
    return np.where(draw < 0.8, vocabulary.mask, np.where(draw < 0.9, random_tokens, tokens))


def _loss_weights(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Add "word_weight" and "pair_weight" to the batches: the number of tokens in all of them for each target and for
    each row."""
    tokens = sum(int(batch["mask"].sum()) for batch in batches)
    targets = sum(int((batch["targets"] != NOT_COUNTED).sum()) for batch in batches)
    rows = sum(len(batch["tokens"]) for batch in batches)
    weights = {"word_weight": tokens / max(targets, 1), "pair_weight": tokens / rows}
    weight_tensors = [
        {name: torch.full((len(batch["tokens"]),), weight) for name, weight in weights.items()} for batch in batches
    ]
    return [batch | weight_fields for batch, weight_fields in zip(batches, weight_tensors, strict=True)]
