"""Engine that generates text for many requests in common steps. Requests can be added and removed at any step.

A step reads a chunk of new prompts and generates a token of every running text (continuous batching: Orca, Yu et al.,
2022). On a CPU a request's tokens and log-probabilities depend only on its prompt, settings and seed, not on other
requests. (A GPU chooses kernels by the number of tokens in a step, which changes the rounding.)
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence as Tokens
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import ImagePrompt, insert_images
from keifu.inference.text.draft import Draft, Drafter, check_guesses
from keifu.inference.text.model import evaluation_mode
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.paged.stored import stored_prefixes
from keifu.inference.text.request import Piece, Request, prompt_tokens
from keifu.inference.text.runner import Runner, Span, TorchRunner, blocks_of, runner_of
from keifu.inference.text.sampler import Chosen, Sampler
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.scheduler import Scheduler, Sequence
from keifu.memory import reuse_freed
from keifu.threads import on_threads

MOST_GUESSES = 4  # default maximum of guessed tokens
FEW = 4  # with more sequences, guesses cost more than they gain
RETRY = 64  # steps until guesses that were too slow are tried again


class Guessing:
    """Number of tokens to guess in the next step. It is 0 while steps with guesses generate fewer tokens per second.

    most: maximal number of guesses. measured: whether the speed decides; otherwise guesses are always made.
    """

    def __init__(self, most: int, measured: bool):
        self.most, self.measured = most, measured
        self._seconds: dict[tuple[int, bool], float] = {}  # per token, by sequences and guesses
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
        """Record the time of a step that generated `tokens` tokens."""
        key, spent = (running, guessed), seconds / tokens
        self._seconds[key] = spent if key not in self._seconds else 0.8 * self._seconds[key] + 0.2 * spent


class LaunchedStep(NamedTuple):
    """Step that was launched. rows: for each sequence the row of its first wanted logits. chosen: tokens sampled from
    these rows, which the host has not read yet."""

    spans: list[Span]
    began: float
    logits: Tensor
    rows: list[tuple[int, Sequence]]
    chosen: Chosen | None


class Engine:
    """Generation engine for many requests at once: `add` requests at any time, and call `step` while there is `work`.

    tokenizer: None gives tokens without text. runner: computes the steps; None: the model's default. max_running:
    maximal number of texts that are generated at once. step_tokens: maximal tokens of a step; a larger number reads
    prompts faster, but delays running texts. guesses: maximal number of tokens to guess from the text after an earlier
    occurrence of the last three tokens (prompt lookup, Saxena, 2023); they do not change the text. None: guess for few
    sequences, as long as it is faster, and only in native code, whose bits do not depend on guesses. A `Draft` guesses
    by a smaller model instead. folder: keeps keys and values between runs of the program; None: nothing is kept.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer | None, runner: Runner | None = None, max_running: int = 32,
        step_tokens: int = 512, guesses: int | Draft | None = 0, folder: CacheFolder | None = None,
    ):  # fmt: skip
        reuse_freed()
        self.model, self.tokenizer = model, tokenizer
        self._modules = list(model.modules())
        self.runner = runner_of(model) if runner is None else runner
        # PyTorch's idle threads would spin on the cores on which native code computes the next step
        self._threads = nullcontext if isinstance(self.runner, TorchRunner) else partial(on_threads, 1)
        runner = self.runner
        draft, wanted = (guesses, guesses.most) if isinstance(guesses, Draft) else (None, guesses)
        check_guesses(guesses, tokenizer, runner.vocab_size)
        stored = stored_prefixes(folder, runner, blocks := blocks_of(runner))
        self.scheduler = Scheduler(blocks, max_running, step_tokens, runner.contiguous, stored)
        usual = 0 if isinstance(runner, TorchRunner) and draft is None else MOST_GUESSES
        most = min(usual if wanted is None else wanted, self.scheduler.step_tokens // max_running - 1)
        self.guessing = Guessing(most, wanted is None)
        self.drafter = Drafter(draft, runner.vocab_size) if draft else None
        self.guessed = self.accepted = 0  # total numbers of tokens
        self._sequences: dict[int, Sequence] = {}
        self._numbers = count()
        self._sampler: Sampler | None = None
        self._steps: list[LaunchedStep] = []  # launched steps: one, or two if `_ahead`
        self._ahead = runner if isinstance(runner, TorchRunner) and runner.overlaps and not most else None

    @property
    def work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._sequences)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of waiting and of running requests."""
        return len(self.scheduler.waiting), len(self.scheduler.running)

    def request(
        self, prompt: str | Tokens[int] | ImagePrompt, sampling: SamplingParams, visible_tokens: Iterable[int] = ()
    ) -> Request:
        """Return a request of this model for a text, token ids, or a prompt with pictures. Raises `UserError` if it is
        invalid. visible_tokens: special tokens that stay in the text."""
        images = insert_images(prompt, self.model) if isinstance(prompt, ImagePrompt) else None
        tokens = prompt_tokens(self.tokenizer, cast(Any, prompt)) if images is None else images.tokens
        limits = self.runner.vocab_size, self.runner.context_length
        return Request(tokens, sampling, self.tokenizer, *limits, visible_tokens=visible_tokens, images=images)

    def add(self, request: Request) -> int:
        """Add a request. Return its number, counted from 0, which is the index of its pieces.

        Raises `UserError` if it exceeds the memory for keys and values. If the request does not set max_tokens, its
        text ends when that memory is full.
        """
        length, pool = len(request.prompt), self.runner.n_blocks * self.runner.block_size
        if length + request.limit - 1 > pool:  # the last token needs no memory
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
        """End a request. Nothing happens if it has already ended."""
        if (sequence := self._sequences.pop(number, None)) is not None:
            self.scheduler.remove(sequence)
            self.runner.forget(number)
            if self.drafter is not None:
                self.drafter.forget(number)
            living = self._sequences.keys()
            self._steps = [step for step in self._steps if any(span.sequence in living for span in step.spans)]

    def step(self) -> list[Piece]:
        """Compute a step. Return the generated tokens; none while only prompts are read.

        If the device works asynchronously, the next step is launched before these tokens are read, unless it depends on
        them. If a text ends, its token of that next step is dropped.
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
            except BaseException:  # tokens that were not taken are computed again
                # the launched step has overwritten the states of fixed size before this one
                for sequence in self.scheduler.restart() if self._steps and self.runner.state_bytes else ():
                    self.runner.forget(sequence.number)
                self._steps, self._sampler = [], None
                raise
            if all(span.wanted == len(span.tokens) for span in step.spans):  # no prompt was read
                guessed = any(span.wanted > 1 for span in step.spans)
                self.guessing.record(len(step.spans), guessed, time.perf_counter() - step.began, len(pieces))
            return pieces

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the requests until all have ended."""
        while self.work:
            yield from self.step()

    def _launch(self, spans: list[Span], last: Tensor | None) -> None:
        """Launch a step, and the sampling of a token after each span that wants one. last: as in `TorchRunner.run`."""
        began = time.perf_counter()
        logits = self.runner.run(spans) if self._ahead is None else self._ahead.run(spans, last)
        ends = accumulate(span.wanted for span in spans)
        rows = [(end - s.wanted, self._sequences[s.sequence]) for end, s in zip(ends, spans, strict=True) if s.wanted]
        self._steps.append(LaunchedStep(spans, began, logits, rows, self._choose(logits, rows)))

    def _launch_following(self, step: LaunchedStep) -> None:
        """Launch the step after one whose tokens are not read yet, unless its spans or its sampler depend on them."""
        asks = self._sampler is None or self._sampler.asks
        if step.chosen is not None and not asks and (spans := self.scheduler.following(step.spans)):
            self._launch(spans, step.chosen.tokens)

    def _choose(self, logits: Tensor, rows: list[tuple[int, Sequence]]) -> Chosen | None:
        """Sample a token from each of these rows of the logits."""
        if not rows:
            return None
        some = logits if len(rows) == len(logits) else logits[[row for row, _ in rows]]
        requests = [sequence.request for _, sequence in rows]
        if self._sampler is None or requests != self._sampler.requests:
            vocab, defers = logits.shape[1], self._ahead is not None
            self._sampler = Sampler(requests, vocab, logits.device, self._sampler, defers)
        return self._sampler.choose(some)

    def _read(self, step: LaunchedStep) -> list[list[float]]:
        """Return the figures of the tokens that a step sampled.

        If one must be sampled again from the whole vocabulary, the following step has read a wrong token and is
        computed again.
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
        """Append the sampled token of each span that wants one, and its guesses as long as they are right."""
        pieces: list[Piece] = []
        pairs = zip(step.rows, figures, strict=True)
        chosen = [(row, figure) for row, figure in pairs if row[1].number in self._sequences]  # not aborted
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
                for counted in (self, sequence.request):
                    counted.guessed += span.wanted - 1
                    counted.accepted += taken[span.sequence] - 1
            if span.wanted and self.guessing.most and self.drafter is None:
                sequence.guess(most)
        for piece in pieces:
            if piece.finish_reason:
                self.abort(piece.index)
        if self.drafter is not None:
            self._draft(self.drafter, [span.sequence for span in spans if span.wanted], most)
        return pieces

    def _draft(self, drafter: Drafter, written: list[int], most: int) -> None:
        """Let the draft guess the next tokens of the sequences that were extended and continue."""
        going = [self._sequences[number] for number in written if number in self._sequences]
        wanted = {sequence.number: (sequence.tokens, min(most, sequence.room)) for sequence in going}
        guesses = drafter.guess({number: room for number, room in wanted.items() if room[1] > 0})
        for sequence in going:
            sequence.guesses = guesses.get(sequence.number, [])


def _guessed(sequence: Sequence, piece: Piece, depth: int) -> bool:
    """Return whether the token was the guess at this depth. If so, the logits after it are computed."""
    return piece.finish_reason is None and sequence.guesses[depth : depth + 1] == [piece.token]
