"""Requests decoded in turn, one token of each a step; they join and leave at any step."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from keifu.generation.text.beam_search import device_of
from keifu.generation.text.engine import Batch, Model, batch_capacity, evaluation_mode
from keifu.generation.text.request import Piece, Request, allowed_tokens


class Engine:
    """add, step and abort over `Batch`, one for each request."""

    def __init__(self, model: Model, max_running: int = 32):
        self.model, self.max_running = model, max_running
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, tuple[Request, Batch]] = {}
        self._next = 0

    def add(self, request: Request) -> int:
        self._next += 1
        self._waiting[self._next] = request
        return self._next

    def abort(self, number: int) -> None:
        self._waiting.pop(number, None)
        self._running.pop(number, None)

    @property
    def counts(self) -> Sequence[int]:
        return len(self._waiting), len(self._running)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Piece]]:
        pieces = []
        with evaluation_mode(cast(nn.Module, self.model)):
            while self._waiting and len(self._running) < self.max_running:
                number, request = next(iter(self._waiting.items()))
                tokens = torch.tensor([request.prompt], device=device_of(cast(nn.Module, self.model)))
                caches = self.model.new_caches(1, batch_capacity([request]))
                self._running[number] = request, Batch(self.model, tokens, None, [request.sampling], caches)
                del self._waiting[number]
            for number, (request, batch) in list(self._running.items()):
                device = device_of(cast(nn.Module, self.model))
                allowed = allowed_tokens([request], self.model.config.vocab_size, device)
                piece = request.take(*batch.advance(allowed).figures.tolist()[0])
                pieces.append((number, piece))
                if piece.finish_reason:
                    self.abort(number)
        return pieces
