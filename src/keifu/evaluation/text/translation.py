"""Evaluation of translation models: BLEU and chrF by sacrebleu, with the tokenizer that the language needs.

For a catalogue entry the test pairs are used, on which keifu never trains; for a file all pairs.

BLEU (Papineni et al., 2002) counts common word n-grams, so it depends on the splitting into words: scores are
comparable only if their signatures are equal (Post, 2018). chrF (Popović, 2015) counts character n-grams and needs no
words.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from keifu.data.progress import counting
from keifu.data.text.dataset_report import SCRIPTS, script_numbers
from keifu.data.text.normalization import near_training
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.translation.pairs import Pair, Pairs, pair_names, read_pairs, split
from keifu.errors import UserError, install
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.inference.text.translation import Translation, TranslationParams, is_translator, translate_texts

WITHOUT_SPACES = {"ja", "zh"}
RESAMPLES = 1000  # of the bootstrap
HOW = install("evaluation")


class Scores(NamedTuple):
    """BLEU and chrF, from 0 to 100, with sacrebleu's signatures, which describe how each was computed."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


class Scorer:
    """Scores of translations into one language.

    language: a code such as ja; "" if it is unknown. note: a sentence that a reader of the figures must know, or "".
    """

    def __init__(self, language: str):
        try:
            from sacrebleu import metrics
        except ImportError as error:
            raise UserError(f"BLEU and chrF need the package sacrebleu: {HOW} brings it.") from error
        tokenizer, self.note = _tokenizer(language)
        self.metrics: Any = metrics.BLEU(tokenize=tokenizer), metrics.CHRF()  # pyright: ignore[reportPrivateImportUsage]

    def __call__(self, translations: Sequence[str], references: Sequence[str]) -> Scores:
        """Return the scores of all translations together, each with one reference."""
        both = [metric.corpus_score(list(translations), [list(references)]).score for metric in self.metrics]
        return Scores(*both, *(str(metric.get_signature()) for metric in self.metrics))

    def intervals(self, translations: Sequence[str], references: Sequence[str]) -> tuple[str, str]:
        """Return the 95% percentile intervals of BLEU and chrF by the bootstrap over sentences (Koehn, 2004)."""
        ranges = []
        for metric in self.metrics:
            # counts of each sentence; their sums give a score. sacrebleu's bootstrap fails for few sentences
            counts = np.array(metric._extract_corpus_statistics(list(translations), [list(references)]))
            generator = np.random.default_rng(0)
            samples = (counts[generator.integers(0, len(counts), len(counts))] for _ in range(RESAMPLES))
            scores = [metric._compute_score_from_stats(part.sum(0).tolist()).score for part in samples]
            low, high = np.percentile(scores, [2.5, 97.5])
            ranges.append(f"{low:.2f} to {high:.2f}")
        return ranges[0], ranges[1]

    def by_length(
        self, sources: Sequence[str], translations: Sequence[str], references: Sequence[str], spaced: bool
    ) -> ResultTable:
        """Return the scores of groups of sentences of similar length.

        The length is that of the source, in words (groups of 5) if it is `spaced`, else in characters (groups of 10).
        The last group has no upper bound (Bahdanau et al., 2014, figure 2).
        """
        step = 5 if spaced else 10
        groups: dict[int, list[int]] = defaultdict(list)
        for i, source in enumerate(sources):
            length = len(source.split()) if spaced else len("".join(source.split()))
            groups[min((max(length, 1) - 1) // step, 9)].append(i)
        rows = []
        for group, members in sorted(groups.items()):
            scores = self([translations[i] for i in members], [references[i] for i in members])
            end = f"-{(group + 1) * step}" if group < 9 else " and more"
            rows.append((f"{group * step + 1}{end}", len(members), round(scores.bleu, 2), round(scores.chrf, 2)))
        return ResultTable(("source words" if spaced else "source characters", "pairs", "BLEU", "chrF"), rows)


def language_of(texts: Iterable[str]) -> str:
    """Return ja, zh or ko if most letters are of that script, else ""."""
    letters = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.int64)
    counts = Counter(SCRIPTS[number] for number in script_numbers(letters).tolist())
    kana, han, hangul = counts["Hiragana"] + counts["Katakana"], counts["Han"], counts["Hangul"]
    half = sum(count for name, count in counts.items() if name not in ("common", "other", "emoji")) / 2
    if hangul > half:
        return "ko"
    if kana + han <= half:
        return ""
    return "ja" if kana > han / 20 else "zh"


def _tokenizer(language: str) -> tuple[str, str]:
    """Return sacrebleu's tokenizer for a language, and a remark."""
    if language != "ja":
        return ("zh", "") if language == "zh" else ("13a", "")
    if not (find_spec("ipadic") and find_spec("MeCab")):  # sacrebleu needs both
        remark = "MeCab is not installed, so BLEU counts characters (tok:char), which gives other figures than words"
        return "char", f"{remark}: {HOW} brings it."
    return "ja-mecab", ""


ABOUT = "a translator on pairs of sentences: BLEU and chrF"
takes, NAMES = is_translator, pair_names()
FILES = {"source_field", "target_field", "encoding"}
OPTIONS = {"reverse", "language", "beam", "alpha", "batch_size", "by_length", "output", *FILES}


def accepts(on: str) -> bool:
    """Return whether `on` is a file, or two files."""
    return all(Path(part.strip()).expanduser().is_file() for part in on.split(","))


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Translate the sources, each as a whole, and score all translations together."""
    pairs, notes = test_pairs(request)
    sources, references = map(list, zip(*pairs.rows, strict=True))
    scorer = Scorer(request.language or pairs.languages[1] or language_of(references))
    start = time.perf_counter()
    done = _translate(model, tokenizer, sources, request)
    seconds = time.perf_counter() - start
    texts = [translation.text for translation in done]
    scores = scorer(texts, references)
    intervals = scorer.intervals(texts, references)
    figures = {
        "BLEU": round(scores.bleu, 2),
        "BLEU, 95% interval": intervals[0],
        "chrF": round(scores.chrf, 2),
        "chrF, 95% interval": intervals[1],
        "pairs": len(pairs),
        "sentences/s": round(len(pairs) / seconds, 1),
        "BLEU signature": scores.bleu_signature,
        "chrF signature": scores.chrf_signature,
    }
    tables = {}
    if request.by_length:
        spaced = (pairs.languages[0] or language_of(sources)) not in WITHOUT_SPACES
        tables["by length"] = scorer.by_length(sources, texts, references, spaced)
    items = {"source": sources, "reference": references, "translation": texts}
    if request.on in NAMES:
        near = items["near copy"] = near_training(pairs.rows, training_pairs(request.on, pairs.languages))
        tables["near copies in the training part"] = by_nearness(scorer, texts, references, near)
    notes += [*remarks(done), *filter(None, [scorer.note])]
    return EvalResult(figures, tuple(notes), tables, ResultTable(tuple(items), list(zip(*items.values(), strict=True))))


def training_pairs(on: str, languages: tuple[str, str]) -> list[Pair]:
    """Return the training pairs of a catalogue entry, in the direction of these languages."""
    pairs = read_pairs(on, False)
    return split(pairs if pairs.languages == languages else pairs.reversed()).train


def by_nearness(
    scorer: Scorer, translations: Sequence[str], references: Sequence[str], near: Sequence[bool]
) -> ResultTable:
    """Return the scores of pairs that have a near copy in training (within one word or character), and of the other
    pairs."""
    rows = []
    for name, nearness in (("without", False), ("with", True)):
        members = [index for index, is_near in enumerate(near) if is_near == nearness]
        if not members:
            continue
        part = [translations[index] for index in members], [references[index] for index in members]
        scores, intervals = scorer(*part), scorer.intervals(*part)
        rows.append((name, len(members), round(scores.bleu, 2), intervals[0], round(scores.chrf, 2), intervals[1]))
    return ResultTable(("near copy", "pairs", "BLEU", "BLEU, 95%", "chrF", "chrF, 95%"), rows)


def test_pairs(request: EvalRequest) -> tuple[Pairs, list[str]]:
    """Return the test pairs, in the model's direction if it is known, and notes about them."""
    pairs = read_pairs(request.on, request.reverse, (request.source_field, request.target_field), request.encoding)
    notes = [pairs.left_out] if pairs.left_out else []
    trained = request.languages[0], request.languages[1]
    languages_known = all(trained) and all(pairs.languages)
    if languages_known and pairs.languages == trained[::-1] and not request.reverse:
        pairs = pairs.reversed()
        notes.append(f"The model translates from {trained[0]} into {trained[1]}: {request.on} is swapped.")
    elif languages_known and pairs.languages != trained:
        learned, test_direction = (" into ".join(pair) for pair in (trained, pairs.languages))
        notes.append(f"The model was trained to translate from {learned}, and these pairs are from {test_direction}.")
    rows = split(pairs).test if request.on in NAMES else pairs.rows
    languages = pairs.languages if any(pairs.languages) or request.reverse else trained
    return Pairs(pairs.name, rows[: request.limit], languages), notes


def _translate(model: nn.Module, tokenizer: Tokenizer, sources: list[str], request: EvalRequest) -> list[Translation]:
    """Return one translation for each source text. Texts are not split into sentences, because references are not."""
    options = {field.name: vars(request).get(field.name) for field in fields(TranslationParams)}
    settings = TranslationParams(**{name: value for name, value in options.items() if value is not None})
    with counting("Translating", len(sources), "sentences") as progress:
        done = translate_texts(model, tokenizer, sources, settings, lambda text: [text], progress)
    return [translation for [translation] in done]


def remarks(done: list[Translation]) -> list[str]:
    """Return warnings about unfinished translations and unknown tokens, which the scores do not show."""
    cut, unknown = sum(not part.complete for part in done), sum(part.unknown for part in done)
    notes = []
    if cut:
        notes.append(f"{cut:,} of {len(done):,} translations reached their limit of tokens and were not finished.")
    if unknown:
        share = unknown / sum(part.source_tokens for part in done)
        notes.append(f"{unknown:,} tokens of the sources ({share:.2%}) are unknown to the model's vocabulary.")
    return notes
