"""Models of a service and their uses. A model is loaded at its first request.

If memory is limited, the least recently used model is unloaded first.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from keifu.checkpoints.hub import locate
from keifu.checkpoints.loading import load, load_model, planned
from keifu.checkpoints.lora.peft import is_adapter
from keifu.checkpoints.packing import bytes_in_blocks
from keifu.devices import choose
from keifu.errors import UserError, unknown
from keifu.inference.embeddings.classifiers import text_classifier
from keifu.inference.embeddings.reranker import is_reranker
from keifu.inference.images.pipeline import image_pipeline
from keifu.inference.text.draft import Draft, check_guesses
from keifu.inference.text.model import Encoder, TwoTowers, explain_not_causal, is_writer
from keifu.inference.text.translation import is_translator
from keifu.layers.transformer.speech import SpeechRecognizer
from keifu.native.model import NativeLM, attach_native
from keifu.native.pack import OWN
from keifu.serving.errors import ApiError
from keifu.serving.facts import current
from keifu.serving.metrics import Metrics
from keifu.serving.worker import Limits, Loaded, Worker

USES = {  # uses of a model, and the path of each
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "classification": "/v1/classify",
    "translation": "/v1/translations",
    "transcription": "/v1/audio/transcriptions",
    "image": "/v1/images/generations",
    "inspection": "/v1/inspect",
    "match": "/v1/match",
}
PACKED_TOO = "translation", "transcription"  # uses of packed models that keep PyTorch weights too


@dataclass(frozen=True)
class Description:
    """Facts about a model that are known before it is loaded.

    name: its id for clients. source: the path or name to load. size: largest number of bytes that its weights take
    in all forms together. weight_bytes: bytes of the PyTorch weights.
    """

    name: str
    source: str
    uses: tuple[str, ...]
    context_length: int | None
    size: int
    weight_bytes: int
    tokenizer: Any
    config: Any


def describe(source: str, name: str | None = None) -> Description:
    """Read a model's config, tensor names and tokenizer, but no weights."""
    device = choose()
    plan = planned(source, device=device)
    tokenizer = plan.source.tokenizer()
    config: Any = plan.source.config
    uses = _uses(plan.model, tokenizer)
    if not uses:
        raise UserError(f"{source} cannot be served: {explain_not_causal(plan.model)}")
    size = weight_bytes = plan.parameters * plan.dtype.itemsize
    if device.type == "cpu" and {"completion", *PACKED_TOO} & {*uses}:
        size = 2 * weight_bytes  # for PyTorch, and packed for native code
    elif device.type != "cpu" and not is_adapter(locate(source)):
        size = bytes_in_blocks(plan)
    facts = getattr(config, "context_length", None), size, weight_bytes, tokenizer, config
    return Description(name or source, source, uses, *facts)


def _uses(model: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """Return the uses of this model with this tokenizer."""
    inside = ("inspection",) if tokenizer is not None and not isinstance(model, NativeLM) else ()
    if is_writer(model) and tokenizer is not None:
        return (*(("completion",) if tokenizer.chat_template is None else ("chat", "completion")), *inside)
    if isinstance(model, TwoTowers) and tokenizer is not None:
        return "embedding", "rerank", "match"
    labels = ("classification",) if tokenizer is not None and _is_classifier(model, tokenizer) else ()
    if isinstance(model, Encoder) and tokenizer is not None:
        return *(() if is_reranker(model) else ("embedding",)), "rerank", *labels, *inside
    if labels:
        return labels
    if is_translator(model) and tokenizer is not None:
        return "translation", *inside
    if isinstance(model, SpeechRecognizer) and tokenizer is not None:
        return ("transcription",)
    try:
        image_pipeline(model, lambda: tokenizer)
    except UserError:
        return ()
    return ("image",)


def _is_classifier(model: nn.Module, tokenizer: Any) -> bool:
    with suppress(UserError):
        text_classifier(model, tokenizer)
        return True
    return False


def public_names(sources: Sequence[str], given_names: Mapping[str, str]) -> dict[str, str]:
    """Return the path or name of each model by its id for clients.

    The id is the source. For an absolute path, or one that leaves the folder, it is only the last part, so that clients
    do not see the server's paths. Raises `UserError` if two models have the same id.

    Args:
        sources: models without a chosen id.
        given_names: models with a chosen id, by id.
    """
    paths = dict(given_names)
    for source in sources:
        path = Path(source)
        name = path.resolve().name if path.is_absolute() or ".." in path.parts else source
        if paths.setdefault(name, source) != source:
            raise UserError(f"{paths[name]} and {source} would both be called {name!r}: choose with --name ALIAS=PATH.")
    return paths


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return further names of models: the last part of an id, such as "bard" for "runs/bard", if it is unique."""
    parts = [(name.rstrip("/").rpartition("/")[2].removesuffix(".gguf"), name) for name in names]
    short = [part for part, _ in parts]
    return {part: name for part, name in parts if short.count(part) == 1 and part not in names}


def _torch_key(name: str) -> str:
    """Return the key of the worker with the PyTorch weights of a model that otherwise is only packed."""
    return f"{name} (inspection)"


def _load_both(source: str) -> tuple[nn.Module, Any]:
    """Load a model for inspection, and its tokenizer. It generates natively if this keeps the numbers of the file."""
    model, tokenizer = load(source, weights=OWN)
    if not isinstance(model, NativeLM):
        return model, tokenizer
    torch_model = load_model(source)
    attach_native(torch_model, "f32", lambda *_: model)
    return torch_model, tokenizer


class ServedModels:
    """Models by id, loaded and unloaded as requests need them.

    sources: path or name of each, by id. memory: maximal bytes of the weights of all loaded models and of a draft;
    None: unlimited. weights: format (f32, bf16, int8 or int4) in which models for text, translation and transcription
    are packed for native code. folder: folder from which clients may load further models. Raises `UserError` for a
    model that is larger than the memory without the draft.
    """

    def __init__(
        self, sources: Mapping[str, str], limits: Limits, metrics: Metrics, memory: int | None = None,
        weights: str | None = None, folder: Path | None = None,
    ):  # fmt: skip
        self.limits, self.metrics, self.memory, self.weights, self.folder = limits, metrics, memory, weights, folder
        self._draft = limits.guesses.nbytes if isinstance(limits.guesses, Draft) else 0
        self.packed, self.descriptions = dict[str, str](), dict[str, Description]()
        self._sizes, self._other_names = dict[str, int](), dict[str, str]()
        self.began = int(time.time())
        self.workers: dict[str, Worker] = {}
        self._last_use: dict[str, float] = {}
        for name, source in sources.items():
            self._add(describe(source, name))

    def _add(self, model: Description) -> None:
        """Serve one more model. Raises `UserError` if it is larger than the memory."""
        name, writes = model.name, "completion" in model.uses
        if writes:
            check_guesses(self.limits.guesses, model.tokenizer, model.config.vocab_size)
        if self.weights and (writes or {*PACKED_TOO} & {*model.uses}):
            self.packed[name] = self.weights
        if self.weights and writes:
            model = replace(model, size=model.weight_bytes)  # in memory only once
            self._sizes[_torch_key(name)] = model.size
        if self.memory is not None and model.size + self._draft > self.memory:
            draft = f" and the draft {self._draft / 2**20:,.0f} MiB" if self._draft else ""
            allowed = f"--memory allows {self.memory / 2**20:,.0f}: raise it, or choose a smaller model"
            raise UserError(f"{name} takes {model.size / 2**20:,.0f} MiB{draft}, but {allowed}.")
        self.descriptions[name], self._sizes[name] = model, model.size
        sources = {description.source: description.name for description in self.descriptions.values()}
        self._other_names = short_names(list(self.descriptions)) | sources

    def add_from_folder(self, name: str) -> None:
        """Serve the model of that name from the folder that clients may load from, if it exists and is new."""
        if name in self._other_names or name in self.descriptions or self.folder is None:
            return
        inside = [path.name for path in self.folder.glob("[!.]*") if path.resolve().parent == self.folder.resolve()]
        if name in inside:
            self._add(describe(str(self.folder / name), name))

    def description_of(self, name: str, use: str | None = None) -> Description:
        """Return the model with that id or short name.

        An empty name selects the only model, or the only one for this use. Raises `ApiError`, with the nearest name,
        for an unknown name.
        """
        if not name:
            able = [description for description in self.descriptions.values() if use is None or use in description.uses]
            if len(able) != 1:
                text = f"The field model is missing: it must be one of {', '.join(self.descriptions)}."
                raise ApiError(400, text, "model", "missing_field")
            name = able[0].name
        name = self._other_names.get(name, name)
        if name not in self.descriptions:
            raise ApiError(404, str(unknown("model", name[:100], self.descriptions)), "model", "model_not_found")
        current().model = name
        return self.descriptions[name]

    def reader(self, name: str) -> Description:
        """Return the model of that name. Raises `ApiError` if it does not read text."""
        about = self.description_of(name)
        if about.tokenizer is None:
            raise ApiError(400, f"The model {name!r} reads no text, so it has no tokens.", "model", "wrong_model")
        return about

    def find(self, name: str, use: str) -> Description:
        """Return the model of that name. Raises `ApiError` if it does not have this use."""
        about = self.description_of(name, use)
        if use not in about.uses:
            able = [description.name for description in self.descriptions.values() if use in description.uses]
            here = f"for this, ask {' or '.join(able)}" if able else "none of this server's models is for this"
            ways = " and ".join(USES[way] for way in about.uses)
            raise ApiError(400, f"The model {about.name!r} is for {ways}; {here}.", "model", "wrong_model")
        return about

    def worker(self, name: str) -> Worker:
        """Return the thread of this model. Start it, and make room for the model, if necessary."""
        source, packed = self.descriptions[name].source, self.packed.get(name)
        loading = partial(load, source, weights=packed) if packed else partial(_load_both, source)
        writes = {"completion", *PACKED_TOO} & {*self.descriptions[name].uses}
        return self._worker(name, loading, partial(load, source) if writes else None)

    def inspector(self, name: str) -> Worker:
        """Return the thread with the model's PyTorch weights: a second one if the model is only packed."""
        if _torch_key(name) not in self._sizes:
            return self.worker(name)
        return self._worker(_torch_key(name), partial(load, self.descriptions[name].source))

    def _worker(self, key: str, loading: Callable[[], Loaded], interim: Callable[[], Loaded] | None = None) -> Worker:
        self._last_use[key] = time.monotonic()
        if key not in self.workers:
            self._make_room(self._sizes[key])
            self.workers[key] = Worker(key, loading, self.limits, self.metrics, interim)
            self.metrics.loaded_bytes.labels(key).set(self._sizes[key])
        return self.workers[key]

    def unload(self, name: str) -> bool:
        """Unload a model without pending requests. Return False if it is not loaded or has pending requests."""
        if name not in self.workers or self.workers[name].pending:
            return False
        self.workers.pop(name).end()
        self.metrics.loaded_bytes.labels(name).set(0)
        return True

    async def unload_idle(self) -> None:
        """Unload models that had no request for `limits.keep_alive` seconds. Runs until cancelled."""
        while (seconds := self.limits.keep_alive) is not None:
            await asyncio.sleep(min(seconds / 4, 10))
            for key in list(self.workers):
                if self.workers[key].pending:
                    self._last_use[key] = time.monotonic()
                elif time.monotonic() - self._last_use[key] > seconds:
                    self.unload(key)

    def _make_room(self, needed_bytes: int) -> None:
        """Unload models without requests, the least recently used first, until `needed_bytes` bytes are free."""
        if self.memory is None:
            return
        used_bytes = self._draft + sum(self._sizes[name] for name in self.workers)
        for name in sorted(self.workers, key=self._last_use.__getitem__):
            if used_bytes + needed_bytes <= self.memory:
                return
            if self.unload(name):
                used_bytes -= self._sizes[name]
        if used_bytes + needed_bytes > self.memory:
            raise ApiError(503, "All memory is taken by models that are at work: try again.", None, "no_memory", 5)

    async def close(self) -> None:
        """End all threads after their pending work."""
        for worker in self.workers.values():
            await worker.close()
