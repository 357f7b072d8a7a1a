"""Texts into texts of another language by an encoder-decoder: sentences, batches, beam search; knows no model by name.

A text's translation is the same alone and among others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from keifu.data.lengths import passes
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.beam import Search, beam_search, paper_penalty
from keifu.generation.beam_decoders import SourceDecoder, Translator, device_of
from keifu.generation.beam_texts import Hypothesis
from keifu.generation.decoding import Model, Reader, evaluating
from keifu.generation.sentences import joined, sentences

PASS_TOKENS = 4096  # of the sources of a batch together, padding included
MARGIN = 50  # a translation may have so many tokens more than its source (the Transformer's paper, section 6.1)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Translating:
    """How sentences are translated."""

    beam: int = 4
    """Texts held open; 1 takes the likeliest token at each step."""
    alpha: float = 0.6
    """Exponent of the length penalty ((5 + length) / 6)^alpha: more gives longer translations."""
    max_tokens: int | None = None
    """Most tokens of a sentence's translation; unset: those of the sentence and 50 more."""
    batch_size: int = 64
    """Most sentences at a time: it changes the speed and no translation."""

    def __post_init__(self) -> None:
        for name in ("beam", "max_tokens", "batch_size"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} is {value}, which must be at least 1.")
        if not -10 <= self.alpha <= 10:
            raise UserError(f"alpha is {self.alpha}, which must be from -10 to 10; the paper has 0.6.")


@dataclass(frozen=True)
class Translation:
    """A sentence's translation.

    score: ln P over the length penalty. tokens: how many were written, the end token aside. complete: False where the
    limit of tokens cut it. source_tokens: those of the source with its end; `unknown` of them are the unknown token.
    """

    source: str
    text: str
    score: float
    tokens: int
    complete: bool
    source_tokens: int
    unknown: int


def translates(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder."""
    return isinstance(model, Translator)


def does_not_translate(model: nn.Module) -> str:
    """The sentence for a model that is asked to translate and cannot: what it can do instead."""
    name = type(model).__name__
    if isinstance(model, Translator):
        return f"this {name} has no tokenizer, so it cannot read a text."
    if isinstance(model, Reader):
        return f"a {name} can embed texts (keifu embed) or classify them (keifu classify)."
    if isinstance(model, Model):
        return f"a {name} can continue a text (keifu generate)."
    return f"a {name} cannot; choose an encoder-decoder, such as keifu train transformer makes."


def translator(model: nn.Module) -> Translator:
    """The same model, known to be one that translates; any other is a `UserError`."""
    if not isinstance(model, Translator):
        raise UserError(f"This model does not translate: {does_not_translate(model)}")
    return model


def translate(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], beam: int = 4, alpha: float = 0.6
) -> list[str]:
    """The translation of each text, sentence by sentence."""
    found = translate_texts(model, tokenizer, texts, Translating(beam, alpha))
    return [joined(each.text for each in parts) for parts in found]


def translate_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    settings: Translating = Translating(),  # noqa: B008 (it is frozen)
    split: Callable[[str], list[str]] = sentences,
    progress: Progress | None = None,
) -> list[list[Translation]]:
    """For each text the translations of its sentences, in order; an empty text has none.

    split: what makes sentences of a text. progress: is told how many sentences are done.
    A sentence longer than the model takes is a `UserError` with both lengths.
    """
    parts = [[part for part in split(text) if part.strip()] for text in texts]
    places = [f"Sentence {k} of text {n}" for n, each in enumerate(parts, 1) for k in range(1, len(each) + 1)]
    flat = [part for each in parts for part in each]
    ids = source_ids(translator(model), tokenizer, flat, places)
    found = zip(flat, ids, search(translator(model), ids, settings, progress), strict=True)
    done = (_translation(tokenizer, *each) for each in found)
    return [[next(done) for _ in each] for each in parts]


def source_ids(model: Translator, tokenizer: Tokenizer, texts: Sequence[str], places: Sequence[str]) -> list[list[int]]:
    """The tokens of sentences with the end token behind; one too long is a `UserError` that says which it is."""
    room = model.config.context_length
    ids = [[*each, model.config.end_id] for each in tokenizer.encode_batch(texts)]
    for place, each in zip(places, ids, strict=True):
        if len(each) > room:
            raise UserError(
                f"{place} has {len(each)} tokens, but this model takes {room} at most: part it with full stops or "
                "shorten it."
            )
    return ids


def search(
    model: Translator, sources: Sequence[Sequence[int]], settings: Translating, progress: Progress | None = None
) -> list[Hypothesis]:
    """The best target of each source, in their order; neighbours in length are translated together."""
    config = model.config
    idle = {config.pad_id, config.start_id} - {config.end_id}
    penalty = partial(paper_penalty, alpha=settings.alpha)
    how = Search((config.end_id,), settings.beam, penalty=penalty, never=tuple(sorted(idle)))
    found: dict[int, Hypothesis] = {}
    assert isinstance(model, nn.Module)
    with evaluating(model):
        for places in passes([len(source) for source in sources], PASS_TOKENS, settings.batch_size):
            limits = [_limit(len(sources[place]), config.context_length, settings.max_tokens) for place in places]
            decoder = SourceDecoder(model, [sources[place] for place in places], max(limits), device_of(model))
            best = beam_search(decoder, how, limits)
            found |= {place: texts[0] for place, texts in zip(places, best, strict=True)}
            if progress:
                progress(len(found))
    return [found[place] for place in range(len(sources))]


def _limit(source_tokens: int, room: int, wanted: int | None) -> int:
    """Most tokens of a target with its end token: the paper's, or as many as are wanted, but no more than fit."""
    return min(room, source_tokens + MARGIN if wanted is None else wanted)


def _translation(tokenizer: Tokenizer, source: str, ids: Sequence[int], best: Hypothesis) -> Translation:
    unknown = tokenizer.special.get("unk_token")
    count = 0 if unknown is None else ids.count(tokenizer.token_id(unknown))
    text = " ".join(tokenizer.decode(best.tokens).split("\n")).strip()
    return Translation(source, text, best.score, len(best.tokens), best.ended, len(ids), count)
