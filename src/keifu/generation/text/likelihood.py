"""Log-likelihoods: of the tokens of a finished text, and of candidate answers to a prompt.

Logits exist for a few tokens at a time, so that memory does not grow with length · vocab. For answers, the common
prefix of prompts is computed once: a pass takes prompts padded to the same end, each followed by its longest answer;
the other answers follow one at a time, each starting from the cached prompt.

Axes: batch = texts, or prompts of a pass; length = tokens; answers; vocab.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.logits_processors import log_probability
from keifu.generation.text.model import (
    PREFILL_TOKENS,
    Model,
    OwnRunner,
    causal,
    device_of,
    evaluation_mode,
    text_model,
)  # fmt: skip
from keifu.generation.text.request import check_tokens
from keifu.generation.text.runner import Reader, Span, own_form, runner_of
from keifu.layers.attention.kv_cache import KVState

CHUNK = 256  # tokens whose logits exist at the same time


@torch.inference_mode()
def score(
    model: nn.Module, tokens: Int[Tensor, "batch length"], padding: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch predicted"]:
    """ln P(token | those before it) of every token but the first, [batch, length - 1] in float32.

    This is what `log_probability` reports while a text is written. `padding` counts the zeros before shorter texts (see
    `padding`); what stands there has no meaning. A text longer than the context is a `UserError`.
    """
    left = tokens[:, 1:].flatten()
    found = [left.new_zeros(0, dtype=torch.float32)]
    for logits in _predictions(model, tokens, padding):
        found.append(log_probability(logits, left[: len(logits)]))
        left = left[len(logits) :]
    return torch.cat(found).view(tokens[:, 1:].shape)


class LikeliestTokens(NamedTuple):
    """For every token of a text but the first: ln of its probability, and the likeliest tokens with theirs."""

    values: list[float]
    top: list[list[tuple[int, float]]]


@torch.inference_mode()
def score_likeliest(model: nn.Module, tokens: Int[Tensor, " length"], count: int) -> LikeliestTokens:
    """As `score` for one text, with the `count` likeliest tokens at each place."""
    values, top = list[float](), list[list[tuple[int, float]]]()
    for logits in _predictions(model, tokens[None], None):
        values += log_probability(logits, tokens[len(values) + 1 :][: len(logits)]).tolist()
        logs, likeliest = (logits - logits.logsumexp(-1, keepdim=True)).topk(count)
        top += [list(zip(*row, strict=True)) for row in zip(likeliest.tolist(), logs.tolist(), strict=True)]
    return LikeliestTokens(values, top)


def _predictions(
    model: nn.Module, tokens: Int[Tensor, "batch length"], padding: Tensor | None
) -> Iterator[Float[Tensor, "chunk vocab"]]:
    """The logits that predict the tokens after the first, text after text, some at a time."""
    context, longest = text_model(model).config.context_length, tokens.shape[1]
    if padding is not None:
        longest -= int(padding.min())
    if longest > context:
        raise UserError(f"The text has {longest} tokens, but this model's context is {context}: shorten it.")
    own = own_form(model)
    if own is not None:
        skipped = [0] * len(tokens) if padding is None else padding.tolist()
        for text, skip in zip(tokens.tolist(), skipped, strict=True):
            yield from _own_predictions(own, text[skip:-1], len(text) - 1)
        return
    writer = causal(model)
    with evaluation_mode(model):
        hidden = writer.hidden(tokens, None, padding)[:, :-1]
    for states in hidden.flatten(0, 1).split(CHUNK):
        yield writer.logits(states).float()


def _own_predictions(own: OwnRunner, text: Sequence[int], wanted: int) -> Iterator[Float[Tensor, "chunk vocab"]]:
    """The logits after the last `wanted` tokens of a text; zeros for those that it lacks."""
    vocab_size = own.config.vocab_size
    if wanted > len(text):
        yield torch.zeros(wanted - len(text), vocab_size)
    if not text:
        return
    runner = own.runner(-(-len(text) // own.runner(1).block_size))
    for start in range(0, len(text), CHUNK):
        piece = text[start : start + CHUNK]
        asked = max(0, min(len(piece), start + len(piece) - (len(text) - wanted)))
        logits = runner.run([Span(0, piece, start, range(runner.n_blocks), asked)])
        if asked:
            yield logits


Tokens = tuple[int, ...]
Prompts = Sequence[Sequence[int]]
Advance = Callable[[int], object]
ENCODED = 512  # texts whose tokens exist at the same time


class ScoredPair(NamedTuple):
    """The tokens of a prompt and those of an answer after it."""

    prompt: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Likelihood:
    """ln P of each token of an answer after its prompt, and whether each is the likeliest one there (`greedy`)."""

    log_probabilities: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """ln P of the whole answer."""
        return float(sum(self.log_probabilities))


def first_context(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """What the tokenizer puts before a text: a BOS, or nothing; found with the first text that is not empty."""
    text = next(filter(None, texts), "")
    plain, whole = (tokenizer.encode(text, special=special) for special in (False, True))
    return whole[: next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)]


def join_tokens(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], allow_special: bool = False
) -> list[ScoredPair]:
    """The tokens of prompts and of answers as they stand behind them, split where each prompt ends.

    Spaces at a prompt's end belong to the answer, and both are encoded together: what comes after as many tokens as the
    prompt alone has is the answer (lm-evaluation-harness does the same), for an answer may begin with another token
    behind a prompt than alone. Where the two grow together into no more tokens than the prompt, the answer is encoded
    apart. An empty prompt is the token that begins a text. An answer without tokens is a `UserError`.
    """
    split = [(prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer) for prompt, answer in texts]
    prompts = list(dict.fromkeys(prompt for prompt, _ in split))
    front = first_context(tokenizer, [*prompts, *(answer for _, answer in split)])
    ids = dict(zip(prompts, tokenizer.encode_batch(prompts, allow_special=allow_special), strict=True))
    begun = {prompt: tuple(open_prefixes(front, each) or common_beginning(tokenizer)) for prompt, each in ids.items()}
    found = []
    for start in range(0, len(split), ENCODED):  # of whole texts only their ends are kept
        some = split[start : start + ENCODED]
        wholes = tokenizer.encode_batch([prompt + answer for prompt, answer in some], allow_special=allow_special)
        for (prompt, answer), whole in zip(some, wholes, strict=True):
            tail = whole[len(ids[prompt]) :] or tokenizer.encode(answer)
            if not tail:
                raise UserError(f"The answer {answer!r} has no tokens, so it has no likelihood: give it text.")
            twice = not ids[prompt] and len(tail) > 1 and tail[0] == begun[prompt][-1]
            found.append(ScoredPair(begun[prompt], tuple(tail[1:] if twice else tail)))
    return found


def open_prefixes(front: list[int], ids: list[int]) -> list[int]:
    """A text's tokens with what the tokenizer puts before it, unless the text spells that itself."""
    return ids if front and ids[: len(front)] == front else front + ids


def common_beginning(tokenizer: Tokenizer) -> list[int]:
    """The token that stands before a text where nothing else does: BOS, or else the one that ends a text before."""
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if begin is None:
        raise UserError("A prompt is empty, and this tokenizer has no token that begins a text: give the prompt text.")
    return [begin]


OVERHEAD = 256  # tokens: what it costs to compute a few prompts apart from the others, in passes that are not full
ROOM = 2**30  # bytes of keys and values in a pass: more of them take longer to read than the weights


class Group(NamedTuple):
    """Prompts, by their places, and how many of their first tokens all of them share."""

    places: list[int]
    shared: int


def groups(prompts: Prompts) -> list[Group]:
    """The prompts in groups that begin alike, so that the fewest tokens are computed; one is never shared whole."""
    keys = [np.asarray(prompt, ">u4").tobytes() for prompt in prompts]  # they sort as their tokens do, but faster
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    alike = [_alike(keys[a], keys[b]) for a, b in zip(order, order[1:], strict=False)]
    tree = _tree(alike)
    found = [Group(order[first : last + 1], shared) for shared, first, last in tree.chosen]
    inside = {place for group in found for place in group.places}
    rest = [place for place in order if place not in inside]
    common = tree.shared if len(rest) > 1 else 0
    found += [Group(rest, common)] if rest else []
    return [Group(each, min(shared, *(len(prompts[p]) - 1 for p in each))) for each, shared in found]


def _alike(a: bytes, b: bytes) -> int:
    """How many tokens two prompts have in common at their beginning."""
    x, y = np.frombuffer(a, ">u4"), np.frombuffer(b, ">u4")
    size = min(len(x), len(y))
    different = x[:size] != y[:size]
    return int(different.argmax()) if different.any() else size


@dataclass
class _Branch:
    """A run of sorted prompts that share `shared` tokens: what its best division saves, and that division."""

    shared: int
    first: int
    saved: int = 0
    chosen: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, other: "_Branch") -> None:
        """A branch within this one is closed."""
        self.saved += other.saved
        self.chosen.extend(other.chosen)

    def close(self, last: int) -> "_Branch":
        """As one group, if that saves at least as much as the groups within do."""
        together = self.shared * (last - self.first) - OVERHEAD
        if together > 0 and together >= self.saved:
            self.saved, self.chosen = together, [(self.shared, self.first, last)]
        return self


def _tree(alike: Sequence[int]) -> _Branch:
    """The tree of prefixes of sorted prompts, from how many tokens neighbours share; its root, closed."""
    root = _Branch(min(alike, default=0), 0)
    open_branches = [root]
    for place, shared in enumerate([*alike, root.shared]):
        first, closed = place, None
        while open_branches[-1].shared > shared:
            closed = open_branches.pop().close(place)
            first = closed.first
            if open_branches[-1].shared >= shared:
                open_branches[-1].take(closed)
                closed = None
        if shared > open_branches[-1].shared:
            open_branches.append(_Branch(shared, first))
            if closed:
                open_branches[-1].take(closed)
    return root.close(len(alike))


class Prefix:
    """The keys and values of a beginning, computed once, for any number of rows that go on from it."""

    def __init__(self, model: Model, tokens: Sequence[int], device: torch.device):
        self.model, self.length = model, len(tokens)
        self.state = model.new_state(1, self.length)
        if tokens:
            for chunk in torch.tensor([list(tokens)], device=device).split(PREFILL_TOKENS, 1):
                model.hidden(chunk, self.state)

    def rows(self, count: int, capacity: int) -> KVState:
        """A state with room for `capacity` tokens in each of so many rows, which all hold the beginning."""
        state = self.model.new_state(count, capacity)
        state.begin(self.state, 0, self.length, range(count))
        return state

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one more token of one row take."""
        return self.state.token_bytes


class CacheSize(NamedTuple):
    """Of a row: tokens of its prompt after the beginning, tokens that go in with them, tokens that come later."""

    prompt: int
    now: int = 0
    later: int = 0


def plan_passes(sizes: Sequence[CacheSize], prefix: Prefix, batch_size: int | None = None) -> Iterator[list[int]]:
    """The places of rows that go through the model together, the longest first.

    A pass has at most `batch_size` rows, `PREFILL_TOKENS` tokens with their padding, `ROOM` bytes of keys and values,
    and no row that the others' lengths push out of the context; a row that is larger than that is alone. Where a pass
    has a quarter of its tokens, it also ends before a shorter prompt, which would be padded.
    """
    context = prefix.model.config.context_length
    together: list[int] = []
    now = ahead = 0  # the most tokens behind a prompt, in this pass and in all
    for place in sorted(range(len(sizes)), key=lambda place: tuple(-size for size in sizes[place])):
        size = sizes[place]
        if together:
            prompt = sizes[together[0]].prompt
            more_now, more = max(now, size.now), max(ahead, size.now + size.later)
            slots, count = prefix.length + prompt + more, len(together) + 1
            full = count > (batch_size or count) or (prompt + more_now) * count > PREFILL_TOKENS
            full = full or slots * count * prefix.token_bytes > ROOM or prefix.length + prompt + more_now > context
            shorter = size.prompt < sizes[together[-1]].prompt
            if full or (shorter and (prompt + now) * len(together) >= PREFILL_TOKENS // 4):
                yield together
                together, now, ahead = [], 0, 0
        together.append(place)
        now, ahead = max(now, size.now), max(ahead, size.now + size.later)
    if together:
        yield together


@dataclass
class _Request:
    """A prompt with its answers, the longest first; `found`: log-probabilities of each, and whether it is greedy."""

    prompt: Tokens
    answers: list[Tokens]
    found: list[tuple[list[float], bool]] = field(default_factory=list)


@torch.inference_mode()
def likelihoods(
    model: nn.Module, pairs: Sequence[ScoredPair], batch_size: int | None = None, advance: Advance | None = None
) -> list[Likelihood]:
    """The likelihood of each answer after its prompt, in the order given; batching changes it by rounding only.

    Equal pairs are computed once. batch_size: the most prompts in a pass. `advance` is called with the number of
    prompts done.
    A pair whose tokens but the last do not fit the context is a `UserError` with both lengths.
    """
    _check(text_model(model).config, pairs)
    by_prompt: dict[Tokens, dict[Tokens, None]] = defaultdict(dict)
    for prompt, answer in pairs:
        by_prompt[prompt][answer] = None
    asked = [_Request(prompt, sorted(answers, key=len, reverse=True)) for prompt, answers in by_prompt.items()]
    if own_form(model) is not None:
        found = _own_likelihoods(Reader(runner_of(model)), asked, advance)
        return [found[pair] for pair in pairs]
    writer, done = causal(model), 0
    with evaluation_mode(model):
        for places, shared in groups([each.prompt for each in asked]):
            prefix = Prefix(writer, asked[places[0]].prompt[:shared], device_of(model))
            sizes = [CacheSize(len(asked[p].prompt) - shared, len(asked[p].answers[0]) - 1) for p in places]
            for rows in plan_passes(sizes, prefix, batch_size):
                _Pass(prefix, [asked[places[row]] for row in rows]).run()
                done += len(rows)
                if advance:
                    advance(done)
    found = {ScoredPair(a.prompt, answer): each for a in asked for answer, each in zip(a.answers, a.found, strict=True)}
    return [Likelihood(tuple(values), greedy) for values, greedy in (found[pair] for pair in pairs)]


def _own_likelihoods(
    reader: Reader, asked: Sequence[_Request], advance: Advance | None
) -> dict[ScoredPair, Likelihood]:
    """The same by a model's own runner: a text for each answer but its last token, which has no part in the logits."""
    texts = [
        (each.prompt, body, [answer for answer in each.answers if answer[:-1] == body])
        for each in sorted(asked, key=lambda each: each.prompt)
        for body in dict.fromkeys(answer[:-1] for answer in each.answers)
    ]
    found, prompts = {}, set[Tokens]()
    each_read = reader.read(((*prompt, *body), len(body) + 1) for prompt, body, _ in texts)
    for (prompt, _, answers), logits in zip(texts, each_read, strict=True):
        likeliest = logits.argmax(-1).tolist()
        for answer in answers:
            values = log_probability(logits, torch.tensor(answer)).tolist()
            found[ScoredPair(prompt, answer)] = Likelihood(tuple(values), likeliest == list(answer))
        prompts.add(prompt)
        if advance:
            advance(len(prompts))
    return found


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


class _Pass:
    """Prompts that are computed together, in one batch."""

    def __init__(self, prefix: Prefix, asked: Sequence[_Request]):
        self.prefix, self.asked = prefix, asked
        self.lengths = [len(each.prompt) for each in asked]
        self.longest = max(self.lengths) + max(len(each.answers[0]) for each in asked) - 1
        self.state = prefix.rows(len(asked), self.longest)
        self.device = self.state.device

    def run(self) -> None:
        """Finds the likelihood of every answer."""
        start = self.prefix.length
        hidden = self._hidden([[*each.prompt[start:], *each.answers[0][:-1]] for each in self.asked])
        lasts = [length - start - 1 for length in self.lengths]
        self._first_tokens(hidden[range(len(lasts)), lasts])
        self._later_tokens(hidden, 0, [last + 1 for last in lasts])
        for turn in range(1, max(len(each.answers) for each in self.asked)):
            tails = [each.answers[turn][:-1] if turn < len(each.answers) else () for each in self.asked]
            if not any(tails):
                return  # the answers that are left have one token each
            self.state.rollback(self.lengths)
            self._later_tokens(self._hidden(tails), turn, [0] * len(tails))

    def _hidden(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch length dim"]:
        """The hidden states of these tokens, with zeros behind the shorter rows: nothing sees what comes after it."""
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        return self.prefix.model.hidden(tokens, self.state)

    def _first_tokens(self, hidden: Float[Tensor, "batch dim"]) -> None:
        """Scores the first token of all answers: those of a prompt share one row of logits."""
        rows = [row for row, each in enumerate(self.asked) for _ in each.answers]
        targets = [answer[0] for each in self.asked for answer in each.answers]
        values, best = self._target_log_probabilities(hidden, rows, targets)
        each_found = zip(rows, values.tolist(), best.tolist(), strict=True)
        for row, value, greedy in each_found:
            self.asked[row].found.append(([value], greedy))

    def _later_tokens(self, hidden: Float[Tensor, "batch length dim"], turn: int, first: Sequence[int]) -> None:
        """Scores the later tokens of each prompt's answer of this turn; in `hidden` its tokens begin at `first`."""
        answers = [each.answers[turn] if turn < len(each.answers) else () for each in self.asked]
        places = [(row, first[row] + n) for row, answer in enumerate(answers) for n in range(len(answer) - 1)]
        if not places:
            return
        rows, columns = torch.tensor(places, device=self.device).T
        targets = [token for answer in answers for token in answer[1:]]
        values, best = self._target_log_probabilities(hidden[rows, columns], range(len(places)), targets)
        for (row, _), value, greedy in zip(places, values.tolist(), best.tolist(), strict=True):
            known, so_far = self.asked[row].found[turn]
            known.append(value)
            self.asked[row].found[turn] = (known, so_far and greedy)

    def _target_log_probabilities(
        self, hidden: Float[Tensor, "states dim"], rows: Sequence[int], targets: Sequence[int]
    ) -> tuple[Float[Tensor, " answers"], Bool[Tensor, " answers"]]:
        """ln P of each target after the hidden state of its row (`rows` ascend), and whether it is the likeliest."""
        row, target = torch.tensor(rows, device=self.device), torch.tensor(targets, device=self.device)
        found = [
            _of_chunk(self.prefix.model.logits(chunk).float(), row - start, target)
            for start, chunk in zip(range(0, len(hidden), CHUNK), hidden.split(CHUNK), strict=True)
        ]
        values, best = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values, best


def _of_chunk(
    logits: Float[Tensor, "rows vocab"], row: Int[Tensor, " answers"], target: Int[Tensor, " answers"]
) -> tuple[Float[Tensor, " here"], Bool[Tensor, " here"]]:
    """`_target_log_probabilities` for those targets whose row is in this chunk of logits."""
    here = (row >= 0) & (row < len(logits))
    row, target = row[here], target[here]
    return logits[row, target] - logits.logsumexp(-1)[row], logits.argmax(-1)[row] == target
