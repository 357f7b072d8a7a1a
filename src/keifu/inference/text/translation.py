"""Translation by an encoder-decoder: splits texts into sentences, batches them by length, and runs beam search.

The translation of a text does not depend on other texts of the batch. Sentences are found by punctuation, Latin or
Japanese.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Int
from torch import Tensor, nn

from keifu.data.padding import length_buckets, pad
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.beam_search import BeamModel, Hypothesis, Logits, Search, beam_search, paper_penalty
from keifu.inference.text.model import Encoder, Translator, device_of, evaluation_mode, is_writer
from keifu.native.model import native_form
from keifu.native.targets import NativeTranslator, Targets
from keifu.ranges import Count, Range, check

OPENING, CLOSING = "「『（〈《【［｛“(", "」』）〉》】］｝”)"
FULL_WIDTH = "。！？｡"  # always ends a sentence
HALF_WIDTH = ".!?…"  # ends a sentence before a space
QUOTES = "\"'»’"
PARTICLES = tuple("とっをはがにのもでへやなだじ、")  # after a Japanese quotation these continue a sentence
WORD = 60  # the longest word, and the most spaces, that are examined
SHORTENED = """mr mrs ms dr prof st sr jr vs no nos vol pp ed eds cf al fig figs gen col capt lt sgt rev hon approx dept
est jan feb mar apr jun jul aug sep sept oct nov dec bzw ca vgl nr str mme mlle sra srta"""
ABBREVIATIONS = frozenset(SHORTENED.split())  # a name or number may follow; single letters need no entry
LANGUAGE = re.compile(r"\s*(>>[^<>\s]+<<)\s*")  # target-language token of Marian's multilingual models
WIDE = re.compile(r"[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f]")


def sentences(text: str) -> list[str]:
    """Split a text into its sentences, in order and without the spaces between them. A text of spaces has none.

    A full stop does not end a sentence inside brackets or quotation marks that are closed later, after an initial or a
    usual abbreviation, or within a number. A text without such marks is one sentence. A language token at the beginning
    (>>fra<<) is repeated before each sentence.
    """
    if mark := LANGUAGE.match(text):
        return [f"{mark[1]} {sentence}" for sentence in sentences(text[mark.end() :])]
    parts, start = [], 0
    for end in _ends(text):
        if text[start:end].strip():
            parts.append(text[start:end].strip())
            start = end
    return parts + ([text[start:].strip()] if text[start:].strip() else [])


def join_sentences(parts: Iterable[str]) -> str:
    """Join sentences with spaces, except next to a Japanese or Chinese character."""
    text = ""
    for part in filter(None, (part.strip() for part in parts)):
        space = " " if text and not WIDE.match(text[-1]) and not WIDE.match(part[0]) else ""
        text += space + part
    return text


def _ends(text: str) -> list[int]:
    """Return the positions after which a new sentence begins."""
    enclosed = _is_enclosed(text)
    ends, position = [], 0
    while position < len(text):
        last = text[position]
        position += 1
        if last not in FULL_WIDTH + HALF_WIDTH:
            continue
        while position < len(text) and text[position] in FULL_WIDTH + HALF_WIDTH + QUOTES + CLOSING:
            last = text[position] if text[position] in FULL_WIDTH else last
            position += 1
        quotation = text[position - 1] in CLOSING and text[position : position + 1] in PARTICLES
        if not enclosed[position] and not quotation and (last in FULL_WIDTH or _starts_sentence(text, position)):
            ends.append(position)
    return ends


def _starts_sentence(text: str, position: int) -> bool:
    """Return whether the half-width mark before `position` ends a sentence: a space follows, then no lower-case
    letter."""
    before, following = text[max(0, position - WORD) : position].split()[-1], text[position : position + WORD].lstrip()
    if not following or not text[position].isspace() or following.lstrip(OPENING + QUOTES)[:1].islower():
        return False
    if not before.endswith(".") or before.endswith(".."):
        return True
    word = before.strip(OPENING + CLOSING + QUOTES).rstrip(".").rpartition(".")[2].lower()
    return word not in ABBREVIATIONS and not (len(word) == 1 and word.isalpha())


def _is_enclosed(text: str) -> list[bool]:
    """Return for each character, and for the end, whether it is inside matching brackets or quotation marks."""
    inside, opened = [False] * (len(text) + 1), []
    for index, character in enumerate(text):
        if character in OPENING:
            opened.append((character, index))
        elif character in CLOSING:
            opening = OPENING[CLOSING.index(character)]
            while opened:
                mark, start = opened.pop()
                if mark == opening:
                    inside[start + 1 : index] = [True] * (index - start - 1)
                    break
    return inside


PASS_TOKENS = 4096  # tokens of a batch's sources, with padding
MARGIN = 50  # maximal number of tokens by which a translation exceeds its source (the Transformer's paper, section 6.1)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TranslationParams:
    """How sentences are translated."""

    beam: Count = 4
    """Beams; 1 takes the likeliest token at each step."""
    alpha: Annotated[float, Range(-10, 10, note=" (the paper has 0.6)")] = 0.6
    """Exponent of the length penalty ((5 + length) / 6)^alpha: more gives longer translations."""
    max_tokens: Count | None = None
    """Most tokens of a sentence's translation; unset: those of the sentence and 50 more."""
    batch_size: Count = 64
    """Most sentences at a time: it changes the speed and no translation."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Translation:
    """Translation of a sentence.

    score: ln P over the length penalty. tokens: their number without the end token. complete: False if the limit of
    tokens cut it. source_tokens: number of tokens of the source with its end. unknown: how many of these are the
    unknown token.
    """

    source: str
    text: str
    score: float
    tokens: int
    complete: bool
    source_tokens: int
    unknown: int


def is_translator(model: nn.Module) -> bool:
    """Return whether the model is an encoder-decoder."""
    return isinstance(model, Translator)


def explain_not_translator(model: nn.Module) -> str:
    """Return why a model cannot translate, and what it can do instead, as the end of an error message."""
    name = type(model).__name__
    if isinstance(model, Translator):
        return f"this {name} has no tokenizer, so it cannot read a text."
    if isinstance(model, Encoder):
        return f"a {name} can embed texts (keifu embed) or classify them (keifu classify)."
    if is_writer(model):
        return f"a {name} can continue a text (keifu generate)."
    return f"{name} models cannot; choose an encoder-decoder, such as keifu train transformer makes."


def translator(model: nn.Module) -> Translator:
    """Return the model. Raises `UserError` if it is not an encoder-decoder."""
    if not isinstance(model, Translator):
        raise UserError(f"This model does not translate: {explain_not_translator(model)}")
    return model


def translate(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], beam: int = 4, alpha: float = 0.6
) -> list[str]:
    """Return the translation of each text, sentence by sentence.

    Args:
        model: A translator.
        tokenizer: Its tokenizer.
        texts: The texts to translate.
        beam: Number of translations that the search keeps open.
        alpha: Strength of the length penalty; higher favours longer translations.

    Returns:
        A translation for each text, in their order.
    """
    translations = translate_texts(model, tokenizer, texts, TranslationParams(beam, alpha))
    return [join_sentences(part.text for part in parts) for parts in translations]


def translate_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    settings: TranslationParams = TranslationParams(),  # noqa: B008 (it is frozen)
    split: Callable[[str], list[str]] = sentences,
    progress: Progress | None = None,
) -> list[list[Translation]]:
    """Return for each text the translations of its sentences, in order; an empty text has none.

    split: function that cuts a text into sentences. progress: called with the number of finished sentences. Raises
    `UserError` for a sentence longer than the context.
    """
    parts = [[part for part in split(text) if part.strip()] for text in texts]
    labels = [f"Sentence {k} of text {n}" for n, sentences in enumerate(parts, 1) for k in range(1, len(sentences) + 1)]
    flat = [part for sentences in parts for part in sentences]
    ids = source_ids(translator(model), tokenizer, flat, labels)
    searched = zip(flat, ids, search(translator(model), ids, settings, progress), strict=True)
    done = (_translation(tokenizer, *pair) for pair in searched)
    return [[next(done) for _ in sentences] for sentences in parts]


def source_ids(model: Translator, tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Return the tokens of sentences, each with the end token. If the model's config has a prefix (T5), it is put
    before each sentence that does not begin with it. Raises `UserError` for a sequence that is too long. labels: names
    of the texts for that error."""
    room = model.config.context_length
    prefix = vars(model.config).get("prefix") or ""
    named = [text if text.startswith(prefix) else prefix + text for text in texts]
    ids = [[*tokens, model.config.end_id] for tokens in tokenizer.encode_batch(named)]
    for label, tokens in zip(labels, ids, strict=True):
        if len(tokens) > room:
            raise UserError(f"{label} has {len(tokens)} tokens, but this model takes {room}: split it by full stops.")
    return ids


def search(
    model: Translator, sources: Sequence[Sequence[int]], settings: TranslationParams, progress: Progress | None = None
) -> list[Hypothesis]:
    """Find the best target of each source, in order. Sources of similar length are translated together."""
    config = model.config
    idle = {config.pad_id, config.start_id} - {config.end_id}
    penalty = partial(paper_penalty, alpha=settings.alpha)
    how = Search((config.end_id,), settings.beam, penalty=penalty, never=tuple(sorted(idle)))
    by_index: dict[int, Hypothesis] = {}
    assert isinstance(model, nn.Module)
    with evaluation_mode(model), torch.inference_mode():
        for indices in length_buckets([len(source) for source in sources], PASS_TOKENS, settings.batch_size):
            # maximal tokens of a target with its end: the user's limit or the paper's, but no more than fit the context
            most = [settings.max_tokens or len(sources[index]) + MARGIN for index in indices]
            limits = [min(config.context_length, tokens) for tokens in most]
            best = beam_search(_targets(model, [sources[index] for index in indices], max(limits), how), how, limits)
            by_index |= dict(zip(indices, best, strict=True))
            if progress:
                progress(len(by_index))
    return [by_index[index] for index in range(len(sources))]


class EncoderDecoderBeamModel:
    """Decoder of targets. Sources are encoded once. longest: maximal number of tokens in a target."""

    def __init__(self, model: Translator, sources: Sequence[Sequence[int]], longest: int, device: torch.device):
        self.model = model
        self.begin = torch.full((len(sources),), model.config.start_id, device=device)
        source, mask = pad(sources, model.config.pad_id)
        self.state = model.start(source.to(device), None if mask is None else mask.to(device), longest)

    def first(self) -> Logits:
        return self.next(self.begin)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        return self.model.logits(self.model.hidden(tokens[:, None], self.state)[:, -1]).float()

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.state.select(rows)


def _targets(model: Translator, sources: Sequence[Sequence[int]], longest: int, how: Search) -> BeamModel:
    """Return a beam model for these sources. It uses the native step if the model has one."""
    assert isinstance(model, nn.Module)
    packed = native_form(model, NativeTranslator)
    if packed is None:
        return EncoderDecoderBeamModel(model, sources, longest, device_of(model))
    memory = packed.encode(*pad(sources, model.config.pad_id))
    return Targets(packed, memory, [len(source) for source in sources], longest, how.beams * len(sources))


def _translation(tokenizer: Tokenizer, source: str, ids: Sequence[int], best: Hypothesis) -> Translation:
    unknown = tokenizer.special.get("unk_token")
    count = 0 if unknown is None else ids.count(tokenizer.token_id(unknown))
    text = " ".join(tokenizer.decode(best.tokens).split("\n")).strip()
    return Translation(source, text, best.score, len(best.tokens), best.ended, len(ids), count)
