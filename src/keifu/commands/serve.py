"""`keifu serve`: serves models by OpenAI's API and by a page in the browser."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from keifu.commands.shared import flags
from keifu.errors import UserError
from keifu.ranges import Count, Port, Positive
from keifu.untrusted import read_text

KEYS = "KEIFU_API_KEY"
USUAL = "smollm2"  # default model
OPEN = "WARNING: anyone who can reach {host} may use this server: it asks for no key. Give one with --api-key-file."


@dataclass(frozen=True)
class Options(flags.Packed):
    """Serve models: OpenAI's API for programs (under /v1), and a page for people at /.

    Without a model: the runs in runs/, smollm2, and the catalogue's models that were fetched or installed. A model is
    loaded at its first request. Ctrl-C or SIGTERM ends the server once the running answers are finished.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[MODEL ...]")] = ()
    """Runs, Hugging Face directories or hub ids, .gguf files, names."""
    name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Id of a model and the path or name it is loaded from: ALIAS=PATH. Clients see the alias alone."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Id of a LoRA and its folder: NAME=PATH. Requests whose model is NAME get the base model with this adapter."""
    allow_load: Path | None = None
    """Folder from which clients may load further models, by POST /v1/models/load. Unset: none."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets other machines ask too: give a key then."""
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Further host name that this server answers to, such as chat.example.org behind a proxy."""
    port: Port = 8000
    """Port to listen at; 0 takes one that is free."""
    socket: Path | None = None
    """Path of a Unix socket to listen at, instead of a port."""
    memory: str | None = None
    """Memory for the weights of all models and of a draft, such as 4G: the model not used longest is unloaded."""
    cache: str | None = None
    """Memory for the keys and values of each model, such as 1G. Unset: a quarter of the free memory."""
    cache_folder: flags.CacheFolder = None
    cache_size: flags.CacheSize = None
    slots: Count = 16
    """Number of texts that a model writes at the same time."""
    guesses: flags.Guesses = None
    draft: flags.Drafting = None
    queue: Count = 128
    """Number of texts that may wait for a model; further ones get status 429."""
    timeout: Positive = 600.0
    """Seconds after which an answer is given up."""
    keep_alive: Positive | None = None
    """Seconds after which a model that nothing asks is unloaded. Unset: never."""
    max_body: str = "16M"
    """Size of the largest request that is read."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Key that opens /v1; without one (here, in --api-key-file or in KEIFU_API_KEY) everyone may ask.
    Other users of this machine can read it here: prefer the other two."""
    api_key_file: Path | None = None
    """File with a key on each line."""
    cors: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Origin whose pages may ask this server, such as https://example.org."""
    strict: bool = False
    """Whether to refuse fields of OpenAI's that nothing heeds. Otherwise they are ignored and named in a header."""
    pictures: Path | None = None
    """Folder whose pictures a message may name as file:// URLs. Unset: none. Nothing is fetched from the network."""
    search: Path | None = None
    """Folder of .md, .txt, .rst and .html files that POST /v1/search searches, by a served encoder. Unset: none."""
    runs: Path = Path("runs")
    """Folder of training runs whose figures the page shows while they grow."""
    access_log: bool = field(default=True)
    """Whether to write a line of JSON for each request on stderr, without prompts and answers."""


def run(options: Options) -> None:
    """Run the server until a signal ends it."""
    from keifu.checkpoints.lora.peft import is_adapter
    from keifu.commands.shared.inputs import open_cache_folder, proposer, size_of
    from keifu.memory import share_freed
    from keifu.native.pack import formats
    from keifu.serving.access import LOCAL
    from keifu.serving.app import Access, application
    from keifu.serving.metrics import Metrics
    from keifu.serving.models import ServedModels, public_names
    from keifu.serving.server import Address, serve
    from keifu.serving.worker import Limits

    share_freed()
    formats(options.weights or "own")  # an unknown format is refused before the server starts
    if wrong := [origin for origin in options.cors if not re.fullmatch(r"[\w+.-]+://[^/\s]+|null|\*", origin)]:
        raise UserError(f"--cors is {wrong[0]!r}, which must be an origin such as https://example.org, or *.")
    address = Address(options.host, options.port, options.socket)
    memory = None if options.memory is None else size_of(options.memory, "--memory")
    cache = None if options.cache is None else size_of(options.cache, "--cache")
    numbers = options.slots, options.queue, options.timeout, cache, options.keep_alive
    folder = open_cache_folder(options.cache_folder, options.cache_size)
    limits = Limits(*numbers, proposer(options.draft, options.guesses, options.weights), options.pictures, folder)
    keys, body = keys_of(options), size_of(options.max_body, "--max-body")
    given_names = aliases((*options.name, *options.lora))
    if wrong := [lora for lora in options.lora if not is_adapter(Path(lora.partition("=")[2]))]:
        raise UserError(f"--lora is {wrong[0]!r}, which names no folder of adapters: serve a whole model with --name.")
    sources = public_names(options.models or (() if given_names else found_models()), given_names)
    address.check()  # models are read after this, which takes seconds
    if options.search is not None:
        check_documents(options.search)
    models = ServedModels(sources, limits, Metrics(), memory, options.weights, options.allow_load)
    for description in models.descriptions.values():
        print(f"{description.name}: {', '.join(description.uses)}")
    if options.search is not None:
        check_encoder([use for description in models.descriptions.values() for use in description.uses])
    open_to_all = address.path is not None or not (address.local or options.allowed_host)
    hosts = ("*",) if open_to_all else (*LOCAL, options.host, *options.allowed_host)
    if not address.local and not keys:
        print(OPEN.format(host=options.host), file=sys.stderr, flush=True)
    limited = Access(keys, options.cors, hosts, body, options.strict, options.runs, options.search)
    serve(application(models, limited), address, options.access_log)


def aliases(names: Sequence[str]) -> dict[str, str]:
    """Parse `ALIAS=PATH`. Return the path or name of each model by its id."""
    sources: dict[str, str] = {}
    for name in names:
        alias, _, source = name.partition("=")
        if not source or not re.fullmatch(r"[\w.:@-]+(/[\w.:@-]+)*", alias):
            raise UserError(f"{name!r} must be ALIAS=PATH, such as bard=runs/my-gpt.")
        if alias in sources:
            raise UserError(f"The alias {alias!r} is given twice: choose another for {source}.")
        sources[alias] = source
    return sources


def check_documents(folder: Path) -> None:
    """Raise `UserError` for a folder without documents."""
    from keifu.data.text.passages import document_files

    if document_files(folder) == [folder]:
        raise UserError(f"--search is {folder}, which is a file: name the folder of the documents.")


def check_encoder(uses: Sequence[str]) -> None:
    """Raise `UserError` if no served model can search."""
    if "embedding" not in uses:
        raise UserError("--search needs an encoder, and none is served: name one more model, such as minilm.")


def keys_of(options: Options) -> tuple[str, ...]:
    """Return the API keys of the options, of the file and of the environment."""
    lines = read_text(options.api_key_file).splitlines() if options.api_key_file else []
    keys = [*options.api_key, *lines, *os.environ.get(KEYS, "").split(",")]
    stripped = tuple(key.strip() for key in keys if key.strip())
    if (options.api_key or options.api_key_file) and not stripped:
        raise UserError(f"{options.api_key_file or '--api-key'} holds no key, and everyone could ask: give one.")
    return stripped


def found_models() -> tuple[str, ...]:
    """Return the models that can be served: the runs in runs/, then smollm2 and the catalogue's downloaded models."""
    from keifu.data.catalogue.catalogue import MODELS, is_cached

    runs = sorted(map(str, Path("runs").glob("*/")))
    catalogue_models = (name for name in MODELS if name == USUAL or (is_cached(name, MODELS) and _able(name)))
    return (*filter(_able, runs), *catalogue_models)


def _able(name: str) -> bool:
    from keifu.serving.models import describe

    with suppress(UserError):
        return bool(describe(name))
    return False
