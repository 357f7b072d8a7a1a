"""`keifu serve`: models behind OpenAI's API and a page in the browser."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from keifu.commands.shared import flags
from keifu.errors import UserError
from keifu.files import read_text

KEYS = "KEIFU_API_KEY"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LARGEST_SIZE = 2**60  # bytes
USUAL = "smollm2"  # where no model is named


@dataclass(frozen=True)
class Options(flags.Packed):
    """Serve models: OpenAI's API for programs (under /v1), and a page for people at /.

    Without a model: the runs in runs/ and, of the catalogue, smollm2 and what else was fetched or installed. A model is
    loaded when first asked for. Ctrl-C or SIGTERM ends the server once the running answers are finished.
    """

    models: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="[MODEL ...]", help="Runs, Hugging Face directories or hub ids, .gguf files, names."),
    ] = ()
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 lets other machines ask too."""
    port: int = 8000
    """The port to listen at; 0 takes one that is free."""
    socket: Path | None = None
    """Listen at a Unix socket of this path, in place of a port."""
    memory: str | None = None
    """How much the weights of all models may take, such as 4G: the one not used longest goes."""
    cache: str | None = None
    """How much the keys and values of each model's texts may take, such as 1G. Unset: a quarter of the free memory."""
    slots: int = 16
    """Texts that a model writes at the same time."""
    queue: int = 128
    """Texts that may wait for a model; what comes then is answered with status 429."""
    timeout: float = 600.0
    """Seconds after which an answer is given up."""
    max_body: str = "16M"
    """The largest request that is read."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that opens /v1; none (here, in --api-key-file or in KEIFU_API_KEY): everyone may ask."""
    api_key_file: Path | None = None
    """The file that has a key on each line."""
    cors: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An origin whose pages may ask this server, such as https://example.org."""
    access_log: bool = field(default=True)
    """Write a line of JSON for each request, without what was asked or answered, on stderr."""


def run(options: Options) -> None:
    """Serves until it is told to stop."""
    from keifu.native.pack import formats
    from keifu.serving.app import Access, application
    from keifu.serving.metrics import Metrics
    from keifu.serving.models import ServedModels
    from keifu.serving.server import Address, serve
    from keifu.serving.worker import Limits

    formats(options.weights or "own")  # an unknown one is refused before anything is served
    if wrong := [each for each in options.cors if not re.fullmatch(r"[\w+.-]+://[^/\s]+|null|\*", each)]:
        raise UserError(f"--cors is {wrong[0]!r}, which must be an origin such as https://example.org, or *.")
    address = Address(options.host, options.port, options.socket)
    memory = None if options.memory is None else size_of(options.memory, "--memory")
    cache = None if options.cache is None else size_of(options.cache, "--cache")
    limits = Limits(options.slots, options.queue, options.timeout, cache)
    keys, body = keys_of(options), size_of(options.max_body, "--max-body")
    models = ServedModels(options.models or found_models(), limits, Metrics(), memory, options.weights)
    for each in models.descriptions.values():
        print(f"{each.name}: {', '.join(each.uses)}")
    hosts = ("localhost", "127.0.0.1", "[::1]") if address.local and address.path is None else ("*",)
    serve(application(models, Access(keys, options.cors, hosts, body)), address, options.access_log)


def size_of(text: str, option: str) -> int:
    """Return the bytes that words such as "4G" or "500M" say."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT])?(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if not 0 < size < LARGEST_SIZE:
        raise UserError(f"{option} is {text[:60]!r}, which must be a size such as 500M or 4G.")
    return size


def keys_of(options: Options) -> tuple[str, ...]:
    """The keys from the options, the file and the environment."""
    lines = read_text(options.api_key_file).splitlines() if options.api_key_file else []
    keys = [*options.api_key, *lines, *os.environ.get(KEYS, "").split(",")]
    found = tuple(key.strip() for key in keys if key.strip())
    if (options.api_key or options.api_key_file) and not found:
        raise UserError(f"{options.api_key_file or '--api-key'} holds no key, and everyone could ask: give one.")
    return found


def found_models() -> tuple[str, ...]:
    """What there is and can be served: the runs in runs/, then of the catalogue smollm2 and what else is there."""
    from keifu.data.catalogue.catalogue import MODELS, is_cached

    runs = sorted(map(str, Path("runs").glob("*/")))
    others = (name for name in MODELS if name == USUAL or (is_cached(name, MODELS) and _able(name)))
    return (*filter(_able, runs), *others)


def _able(name: str) -> bool:
    from keifu.serving.models import describe

    with suppress(UserError):
        return bool(describe(name))
    return False


parse = flags.parser(Options, run, "keifu serve")
