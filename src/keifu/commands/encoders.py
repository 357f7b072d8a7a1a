"""What the verbs for encoders share: a model that reads, texts that come one a line, and their ids; knows no verb."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keifu.commands.language import text_from
from keifu.errors import UserError


def texts_from(arguments: Sequence[str], file: Path | None, example: str) -> list[str]:
    """The arguments, each a text, or else the lines of the file or of standard input.

    An empty text is a `UserError` with its line, for then whoever reads the results would count wrong.
    """
    if arguments and file is not None:
        raise UserError(f"There are two sources of texts, the arguments and {file}: give one of them.")
    place = "The command line" if arguments else file or "Standard input"
    texts = list(arguments) or [line.removesuffix("\r") for line in text_from(file, example).split("\n")]
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if len(empty) == len(texts):
        raise UserError(f"{place} holds no text.")
    if empty:
        what = "text" if arguments else "line"
        raise UserError(f"{place}: {what} {empty[0]} of {len(texts)} is empty; put words there, or take it out.")
    return texts


def load_encoder(name: str, dtype: str | None = None) -> tuple[Any, Any]:
    """A model that reads in both directions, or a CLIP, and its tokenizer; for any other kind a `UserError`."""
    from keifu.checkpoints import load
    from keifu.checkpoints.opening import DTYPES
    from keifu.evaluation.encoding import Encoder
    from keifu.evaluation.shared_space import TwoTowers

    model, tokenizer = load(name, DTYPES[dtype] if dtype else None)
    if tokenizer is None or not isinstance(model, Encoder | TwoTowers):
        kind = type(model).__name__
        raise UserError(f"{name} is a {kind}, which gives no vectors for texts: choose an encoder, such as minilm.")
    return model, tokenizer


def ids(model: Any, tokenizer: Any, texts: Sequence[str], cut: bool) -> Any:
    """The ids of texts; that some were cut is said on stderr."""
    from keifu.evaluation.encoding import encoded

    limit = model.config.context_length
    rows, shortened = encoded(tokenizer, texts, limit, cut)
    if shortened:
        print(f"{shortened} of {len(texts)} texts were cut to the model's {limit} tokens.", file=sys.stderr)
    return rows
