"""Speculative decoding (Leviathan et al., 2023): a smaller model, the draft, guesses the next tokens.

The engine checks all guesses of a sequence in one step. The text does not depend on the guesses. It is generated faster
if the draft is fast and often right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.likelihood import STEP_TOKENS
from keifu.inference.text.model import text_model
from keifu.inference.text.paged.blocks import BlockManager
from keifu.inference.text.runner import Span, runner_of
from keifu.native.model import NativeLM


@dataclass(frozen=True)
class Draft:
    """Draft model and its tokenizer. most: maximal number of tokens to guess at once; None: chosen by `Engine`."""

    model: nn.Module
    tokenizer: Tokenizer | None = None
    most: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, counted twice (for PyTorch and native code) unless they are packed."""
        if isinstance(self.model, NativeLM):
            return self.model.nbytes
        return 2 * sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers()))

    def has_vocabulary(self, tokenizer: Tokenizer | None, vocab_size: int) -> bool:
        """Return whether the draft has the same vocabulary as the model."""
        if tokenizer is None or self.tokenizer is None:
            return text_model(self.model).config.vocab_size == vocab_size
        return self.tokenizer.backend.get_vocab() == tokenizer.backend.get_vocab()


def check_guesses(guesses: int | Draft | None, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Raise `UserError` for a draft that does not fit the model."""
    if isinstance(guesses, Draft) and not guesses.has_vocabulary(tokenizer, vocab_size):
        raise UserError("The draft has another vocabulary than the model: choose one with the same tokenizer.")


class Drafter:
    """Draft of one engine, with the keys and values of the sequences that it has read. vocab_size: of the engine's
    model."""

    def __init__(self, draft: Draft, vocab_size: int):
        self.vocab_size, self.runner = vocab_size, runner_of(draft.model.eval())
        self.blocks = BlockManager(self.runner.n_blocks, self.runner.block_size, sharing=False)
        self._read: dict[int, list[int]] = {}  # tokens whose keys and values are in the blocks, by sequence
        self._sure: dict[int, int] = {}  # number of tokens at the last call that were no guesses: they do not change
        self._tables: dict[int, list[int]] = {}

    def guess(self, wanted: Mapping[int, tuple[Sequence[int], int]]) -> dict[int, list[int]]:
        """Guess the most likely next tokens of sequences. wanted: for each sequence its tokens and the number to
        guess."""
        texts = {number: [*tokens] for number, (tokens, most) in wanted.items() if self._fits(number, tokens, most)}
        for number, text in texts.items():
            self._go_back(number, text)
        ends = {number: len(text) + wanted[number][1] for number, text in texts.items()}
        while spans := [self._span(number, text) for number, text in texts.items() if len(text) < ends[number]]:
            logits = self.runner.run(spans)[:, : self.vocab_size]
            guesses = iter(logits.argmax(-1).tolist())
            for span in spans:
                self._read[span.sequence][span.start :] = span.tokens
                if span.wanted:
                    texts[span.sequence].append(next(guesses))
        return {number: text[len(wanted[number][0]) :] for number, text in texts.items()}

    def _go_back(self, number: int, text: list[int]) -> None:
        """Discard the keys and values from the first wrong guess on."""
        read, sure = self._read.setdefault(number, []), self._sure.get(number, 0)
        guesses = enumerate(zip(read[sure:], text[sure:], strict=False), sure)
        del read[next((at for at, (old, new) in guesses if old != new), len(text)) :]
        self._sure[number] = len(text)

    def _span(self, number: int, text: list[int]) -> Span:
        """Return the next tokens of a text that the draft must read. If it has read all, return the last one again."""
        start = self.runner.latest(number, min(len(self._read[number]), len(text) - 1))
        tokens = text[start : start + STEP_TOKENS]
        end = start + len(tokens)
        guesses = max(0, end - self._sure[number])
        return Span(number, tokens, start, self._tables[number], int(end == len(text)), guesses=guesses)

    def _fits(self, number: int, tokens: Sequence[int], most: int) -> bool:
        """Return whether a sequence with its guesses fits the draft's vocabulary, context and memory. If so, allocate
        the memory."""
        total, table = len(tokens) + most, self._tables.get(number, [])
        lacking = -(-total // self.runner.block_size) - len(table)
        # tokenizers may be equal though the numbers of embeddings differ
        unknown = max(tokens[self._sure.get(number, 0) :], default=0) >= self.runner.vocab_size
        if unknown or total > self.runner.context_length or lacking > self.blocks.free:
            return False
        self._tables[number] = table + self.blocks.allocate(max(0, lacking), table[-1] if table else None)
        return True

    def forget(self, number: int) -> None:
        """Free the memory of a sequence."""
        self.blocks.release(self._tables.pop(number, []))
        self._read.pop(number, None)
        self._sure.pop(number, None)
        self.runner.forget(number)
