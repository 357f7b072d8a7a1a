"""`keifu translate`: translates an argument, a file or a pipe, line by line."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.inputs import at_terminal, decode_utf8, no_text
from keifu.commands.shared.terminal import say
from keifu.errors import UserError
from keifu.ranges import Count, Finite

EXAMPLE = 'keifu translate MODEL "This is a pen."'


@dataclass(frozen=True)
class Options(flags.Packed):
    """Translate. Every line is a text; its sentences are translated one by one and stand on one line again."""

    model: flags.Model
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[TEXT]")] = None
    """The text to translate."""
    file: Path | None = None
    """The file that has the text."""
    beam: Count = 4
    """Translations held open at a time; 1 takes the likeliest token at each step."""
    alpha: Finite = 0.6
    """Exponent of the length penalty ((5 + length) / 6)^alpha: more gives longer translations."""
    max_tokens: Count | None = None
    """Most tokens of a sentence's translation; unset: those of the sentence and 50 more."""
    batch_size: Count = 64
    """Most sentences at a time: it changes the speed and no translation."""
    json: bool = False
    """Print a JSON object for each line: its sentences with their translations, scores and numbers of tokens."""


def run(options: Options) -> None:
    """Print a translation for each line."""
    lines = lines_from(options.text, options.file)
    model, tokenizer = load_translator(options.model, options.weights)
    from keifu.data.progress import counting
    from keifu.inference.text.translation import TranslationParams, join_sentences, translate_texts

    settings = TranslationParams(options.beam, options.alpha, options.max_tokens, options.batch_size)
    show_progress = options.file is not None and sys.stderr.isatty()
    with counting("Translating", None, "sentences") if show_progress else nullcontext() as progress:
        translations = translate_texts(model, tokenizer, lines, settings, progress=progress)
    for line, parts in zip(lines, translations, strict=True):
        text = join_sentences(part.text for part in parts)
        record = {"source": line, "translation": text, "sentences": [asdict(part) for part in parts]}
        say(json.dumps(record, ensure_ascii=False) if options.json else text)
    _warn(translations)


def lines_from(text: str | None, file: Path | None) -> list[str]:
    """Return the lines of the argument, the file or standard input. Raises `UserError`, with the line number, for bytes
    that are not UTF-8."""
    if text is not None and file is not None:
        raise UserError(f"There are two texts, the argument and {file}: give one of them.")
    if text is not None:
        return text.split("\n")
    if file is None and at_terminal():
        no_text(EXAMPLE)
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    return [decode_utf8(line, str(file or "standard input"), number) for number, line in enumerate(lines, 1)]


def load_translator(name: str, weights: str | None = None) -> tuple[Any, Any]:
    """Load a translation model and its tokenizer. Raises `UserError`, with the right command, for any other model."""
    from keifu.checkpoints import load
    from keifu.inference.text.translation import explain_not_translator, is_translator

    model, tokenizer = load(name, weights=weights or "own")
    if is_translator(model) and tokenizer is not None:
        return model, tokenizer
    raise UserError(f"{name} does not translate: {explain_not_translator(model)}")


def _warn(translations: Sequence[Sequence[Any]]) -> None:
    """Warn on stderr about problems that are not visible in the translations."""
    cut = sorted({n for n, parts in enumerate(translations, 1) for part in parts if not part.complete})
    if cut:
        lines = ", ".join(map(str, cut[:10])) + (", ..." if len(cut) > 10 else "")
        print(f"The translation reached its limit of tokens before its end in line {lines}.", file=sys.stderr)
    unknown = sum(part.unknown for parts in translations for part in parts)
    if unknown:
        total = sum(part.source_tokens for parts in translations for part in parts)
        print(f"{unknown:,} of {total:,} tokens are unknown to the model's vocabulary.", file=sys.stderr)
