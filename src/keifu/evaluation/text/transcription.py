"""Evaluation of a speech model on recordings with transcripts: the word error rate."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from keifu.data.audio.recordings import DIGITS, FILE, read_recordings
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.intervals import mean_figures
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.inference.speech.transcription import TranscriptionParams, transcribe
from keifu.layers.transformer.speech import SpeechRecognizer

ABOUT = "a model that hears on recordings with transcripts (spoken-digits or a folder): the word error rate"
NAMES = [DIGITS]
OPTIONS = {"output", "beam", "language"}


def takes(model: nn.Module) -> bool:
    """Return whether the model transcribes speech."""
    return isinstance(model, SpeechRecognizer)


def accepts(on: str) -> bool:
    """Return whether `on` is a folder of recordings."""
    return (Path(on) / FILE).is_file()


def words(text: str) -> list[str]:
    """Split a text into words for comparison: in lower case, without punctuation."""
    return re.sub(r"[^\w' ]+", " ", text.lower()).split()


def word_errors(transcript: Sequence[str], said: Sequence[str]) -> int:
    """Return the smallest number of insertions, deletions and replacements of words (Levenshtein, 1966)."""
    row = list(range(len(transcript) + 1))
    for n, word in enumerate(said, 1):
        last, row[0] = row[0], n
        for k, other in enumerate(transcript, 1):
            last, row[k] = row[k], min(row[k] + 1, row[k - 1] + 1, last + (word != other))
    return row[-1]


def evaluate(model: Any, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return the word error rate on the test part, or on its first `limit` recordings."""
    tested = read_recordings(request.on)[1][: request.limit]
    if not any(words(recording.text) for recording in tested):
        raise UserError(f'{request.on} has no recordings of words to test on: give some of them "part": "test".')
    settings = TranscriptionParams(language=request.language, beams=request.beam or 1, fallback=False)
    transcripts = [transcribe(model, tokenizer, recording.samples(), settings).text for recording in tested]
    lengths = [len(words(recording.text)) for recording in tested]
    wrong = [
        word_errors(words(text), words(recording.text)) for text, recording in zip(transcripts, tested, strict=True)
    ]
    errors, sizes = zip(*((errors, size) for errors, size in zip(wrong, lengths, strict=True) if size), strict=True)
    figures = mean_figures("word error rate", errors, sizes=sizes) | {
        "word error rate": round(sum(wrong) / sum(lengths), 4),  # also words written for silent recordings
        "recordings without an error": round(wrong.count(0) / len(wrong), 4),
        "words": sum(lengths),
        "recordings": len(tested),
    }
    rows = [
        (e.file_name, e.speaker, e.text, *figures_of_row)
        for e, *figures_of_row in zip(tested, transcripts, wrong, strict=True)
    ]
    notes = ("The speech is synthetic: espeak-ng made it.",) if request.on == DIGITS else ()
    return EvalResult(figures, notes, items=ResultTable(("file_name", "speaker", "text", "written", "errors"), rows))
