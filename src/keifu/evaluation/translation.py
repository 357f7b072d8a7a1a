"""How well a translator translates: BLEU and chrF on pairs that it has not seen; knows neither model nor language by
name.

Of a catalogue name the held-out test pairs count, which no training by keifu sees; of a file all pairs.
"""

import time
from dataclasses import fields

from torch import nn

from keifu.data.pairs import Pairs, pair_names, read_pairs
from keifu.data.progress import counting
from keifu.data.splits import split
from keifu.data.tokenizer_core import Tokenizer
from keifu.evaluation.bleu import WITHOUT_SPACES, Scorer, language_of
from keifu.evaluation.task import Asked, Outcome, Table
from keifu.generation.translation import Translating, Translation, translate_texts, translates

ABOUT = "a translator on pairs of sentences: BLEU and chrF"
FILES = {"source_field", "target_field", "encoding"}
OPTIONS = {"reverse", "language", "beam", "alpha", "batch_size", "by_length", "output", *FILES}


def takes(model: nn.Module) -> bool:
    """Whether it translates."""
    return translates(model)


def names() -> list[str]:
    """The catalogue's pairs, in both directions."""
    return list(pair_names())


def accepts(on: str) -> bool:
    """Whether `on` is one of them, or a file or two."""
    from pathlib import Path

    return on in names() or all(Path(part.strip()).expanduser().is_file() for part in on.split(","))


def evaluate(model: nn.Module, tokenizer: Tokenizer, asked: Asked) -> Outcome:
    """Translates the sources, each whole as it stands, and scores all translations together."""
    pairs, notes = test_pairs(asked)
    sources, references = map(list, zip(*pairs.rows, strict=True))
    scorer = Scorer(asked.language or pairs.languages[1] or language_of(references))
    start = time.perf_counter()
    found = _translated(model, tokenizer, sources, asked)
    seconds = time.perf_counter() - start
    texts = [each.text for each in found]
    scores = scorer(texts, references)
    figures = {
        "BLEU": round(scores.bleu, 2),
        "chrF": round(scores.chrf, 2),
        "pairs": len(pairs),
        "sentences/s": round(len(pairs) / seconds, 1),
        "BLEU signature": scores.bleu_signature,
        "chrF signature": scores.chrf_signature,
    }
    tables = {}
    if asked.by_length:
        spaced = (pairs.languages[0] or language_of(sources)) not in WITHOUT_SPACES
        bins = scorer.by_length(sources, texts, references, spaced)
        rows = [(length, n, round(part.bleu, 2), round(part.chrf, 2)) for length, n, part in bins]
        tables["by length"] = Table(("source words" if spaced else "source characters", "pairs", "BLEU", "chrF"), rows)
    items = Table(("source", "reference", "translation"), list(zip(sources, references, texts, strict=True)))
    return Outcome(figures, (*notes, *remarks(found), *filter(None, [scorer.note])), tables, items)


def test_pairs(asked: Asked) -> tuple[Pairs, list[str]]:
    """The pairs that count, in the model's direction where that is known, and what is to be said about them."""
    pairs = read_pairs(asked.on, asked.reverse, (asked.source_field, asked.target_field), asked.encoding)
    notes = [pairs.left_out] if pairs.left_out else []
    trained, known = asked.languages, all(asked.languages) and all(pairs.languages)
    if known and pairs.languages == trained[::-1] and not asked.reverse:
        pairs = pairs.reversed()
        notes.append(f"The model translates from {trained[0]} into {trained[1]}: the sides of {asked.on} are swapped.")
    elif known and pairs.languages != trained:
        own, given = (" into ".join(each) for each in (trained, pairs.languages))
        notes.append(f"The model was trained to translate from {own}, and these pairs are from {given}.")
    rows = split(pairs).test if asked.on in pair_names() else pairs.rows
    languages = pairs.languages if any(pairs.languages) or asked.reverse else trained
    return Pairs(pairs.name, rows[: asked.limit], languages), notes


def _translated(model: nn.Module, tokenizer: Tokenizer, sources: list[str], asked: Asked) -> list[Translation]:
    """One translation a source: a pair is not parted into sentences, since its reference is not."""
    given = {each.name: vars(asked)[each.name] for each in fields(Translating) if each.name in vars(asked)}
    settings = Translating(**{name: value for name, value in given.items() if value is not None})
    with counting("Translating", len(sources), "sentences") as progress:
        found = translate_texts(model, tokenizer, sources, settings, lambda text: [text], progress)
    return [each for [each] in found]


def remarks(found: list[Translation]) -> list[str]:
    """What the figures alone would hide."""
    cut, unknown = sum(not each.complete for each in found), sum(each.unknown for each in found)
    notes = []
    if cut:
        notes.append(f"{cut:,} of {len(found):,} translations reached their limit of tokens and were not finished.")
    if unknown:
        share = unknown / sum(each.source_tokens for each in found)
        notes.append(f"{unknown:,} tokens of the sources ({share:.2%}) are unknown to the model's vocabulary.")
    return notes
