"""Log-likelihoods of the tokens of a finished text, and of candidate answers to a prompt.

Logits are computed for a few tokens at a time, so that memory does not grow with length · vocab. Prompts and answers
are read by the engine's runner, so that common beginnings are computed once.

Axes: batch = texts; length = tokens; part = tokens with logits in memory; vocab.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.logits_processors import log_probability
from keifu.inference.text.model import causal, evaluation_mode, text_model
from keifu.inference.text.request import check_tokens
from keifu.inference.text.runner import Runner, blocks_of, runner_of
from keifu.native.model import Span, native_form

CHUNK = 256  # tokens with logits in memory


@torch.inference_mode()
def score(model: nn.Module, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch predicted"]:
    """Return ln P(token | tokens before it) of every token but the first, [batch, length - 1] in float32.

    This equals `log_probability` during generation. Raises `UserError` for a text longer than the context.
    """
    left = tokens[:, 1:].flatten()
    parts = [left.new_zeros(0, dtype=torch.float32)]
    for logits in _predictions(model, tokens):
        parts.append(log_probability(logits, left[: len(logits)]))
        left = left[len(logits) :]
    return torch.cat(parts).view(tokens[:, 1:].shape)


class LikeliestTokens(NamedTuple):
    """Log-probabilities of the tokens of a text after the first, and the likeliest tokens with theirs."""

    values: list[float]
    top: list[list[tuple[int, float]]]


@torch.inference_mode()
def score_likeliest(model: nn.Module, tokens: Int[Tensor, " length"], count: int) -> LikeliestTokens:
    """Score one text like `score`, with the `count` likeliest tokens at each position."""
    values, top = list[float](), list[list[tuple[int, float]]]()
    for logits in _predictions(model, tokens[None]):
        values += log_probability(logits, tokens[len(values) + 1 :][: len(logits)]).tolist()
        logs, likeliest = (logits - logits.logsumexp(-1, keepdim=True)).topk(count)
        top += [list(zip(*row, strict=True)) for row in zip(likeliest.tolist(), logs.tolist(), strict=True)]
    return LikeliestTokens(values, top)


def _predictions(model: nn.Module, tokens: Int[Tensor, "batch length"]) -> Iterator[Float[Tensor, "chunk vocab"]]:
    """Yield the logits that predict the tokens after the first, text by text, in chunks."""
    context, longest = text_model(model).config.context_length, tokens.shape[1]
    if longest > context:
        raise UserError(f"The text has {longest} tokens, but this model's context is {context}: shorten it.")
    if native_form(model) is not None:
        yield from LikelihoodReader(runner_of(model), 1).read((text[:-1], longest - 1) for text in tokens.tolist())
        return
    writer = causal(model)
    with evaluation_mode(model):
        hidden = writer.hidden(tokens, None)[:, :-1]
    for states in hidden.flatten(0, 1).split(CHUNK):
        yield writer.logits(states).float()


BLOCK = 4  # tokens of a PyTorch block: at most this number of tokens of a common beginning is computed again
Tokens = tuple[int, ...]
Advance = Callable[[int], object]
ENCODED = 512  # texts with tokens in memory


class ScoredPair(NamedTuple):
    """Token ids of a prompt and of an answer after it."""

    prompt: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Likelihood:
    """ln P of each token of an answer after its prompt. greedy: whether each token is the likeliest one."""

    log_probabilities: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """ln P of the whole answer."""
        return float(sum(self.log_probabilities))


def first_context(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """Return the tokens that the tokenizer adds before a text: BOS or nothing. They are read from the first non-empty
    text."""
    text = next(filter(None, texts), "")
    plain, whole = (tokenizer.encode(text, special=special) for special in (False, True))
    return whole[: next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)]


def join_tokens(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], allow_special: bool = False
) -> list[ScoredPair]:
    """Encode prompts with answers, and split each at the end of the prompt.

    Spaces at a prompt's end belong to the answer. Both are encoded together, since an answer may begin with another
    token after a prompt than alone. The tokens after the number of tokens of the prompt alone are the answer, as in
    lm-evaluation-harness. If the joint text has no more tokens than the prompt, the answer is encoded separately. An
    empty prompt is the token that begins a text. Raises `UserError` for an answer without tokens.
    """
    split = [(prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer) for prompt, answer in texts]
    prompts = list(dict.fromkeys(prompt for prompt, _ in split))
    front = first_context(tokenizer, [*prompts, *(answer for _, answer in split)])
    ids = dict(zip(prompts, tokenizer.encode_batch(prompts, allow_special=allow_special), strict=True))
    begun = {prompt: tuple(open_prefixes(front, each) or common_beginning(tokenizer)) for prompt, each in ids.items()}
    pairs = []
    for start in range(0, len(split), ENCODED):  # of whole texts only the ends are stored
        some = split[start : start + ENCODED]
        wholes = tokenizer.encode_batch([prompt + answer for prompt, answer in some], allow_special=allow_special)
        for (prompt, answer), whole in zip(some, wholes, strict=True):
            tail = whole[len(ids[prompt]) :] or tokenizer.encode(answer)
            if not tail:
                raise UserError(f"The answer {answer!r} has no tokens, so it has no likelihood: give it text.")
            twice = not ids[prompt] and len(tail) > 1 and tail[0] == begun[prompt][-1]
            pairs.append(ScoredPair(begun[prompt], tuple(tail[1:] if twice else tail)))
    return pairs


def open_prefixes(front: list[int], ids: list[int]) -> list[int]:
    """Return a text's tokens after those that the tokenizer adds before it, unless the text begins with them."""
    return ids if front and ids[: len(front)] == front else front + ids


def common_beginning(tokenizer: Tokenizer) -> list[int]:
    """Return the token that begins a text: BOS, or else the end-of-text token."""
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if begin is None:
        raise UserError("A prompt is empty, and this tokenizer has no token that begins a text: give the prompt text.")
    return [begin]


class _Text(NamedTuple):
    """Prompt with answers that differ only in the last token, so that all have the same logits."""

    prompt: Tokens
    body: Tokens
    answers: list[Tokens]


AHEAD = 16  # prompts that are read with one answer before their other answers are


def _texts(pairs: Sequence[ScoredPair]) -> list[_Text]:
    """Order texts so that a common beginning is computed before a second text needs it."""
    answers: dict[Tokens, dict[Tokens, list[Tokens]]] = defaultdict(dict)
    for prompt, answer in dict.fromkeys(pairs):
        answers[prompt].setdefault(answer[:-1], []).append(answer)
    prompts, ordered = sorted(answers), list[_Text]()
    for start in range(0, len(prompts), AHEAD):
        some = [[_Text(prompt, *item) for item in answers[prompt].items()] for prompt in prompts[start : start + AHEAD]]
        ordered += [texts[0] for texts in some] + [text for texts in some for text in texts[1:]]
    return ordered


@torch.inference_mode()
def likelihoods(
    model: nn.Module, pairs: Sequence[ScoredPair], batch_size: int | None = None, advance: Advance | None = None
) -> list[Likelihood]:
    """Return the likelihood of each answer after its prompt, in the given order. Batching only changes rounding.

    Equal pairs are computed once. batch_size: maximal texts in a pass. advance: called with the number of finished
    prompts. Raises `UserError` for a pair whose tokens, without the last, exceed the context.
    """
    _check(text_model(model).config, pairs)
    texts, by_pair = _texts(pairs), dict[ScoredPair, Likelihood]()
    left = Counter(text.prompt for text in texts)
    done = 0
    with evaluation_mode(model):
        reader = LikelihoodReader(runner_of(model, block_size=BLOCK), batch_size)
        read = reader.read(((*text.prompt, *text.body), len(text.body) + 1) for text in texts)
        for text in texts:
            by_pair |= _judge(text, read)
            left[text.prompt] -= 1
            if not left[text.prompt]:
                done += 1
                if advance:
                    advance(done)
    return [by_pair[pair] for pair in pairs]


def _judge(text: _Text, read: Iterator[Float[Tensor, "part vocab"]]) -> dict[ScoredPair, Likelihood]:
    """Return the likelihood of each answer of a text. The logits come in one part or more."""
    values: dict[Tokens, list[float]] = {answer: [] for answer in text.answers}
    likeliest = list[int]()
    while len(likeliest) <= len(text.body):
        logits = next(read)
        for answer, logs in values.items():
            targets = torch.tensor(answer[len(likeliest) :][: len(logits)], device=logits.device)
            logs += log_probability(logits, targets).tolist()
        likeliest += logits.argmax(-1).tolist()
    return {ScoredPair(text.prompt, answer): Likelihood(tuple(logs), likeliest == list(answer))
            for answer, logs in values.items()}  # fmt: skip


def _check(config: Any, pairs: Sequence[ScoredPair]) -> None:
    context = config.context_length
    for prompt, answer in pairs:
        if not prompt or not answer:
            raise UserError("A prompt and its answer must have a token each: one of a pair has none.")
        if len(prompt) + len(answer) - 1 > context:
            raise UserError(
                f"A prompt of {len(prompt)} tokens and its answer of {len(answer)} do not fit this model's context of "
                f"{context}: shorten them."
            )
    check_tokens([row for pair in pairs for row in pair], config.vocab_size)


STEP_TOKENS = 512  # tokens of texts that are read together


class LikelihoodReader:
    """Reader that computes the logits of whole texts. Common beginnings are computed once.

    most: maximal number of texts that are read together.
    """

    def __init__(self, runner: Runner, most: int | None = None):
        self.runner, self.blocks, self.most = runner, blocks_of(runner, whole=True), most
        self._batch: list[tuple[Span, list[bytes]]] = []  # with the hashes of the blocks that each text fills

    def read(self, texts: Iterable[tuple[Sequence[int], int]]) -> Iterator[Float[Tensor, "wanted vocab"]]:
        """Yield the logits after the last `wanted` tokens of each text, in order. Those of a text longer than
        `STEP_TOKENS` come in several parts. Raises `UserError` for a text that exceeds the memory for keys and
        values."""
        size = self.runner.block_size
        for number, (tokens, wanted) in enumerate(texts):
            hashes = self.blocks.digests(tokens)
            usable, needed = hashes[: (len(tokens) - wanted) // size], -(-len(tokens) // size)
            if needed > self.blocks.n_blocks:
                raise UserError(
                    f"A text of {len(tokens)} tokens does not fit the memory for keys and values, which holds "
                    f"{self.blocks.n_blocks * size} tokens: shorten it, or free some memory."
                )
            filling = {digest for span, own in self._batch for digest in own[span.start // size :]}
            full = sum(len(span.tokens) for span, *_ in self._batch) >= STEP_TOKENS or len(self._batch) == self.most
            if full or filling & set(usable):
                yield from self._run()
            room = needed if self.runner.contiguous else 0
            if (begun := self.blocks.begin(usable, needed, room)) is None:
                yield from self._run()
                begun = self.blocks.begin(usable, needed, room)
            assert begun is not None, "a text that fits the pool fits it alone"
            blocks, sources = begun.blocks, begun.sources
            for start in range(begun.known * size, len(tokens), STEP_TOKENS):
                piece = tokens[start : start + STEP_TOKENS]
                left = len(tokens) - start - len(piece)
                asked = min(len(piece), max(0, wanted - left))
                span = Span(number, piece, start, blocks, asked, sources, prompt=len(tokens))
                sources = []
                self._batch.append((span, hashes[: (start + len(piece)) // size]))
                if left:
                    yield from self._run(going=number)
        yield from self._run()

    def _run(self, going: int | None = None) -> Iterator[Float[Tensor, "wanted vocab"]]:
        """Read the gathered texts. going: the text that continues in the next call."""
        batch, self._batch = self._batch, []
        spans = sorted((span for span, _ in batch), key=lambda span: len(span.tokens))  # equal lengths attend together
        logits = self.runner.run(spans).split([span.wanted for span in spans]) if spans else ()
        by_sequence = dict(zip((span.sequence for span in spans), logits, strict=True))
        yield from (by_sequence[span.sequence] for span, _ in batch if span.wanted)
        for span, hashes in batch:
            self.blocks.release(span.sources)
            for block, digest in zip(span.blocks, hashes, strict=False):
                self.blocks.remember(block, digest)
            if span.sequence != going:
                self.blocks.release(span.blocks)
                self.runner.forget(span.sequence)
