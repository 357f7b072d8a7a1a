"""The models of a service: what each can do, loaded when first asked for, the one not used longest let go where memory
is bounded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from keifu.checkpoints.loading import load, load_model, planned
from keifu.errors import UserError, unknown
from keifu.generation.images.pipeline import image_pipeline
from keifu.generation.text.model import Encoder, TwoTowers, explain_not_causal, is_writer
from keifu.generation.text.translation import is_translator
from keifu.native.model import NativeLM, pack_beside
from keifu.native.pack import OWN
from keifu.serving.errors import ApiError
from keifu.serving.metrics import Metrics
from keifu.serving.worker import Limits, Worker

USES = {  # what a client may ask of a model: the path that it asks at
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "translation": "/v1/translations",
    "image": "/v1/images/generations",
    "inspection": "/v1/inspect",
    "match": "/v1/match",
}


@dataclass(frozen=True)
class Description:
    """What is known of a model before it is loaded. size: the most bytes that its weights take in memory."""

    name: str
    uses: tuple[str, ...]
    context_length: int | None
    size: int
    tokenizer: Any
    config: Any


def describe(name: str) -> Description:
    """Reads a model's config, tensor names and tokenizer, and none of its weights."""
    plan = planned(name)
    tokenizer = plan.source.tokenizer()
    config: Any = plan.source.config
    uses = _uses(plan.model, tokenizer)
    if not uses:
        raise UserError(f"{name} cannot be served: {explain_not_causal(plan.model)}")
    # what writes on a CPU has them twice: as PyTorch's, and packed for native code
    size = plan.parameters * plan.dtype.itemsize * (2 if {"completion", "translation"} & {*uses} else 1)
    return Description(name, uses, getattr(config, "context_length", None), size, tokenizer, config)


def _uses(model: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """What a model of this kind, with this tokenizer, can be asked for."""
    inside = ("inspection",) if tokenizer is not None and not isinstance(model, NativeLM) else ()
    if is_writer(model) and tokenizer is not None:
        return (*(("completion",) if tokenizer.chat_template is None else ("chat", "completion")), *inside)
    if isinstance(model, TwoTowers) and tokenizer is not None:
        return "embedding", "match"
    if isinstance(model, Encoder) and tokenizer is not None:
        return "embedding", *inside
    if is_translator(model) and tokenizer is not None:
        return "translation", *inside
    try:
        image_pipeline(model, lambda: tokenizer)
    except UserError:
        return ()
    return ("image",)


def _load_both(name: str) -> tuple[nn.Module, Any]:
    """A model that can be inspected, and its tokenizer; it generates natively where that keeps the file's numbers."""
    model, tokenizer = load(name, weights=OWN)
    if not isinstance(model, NativeLM):
        return model, tokenizer
    whole = load_model(name)
    pack_beside(whole, "f32", lambda *_: model)
    return whole, tokenizer


class ServedModels:
    """The models by name. memory: bytes that the weights of all loaded models may take; None for no bound. weights:
    f32, bf16, int8 or int4 packs those that write text, and the decoders of those that translate, for native code.

    A model that alone is larger is a `UserError`.
    """

    def __init__(
        self, names: Sequence[str], limits: Limits, metrics: Metrics, memory: int | None = None,
        weights: str | None = None,
    ):  # fmt: skip
        found = {name: describe(name) for name in names}
        writers = [name for name in names if weights and "completion" in found[name].uses]
        translators = [name for name in names if weights and "translation" in found[name].uses]
        self.packed = dict.fromkeys(writers + translators, weights)
        # packed alone: not to be inspected, and there once
        plain = {n: replace(found[n], uses=found[n].uses[:-1], size=found[n].size // 2) for n in writers}
        self.descriptions = found | plain
        self.limits, self.metrics, self.memory = limits, metrics, memory
        self.began = int(time.time())
        self.workers: dict[str, Worker] = {}
        self._used: dict[str, float] = {}
        for each in self.descriptions.values():
            if memory is not None and each.size > memory:
                raise UserError(
                    f"{each.name} takes {each.size / 2**20:,.0f} MiB, but --memory allows {memory / 2**20:,.0f}: "
                    "raise it, or choose a smaller model."
                )

    def named(self, name: str) -> Description:
        """The model of that name; one that does not exist is an `ApiError` with the nearest."""
        if name not in self.descriptions:
            raise ApiError(404, str(unknown("model", name, self.descriptions)), "model", "model_not_found")
        return self.descriptions[name]

    def reader(self, name: str) -> Description:
        """The model of that name, if it reads text; otherwise an `ApiError`."""
        found = self.named(name)
        if found.tokenizer is None:
            raise ApiError(400, f"The model {name!r} reads no text, so it has no tokens.", "model", "wrong_model")
        return found

    def find(self, name: str, use: str) -> Description:
        """The model of that name, if it can be used so; otherwise an `ApiError`."""
        found = self.named(name)
        if use not in found.uses:
            able = [each.name for each in self.descriptions.values() if use in each.uses]
            here = f"for this, ask {' or '.join(able)}" if able else "none of this server's models is for this"
            ways = " and ".join(USES[each] for each in found.uses)
            raise ApiError(400, f"The model {name!r} is for {ways}; {here}.", "model", "wrong_model")
        return found

    def worker(self, name: str) -> Worker:
        """The thread that has the model, begun where there is none; others make room for it."""
        self._used[name] = time.monotonic()
        if name not in self.workers:
            self._make_room(self.descriptions[name].size)
            packed = self.packed.get(name)
            loading = partial(load, name, weights=packed) if packed else partial(_load_both, name)
            self.workers[name] = Worker(name, loading, self.limits, self.metrics)
            self.metrics.loaded_bytes.labels(name).set(self.descriptions[name].size)
        return self.workers[name]

    def _make_room(self, wanted: int) -> None:
        """Lets go of models that nothing asks, those not used longest first, until the wanted bytes are free."""
        held = sum(self.descriptions[name].size for name in self.workers)
        for name in sorted(self.workers, key=self._used.__getitem__):
            if self.memory is None or held + wanted <= self.memory:
                return
            if not self.workers[name].pending:
                self.workers.pop(name).end()
                self.metrics.loaded_bytes.labels(name).set(0)
                held -= self.descriptions[name].size
        if self.memory is not None and held + wanted > self.memory:
            raise ApiError(503, "All memory is taken by models that are at work: try again.", None, "no_memory", 5)

    async def close(self) -> None:
        """Ends all threads, after what they were asked before."""
        for worker in self.workers.values():
            await worker.close()
