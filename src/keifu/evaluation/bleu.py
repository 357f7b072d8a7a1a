"""BLEU and chrF by sacrebleu, with the tokenizer that a language needs; knows no model and no file.

BLEU (Papineni et al., 2002) counts equal runs of words, so it depends on what a word is: figures are comparable only
where their signatures are equal (Post, 2018). chrF (Popović, 2015) counts runs of characters and needs no words.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keifu.data.scripts import SCRIPTS, script_numbers
from keifu.errors import UserError

WITHOUT_SPACES = {"ja", "zh"}
HOW = "pip install 'keifu[evaluation]'"


@dataclass(frozen=True)
class Scores:
    """Both figures, from 0 to 100, with sacrebleu's signatures, which say how each was computed."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


class Scorer:
    """The scores of translations into one language; `language` is a code such as ja, "" where it is not known.

    `note` says what a reader of the figures must know, "" where there is nothing.
    """

    def __init__(self, language: str):
        self.language = language
        self.tokenizer, self.note = _tokenizer(language)

    def __call__(self, translations: Sequence[str], references: Sequence[str]) -> Scores:
        """The scores of all translations together, each beside its one reference."""
        metrics = _metrics()
        bleu, chrf = metrics.BLEU(tokenize=self.tokenizer), metrics.CHRF()
        both = [metric.corpus_score(list(translations), [list(references)]).score for metric in (bleu, chrf)]
        return Scores(both[0], both[1], str(bleu.get_signature()), str(chrf.get_signature()))

    def by_length(
        self, sources: Sequence[str], translations: Sequence[str], references: Sequence[str], spaced: bool
    ) -> list[tuple[str, int, Scores]]:
        """The scores of sentences of similar length: its range, how many there are, their scores.

        Lengths are words of the source in steps of 5 where it is `spaced`, else characters in steps of 10; the last
        step is open above (Bahdanau et al., 2014, figure 2).
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
            rows.append((f"{group * step + 1}{end}", len(members), scores))
        return rows


def language_of(texts: Iterable[str]) -> str:
    """ja, zh or ko where most letters are of that script, else "": a language by its script alone."""
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
    """What sacrebleu parts a language's texts into words with, and a remark."""
    if language != "ja":
        return ("zh", "") if language == "zh" else ("13a", "")
    try:
        import ipadic  # noqa: F401 (sacrebleu needs both)
        import MeCab  # noqa: F401
    except ImportError:
        remark = "MeCab is not installed, so BLEU counts characters (tok:char), which gives other figures than words"
        return "char", f"{remark}: {HOW} brings it."
    return "ja-mecab", ""


def _metrics() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise UserError(f"BLEU and chrF need the package sacrebleu: {HOW} brings it.") from error
    return metrics
