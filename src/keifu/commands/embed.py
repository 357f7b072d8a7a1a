"""`keifu embed`: embeddings of texts and images, and their nearest neighbours."""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands.shared import flags, tables
from keifu.commands.shared.inputs import embed_inputs, ids, load_encoder, pictures_among, texts_from, warn_of_language
from keifu.errors import UserError
from keifu.files import write_atomic
from keifu.ranges import Count

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = 'keifu embed minilm "A text" "Another one"'
SILENT = 2000  # with more texts than this, progress is shown
FORMATS = (".npy", ".json")


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Turn texts into vectors of length 1. Each argument is a text. Without arguments, each line of a file or pipe is a
    text.

    A CLIP embeds pictures too: an argument that is the name of a picture file is read as a picture.

    A word2vec embeds a word, or words that are joined by + and -, as in "king - man + woman". With --nearest alone, it
    searches its whole vocabulary.

    Without --out or --nearest, each text and its vector are printed as a line of JSON.
    """

    model: flags.Model
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]", help="The texts.")] = ()
    file: Path | None = None
    """The file that has a text on each line."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",), metavar="PATH")] = None
    """The .npy file (float32, a row a text) or .json file for the vectors."""
    nearest: Count | None = None
    """Number of the most similar texts to print for each text, with their cosine similarity."""
    among: Path | None = None
    """The file whose lines are searched for the nearest, or a folder of pictures; without it, the texts themselves, or
    the vocabulary of a word2vec."""
    cut: Annotated[bool, tyro.conf.arg(aliases=("--truncate",))] = False
    """Keep the beginning of a text that is longer than the model takes."""
    batch_size: Count = 256
    """Texts that go through the model together, at most."""


def run(options: Options) -> None:
    """Embed the inputs, write the embeddings and print the nearest neighbours."""
    if options.out and options.out.suffix not in FORMATS:
        raise UserError(f"The vectors go into a .npy or a .json file, and {options.out} is neither.")
    if options.among and options.nearest is None:
        raise UserError(f"{options.among} would be searched, but nothing is: say how many with --nearest.")
    texts = texts_from(options.texts, options.file, EXAMPLE)
    among = (pictures_among(options.among) or texts_from((), options.among, EXAMPLE)) if options.among else None
    warn_of_language(options.model, texts)
    from keifu.inference.embeddings.words import WordModel

    model, tokenizer = load_encoder(options.model, WordModel)
    vectors = _embed(model, tokenizer, texts, options)
    if options.out:
        _write(options.out, texts, vectors)
    if options.nearest is not None and among is None and isinstance(model, WordModel):
        _show_nearest_words(options.nearest, (texts, vectors), model, tokenizer)
    elif options.nearest is not None:
        searched = None if among is None else (among, _embed(model, tokenizer, among, options))
        _show_nearest(options.nearest, (texts, vectors), searched)
    if not options.out and options.nearest is None:
        for text, vector in zip(texts, _numbers(vectors), strict=True):
            print(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))


def _embed(model: Any, tokenizer: Any, texts: Sequence[str], options: Options) -> "Tensor":
    from keifu.data.progress import counting
    from keifu.inference.embeddings.encoders import embed_rows
    from keifu.inference.embeddings.words import WordModel, combination, signed_words
    from keifu.inference.text.model import TwoTowers

    if isinstance(model, WordModel):
        import torch

        return torch.stack([combination(model, signed_words(tokenizer, text), text) for text in texts])
    if isinstance(model, TwoTowers):
        return embed_inputs(model, tokenizer, texts, options.cut, options.batch_size)
    rows, pad_id = ids(model, tokenizer, texts, options.cut), tokenizer.pad_id or 0
    with counting("Embedding", len(texts), "texts") if len(texts) > SILENT else nullcontext() as advance:
        return embed_rows(model, rows, pad_id, options.batch_size, advance)


def _write(path: Path, texts: Sequence[str], vectors: "Tensor") -> None:
    if path.suffix == ".npy":
        import numpy as np

        content = io.BytesIO()
        np.save(content, vectors.cpu().numpy(), allow_pickle=False)
        write_atomic(path, content.getvalue())
    else:
        lines = [{"text": text, "vector": vector} for text, vector in zip(texts, _numbers(vectors), strict=True)]
        write_atomic(path, json.dumps(lines, ensure_ascii=False) + "\n")
    print(f"Wrote {len(texts):,} vectors of {vectors.shape[1]} numbers to {path}.", file=sys.stderr)


def _numbers(vectors: "Tensor") -> list[list[float]]:
    """Round to 8 decimals, the precision of float32 for numbers of this size."""
    import numpy as np

    return np.round(vectors.cpu().double().numpy(), 8).tolist()


def _show_nearest(count: int, queries: tuple[list[str], Any], among: tuple[list[str], Any] | None) -> None:
    from keifu.inference.embeddings.encoders import nearest

    texts, vectors = queries
    candidates, points = among or queries
    similarity, indices = nearest(vectors, points, count, themselves=among is None)
    rows = [
        [text if number == 0 else "", f"{value:.3f}", candidates[index]]
        for text, values, order in zip(texts, similarity.tolist(), indices.tolist(), strict=True)
        for number, (value, index) in enumerate(zip(values, order, strict=True))
    ]
    tables.show(["text", "similarity", "nearest"], rows)


def _show_nearest_words(count: int, queries: tuple[list[str], Any], model: Any, tokenizer: Any) -> None:
    """Print the words nearest to each text, without the words that it consists of."""
    from keifu.inference.embeddings.words import signed_words, unknown_id

    texts, vectors = queries
    unknown = unknown_id(tokenizer)
    rows = []
    for text, vector in zip(texts, vectors, strict=True):
        own_words = [index for index, _ in signed_words(tokenizer, text)]
        left_out = {*own_words} if unknown is None else {*own_words, unknown}
        if count > (n_others := model.config.vocab_size - len(left_out)):
            raise UserError(f"{count} nearest words were requested, but there are only {n_others} to choose from.")
        near, cosines = model.nearest(vector, count, tuple(left_out))
        for number, (index, value) in enumerate(zip(near.tolist(), cosines.tolist(), strict=True)):
            rows.append([text if number == 0 else "", f"{value:.3f}", tokenizer.backend.id_to_token(index)])
    tables.show(["text", "similarity", "nearest"], rows)
