"""Loading of tokenizers: chooses the reader for a path. Also tokenizers that a recipe trains, which are cached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from keifu.data.prepared_folders import build_once
from keifu.data.tokenizers.formats import READERS, finish_backend, reader, settings_beside
from keifu.data.tokenizers.gguf import gguf_tokenizer, read_gguf_fields
from keifu.data.tokenizers.seq2seq import SOURCE, TARGET_TOKENIZER, read_marian, read_two_sided
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.folders import cache
from keifu.untrusted import reading

KEPT = "state/tokenizer"  # folder of a run for the tokenizers that it trained
LEARNED: dict[str, Tokenizer] = {}  # trained tokenizers by name; the next run saves them
RUN_FOLDER: ContextVar[Path | None] = ContextVar("RUN_FOLDER", default=None)


@contextmanager
def tokenizers_kept_in(out: Path) -> Iterator[None]:
    """Run a block in which `learned_tokenizer` first looks in the folder of this run."""
    token = RUN_FOLDER.set(out)
    try:
        yield
    finally:
        RUN_FOLDER.reset(token)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a directory, of a file (with the other files of its folder), or of a catalogue name.

    A directory is searched for these, in order: Marian's source.spm with target.spm and vocab.json; tokenizer.json; a
    SentencePiece tokenizer.model, or T5's spiece.model; the vocab.json with merges.txt of GPT-1, GPT-2 or CLIP (or
    encoder.json with vocab.bpe); BERT's vocab.txt; OpenAI's file of CLIP's merges. A file may be any of these except
    Marian's, or a GGUF.
    Raises `UserError` with the reason if it cannot be read.
    """
    path = _path_of(path)
    with reading(path):
        return _load(path)


def learned_tokenizer(name: str, learn: Callable[[], Tokenizer]) -> Tokenizer:
    """Return the tokenizer of this name from the run folder of `tokenizers_kept_in`, else from the cache. Train it by
    `learn` if it is missing.

    name: a string that changes with the training data and settings. Training again could number the tokens differently,
    and a resumed run would change. So the next run saves the tokenizer.
    """
    out = RUN_FOLDER.get()
    folders = [*([out / KEPT / name] if out else []), cache() / "tokenizers" / name]

    def saved() -> Path | None:
        return next((place for place in folders if (place / "tokenizer_config.json").exists()), None)  # written last

    build_once(folders[-1], lambda: saved() is not None, lambda new: learn().save(new))  # only one process trains it
    LEARNED[name] = load_tokenizer(saved() or folders[-1])
    return LEARNED[name]


def _load(path: Path) -> Tokenizer:
    if path.suffix == ".gguf":
        return gguf_tokenizer(read_gguf_fields(path))
    if path.is_dir():
        if (path / SOURCE).exists():
            return read_marian(path, settings_beside(path))
        if (path / TARGET_TOKENIZER).exists():
            return read_two_sided(path)
        name = next((name for name in READERS if (path / name).exists()), None)
        if name is None:
            raise UserError(f"The directory {path} holds no tokenizer: none of {', '.join(READERS)}.")
        path = path / name
    config = settings_beside(path.parent)
    return finish_backend(reader(path)(path, config), path.parent, config)


def _path_of(path: str | Path) -> Path:
    if Path(path).exists():
        return Path(path)
    from keifu.data.catalogue.catalogue import CATALOGUE, MODELS, fetch

    entries = {name: entry for name, entry in CATALOGUE.items() if entry.kind == "tokenizer"} | MODELS
    if str(path) in entries:
        return fetch(str(path), entries)
    raise UserError(f"There is no tokenizer at {path}: give a directory, a file, or one of {', '.join(entries)}.")
