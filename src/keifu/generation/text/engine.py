"""The engine: everything that writes text goes through its steps; requests come and go at any of them.

A step reads a chunk of new prompts and writes a token of every running text (continuous batching: Orca, Yu et al.,
2022). On a CPU a request's tokens and log-probabilities depend on its prompt, settings and seed alone, not on who else
is there. (A GPU chooses kernels by the number of tokens in a step, which changes the rounding.)
"""

import time
from collections import Counter
from collections.abc import Sequence as Tokens
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.draft import Draft, Drafter, check_guesses
from keifu.generation.images.prompts import ImagePrompt, insert_images
from keifu.generation.text.model import evaluation_mode
from keifu.generation.text.request import Piece, Request, prompt_tokens
from keifu.generation.text.runner import Runner, Span, TorchRunner, blocks_of, runner_of
from keifu.generation.text.sampler import Chosen, Sampler
from keifu.generation.text.sampling_params import SamplingParams
from keifu.generation.text.scheduler import Scheduler, Sequence
from keifu.memory import reuse_freed
from keifu.threads import on_threads

MOST_GUESSES = 4  # tokens that are guessed where their number is not given
FEW = 4  # sequences up to which guesses may be worth their computation
RETRY = 64  # steps after which guesses that did not pay are tried again


class Guessing:
    """Number of tokens to guess in the next step: none while steps with guesses write fewer tokens a second.

    most: of tokens that are guessed. measured: whether the speed decides; otherwise guesses are always made.
    """

    def __init__(self, most: int, measured: bool):
        self.most, self.measured = most, measured
        self._seconds: dict[tuple[int, bool], float] = {}  # a token, by sequences and whether there were guesses
        self._waited = 0

    def allowed(self, running: int) -> int:
        """Return how many tokens may be guessed for each of `running` sequences."""
        if not self.measured:
            return self.most
        if running > FEW:
            return 0
        plain, guessed = (self._seconds.get((running, guesses), 0.0) for guesses in (False, True))
        self._waited = self._waited + 1 if plain and guessed > plain else 0
        return 0 if self._waited % RETRY else self.most

    def record(self, running: int, guessed: bool, seconds: float, tokens: int) -> None:
        """Note the time of a step that wrote `tokens` tokens."""
        key, spent = (running, guessed), seconds / tokens
        self._seconds[key] = spent if key not in self._seconds else 0.8 * self._seconds[key] + 0.2 * spent


class LaunchedStep(NamedTuple):
    """A step that was launched: its logits, those that are wanted first of each sequence, by their rows, and the tokens
    that were chosen after them, which the host has not read yet."""

    spans: list[Span]
    began: float
    logits: Tensor
    rows: list[tuple[int, Sequence]]
    chosen: Chosen | None


class Engine:
    """Generation engine for many requests at a time: `add` them at any time, and call `step` while there is `work`.

    tokenizer: None gives tokens without text. runner: what computes a step; None is the model's own. max_running: the
    most texts that are written at a time. step_tokens: the most tokens of a step; more of them read prompts faster, and
    let a text that is being written wait longer. guesses: the most tokens that are guessed to come next, from what
    followed the same three tokens earlier in the text; the text is the same without (prompt lookup, Saxena, 2023).
    None: for few sequences and as long as it is faster, and only by native code, whose bits do not depend on it. A
    `Draft` guesses by a smaller model instead.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer | None, runner: Runner | None = None, max_running: int = 32,
        step_tokens: int = 512, guesses: int | Draft | None = 0,
    ):  # fmt: skip
        reuse_freed()
        self.model, self.tokenizer = model, tokenizer
        self._modules = list(model.modules())
        self.runner = runner_of(model) if runner is None else runner
        # PyTorch's other threads would wait in a loop on the cores where native code computes the next step
        self._threads = nullcontext if isinstance(self.runner, TorchRunner) else partial(on_threads, 1)
        runner = self.runner
        draft, wanted = (guesses, guesses.most) if isinstance(guesses, Draft) else (None, guesses)
        check_guesses(guesses, tokenizer, runner.vocab_size, bool(runner.state_bytes))
        self.scheduler = Scheduler(blocks_of(runner), max_running, step_tokens, runner.window, runner.contiguous)
        usual = 0 if isinstance(runner, TorchRunner) and draft is None else MOST_GUESSES
        most = min(usual if wanted is None else wanted, self.scheduler.step_tokens // max_running - 1)
        self.guessing = Guessing(most, wanted is None)
        self.drafter = Drafter(draft, runner.vocab_size) if draft else None
        self.guessed = self.accepted = 0  # tokens, in all
        self._sequences: dict[int, Sequence] = {}
        self._numbers = count()
        self._sampler: Sampler | None = None
        self._steps: list[LaunchedStep] = []  # that were launched: one, or with `_ahead` two
        self._ahead = runner if isinstance(runner, TorchRunner) and runner.overlaps and not most else None

    @property
    def work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._sequences)

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests wait and run."""
        return len(self.scheduler.waiting), len(self.scheduler.running)

    def request(self, prompt: str | Tokens[int] | ImagePrompt, sampling: SamplingParams) -> Request:
        """Make a request for this model, of a text, of token ids, or of those with pictures; an invalid request is a
        `UserError`.
        """
        images = insert_images(prompt, self.model) if isinstance(prompt, ImagePrompt) else None
        tokens = prompt_tokens(self.tokenizer, cast(Any, prompt)) if images is None else images.tokens
        limits = self.runner.vocab_size, self.runner.context_length
        return Request(tokens, sampling, self.tokenizer, *limits, images=images)

    def add(self, request: Request) -> int:
        """Add a request and return its number, from 0 on, which its pieces have as their index.

        One that does not fit the memory for keys and values is a `UserError`; where it names no number of tokens, that
        memory ends its text as the context would.
        """
        length, pool = len(request.prompt), self.runner.n_blocks * self.runner.block_size
        if length + request.limit - 1 > pool:  # the last token is not kept
            wanted = request.sampling.max_tokens
            if wanted is not None or length > pool:
                raise UserError(
                    f"A prompt of {length} tokens and {wanted or 1} more do not fit the memory for keys and values, "
                    f"which holds {pool} tokens: shorten it, ask for fewer, or free some memory."
                )
            request.limit = pool + 1 - length
        request.index = next(self._numbers)
        sequence = self._sequences[request.index] = Sequence(request.index, request, list(request.prompt))
        self.scheduler.add(sequence)
        return request.index

    @torch.inference_mode()
    def abort(self, number: int) -> None:
        """Abort a request; one that has ended already is no error."""
        if (sequence := self._sequences.pop(number, None)) is not None:
            self.scheduler.remove(sequence)
            self.runner.forget(number)
            if self.drafter is not None:
                self.drafter.forget(number)
            living = self._sequences.keys()
            self._steps = [step for step in self._steps if any(span.sequence in living for span in step.spans)]

    def step(self) -> list[Piece]:
        """Compute a step and return the tokens that it wrote; none while only prompts were read.

        Where the device computes while the host goes on, the next step is launched before these tokens are read, if it
        does not need them. A text that ended in them has a token too many there, which is dropped.
        """
        with torch.inference_mode(), evaluation_mode(self.model, self._modules), self._threads():
            if not self._steps:
                spans = self.scheduler.schedule()
                for sequence in self.scheduler.preempted:
                    self.runner.forget(sequence.number)
                if not spans:
                    return []
                self._launch(spans, None)
            step = self._steps[0]
            if self._ahead is not None and len(self._steps) == 1:
                self._launch_following(step)
            figures = self._read(step)
            self._steps = self._steps[1:]
            try:
                pieces = self._write(step, figures)
            except BaseException:  # what was not taken is computed and chosen again
                # the step that was launched has replaced the states of fixed size before this one
                for sequence in self.scheduler.restart() if self._steps and self.runner.state_bytes else ():
                    self.runner.forget(sequence.number)
                self._steps, self._sampler = [], None
                raise
            if all(span.wanted == len(span.tokens) for span in step.spans):  # no prompt was read
                guessed = any(span.wanted > 1 for span in step.spans)
                self.guessing.record(len(step.spans), guessed, time.perf_counter() - step.began, len(pieces))
            return pieces

    def _launch(self, spans: list[Span], last: Tensor | None) -> None:
        """Launch a step and the choice of a token after each span that wants one. last: as for `TorchRunner.run`."""
        began = time.perf_counter()
        logits = self.runner.run(spans) if self._ahead is None else self._ahead.run(spans, last)
        ends = accumulate(span.wanted for span in spans)
        rows = [(end - s.wanted, self._sequences[s.sequence]) for end, s in zip(ends, spans, strict=True) if s.wanted]
        self._steps.append(LaunchedStep(spans, began, logits, rows, self._choose(logits, rows)))

    def _launch_following(self, step: LaunchedStep) -> None:
        """Launch the step after one whose tokens are not read yet, if neither its spans nor its sampler need them."""
        asks = self._sampler is None or self._sampler.asks
        if step.chosen is not None and not asks and (spans := self.scheduler.following(step.spans)):
            self._launch(spans, step.chosen.tokens)

    def _choose(self, logits: Tensor, rows: list[tuple[int, Sequence]]) -> Chosen | None:
        """Choose a token after each of these rows of the logits."""
        if not rows:
            return None
        some = logits if len(rows) == len(logits) else logits[[row for row, _ in rows]]
        requests = [sequence.request for _, sequence in rows]
        if self._sampler is None or requests != self._sampler.requests:
            vocab, defers = logits.shape[1], self._ahead is not None
            self._sampler = Sampler(requests, vocab, logits.device, self._sampler, defers)
        return self._sampler.choose(some)

    def _read(self, step: LaunchedStep) -> list[list[float]]:
        """Return the figures of the tokens that a step chose.

        Where one has to be chosen again from all tokens, the step after it has read a wrong one, and is computed again.
        """
        figures = [] if step.chosen is None else step.chosen.tolist()
        if again := [row for row, (token, *_) in enumerate(figures) if token < 0]:
            positions, writing = zip(*(step.rows[row] for row in again), strict=True)
            sampler = Sampler([s.request for s in writing], step.logits.shape[1], step.logits.device)
            for row, figure in zip(again, sampler.choose(step.logits[list(positions)]).tolist(), strict=True):
                figures[row] = figure
            self._steps, self._sampler = [step], None
        return figures

    def _write(self, step: LaunchedStep, figures: list[list[float]]) -> list[Piece]:
        """Append the sampled token of each span that needs one, and further tokens while the guesses are right."""
        pieces: list[Piece] = []
        pairs = zip(step.rows, figures, strict=True)
        chosen = [(row, figure) for row, figure in pairs if row[1].number in self._sequences]  # others were given up
        depth = 0
        while chosen:
            new = [(row, sequence, sequence.take(figure)) for (row, sequence), figure in chosen]
            pieces += [piece for *_, piece in new]
            rows = [(row + 1, s) for row, s, piece in new if _guessed(s, piece, depth)]
            further = self._choose(step.logits, rows)
            chosen = [] if further is None else list(zip(rows, further.tolist(), strict=True))
            depth += 1
        taken = Counter(piece.index for piece in pieces)
        most = self.guessing.allowed(len(self.scheduler.running))
        spans = [span for span in step.spans if span.sequence in self._sequences]
        for span in spans:
            sequence = self._sequences[span.sequence]
            self.scheduler.done(sequence, len(span.tokens) - span.wanted + taken[span.sequence])
            if span.wanted > 1:
                self._count(sequence.request, span.wanted - 1, taken[span.sequence] - 1)
            if span.wanted and self.guessing.most and self.drafter is None:
                sequence.guess(most)
        for piece in pieces:
            if piece.finish_reason:
                self.abort(piece.index)
        if self.drafter is not None:
            self._draft(self.drafter, [span.sequence for span in spans if span.wanted], most)
        return pieces

    def _draft(self, drafter: Drafter, written: list[int], most: int) -> None:
        """Guess by the draft what comes next in the sequences that were written and go on."""
        going = [self._sequences[number] for number in written if number in self._sequences]
        wanted = {sequence.number: (sequence.tokens, min(most, sequence.room)) for sequence in going}
        guesses = drafter.guess({number: room for number, room in wanted.items() if room[1] > 0})
        for sequence in going:
            sequence.guesses = guesses.get(sequence.number, [])

    def _count(self, request: Request, guessed: int, accepted: int) -> None:
        """Count guesses, and those that were right."""
        self.guessed += guessed
        self.accepted += accepted
        request.guessed += guessed
        request.accepted += accepted


def _guessed(sequence: Sequence, piece: Piece, depth: int) -> bool:
    """Return whether the token was the guess at this depth, so that the logits after it are known."""
    return piece.finish_reason is None and sequence.guesses[depth : depth + 1] == [piece.token]
