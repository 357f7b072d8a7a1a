"""Upper bound of the bits per byte of a masked-diffusion model on a text (Nie et al., 2025, equation 6).

A random number of a window's tokens is masked. The mean of their loss, times the window's length over that number, is
at least -log p of the window. Axes: draws = masks of a window, length = tokens.
"""

import math
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keifu.data.progress import counted
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.intervals import mean_figures
from keifu.evaluation.registry import EvalRequest, EvalResult
from keifu.evaluation.text.perplexity import NAMES, accepts, tokens_of
from keifu.inference.text.model import MaskPredictor, device_of, evaluation_mode

__all__ = ["ABOUT", "NAMES", "OPTIONS", "accepts", "evaluate", "takes"]
ABOUT = "a model of masked diffusion on a text: a bound on its bits per byte"
OPTIONS = {"batch_size", "text_field", "encoding", "seed"}
DRAWS = 16  # masks of each window


def takes(model: nn.Module) -> bool:
    """Return whether the model predicts masked tokens for any share of masks."""
    return isinstance(model, MaskPredictor)


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return the bound over windows of the context's length."""
    ids, bytes_per_token = tokens_of(request, tokenizer)
    length = min(cast(Any, model).config.context_length, len(ids))
    if not length:
        raise UserError(f"{request.on} has no tokens: give more text.")
    windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][: request.limit]
    losses = [
        bound(model, torch.from_numpy(window), request.seed + number, request.batch_size or DRAWS)
        for number, window in enumerate(counted("Evaluating", windows, "windows"))
    ]
    figures = mean_figures("bits per byte, at most", np.array(losses) / (math.log(2) * bytes_per_token))
    figures |= {"loss, at most": round(float(np.mean(losses)), 4), "tokens": len(windows) * length}
    return EvalResult(figures, (f"The mean of {DRAWS} random masks of each window of {length} tokens, by --seed.",))


@torch.inference_mode()
def bound(model: nn.Module, window: Tensor, seed: int, batch_size: int = DRAWS, draws: int = DRAWS) -> float:
    """Return an estimate of the bound for a window [length], in nats per token. The numbers of masked tokens are evenly
    spaced."""
    predictor, length = cast(MaskPredictor, model), len(window)
    random = torch.Generator().manual_seed(seed)
    counts = (length * (torch.arange(draws) + torch.rand(draws, generator=random)) / draws).long() + 1
    masked = torch.rand(draws, length, generator=random).argsort(-1).argsort(-1) < counts[:, None]
    total = 0.0
    with evaluation_mode(model):
        for some, number in zip(masked.split(batch_size), counts.split(batch_size), strict=True):
            hidden, targets = some.to(device_of(model)), window.to(device_of(model)).expand_as(some)
            logits = predictor.predict_masked(targets.masked_fill(hidden, predictor.config.mask_token))
            losses = F.cross_entropy(logits.mT, targets, reduction="none") * hidden
            total += float((losses.sum(-1).cpu().double() / number).sum())
    return total / draws
