"""Layers that use the keys and values of an earlier one: an engine and a cache give the tokens of the whole text."""

from typing import Any

import pytest
import torch
from torch import nn

from keifu.inference.text.engine import Engine
from keifu.inference.text.sampling_params import SamplingParams
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.variants import gemma4
from keifu.training.hardware.recompute import recompute_blocks

SIZE: dict[str, Any] = {
    "vocab_size": 60, "context_length": 300, "dim": 24, "hidden_dim": 40, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2,
    "head_dim": 6, "global_head_dim": 10, "sliding_window": 7, "global_layers": (1, 3, 5), "n_shared_layers": 3,
    "layer_dim": 5, "norm_eps": 0.01,
}  # fmt: skip


def telling(**changes: Any) -> DecoderLM:
    """Return a toy whose next token depends on every layer."""
    torch.manual_seed(2)
    model = gemma4.build(gemma4.Config(**SIZE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


EXPERTS: dict[str, Any] = {"n_experts": 3, "n_experts_per_token": 2}


@pytest.mark.parametrize("changes", [{}, {"keys_as_values": True, "global_kv_heads": 1}, EXPERTS])
@torch.no_grad()
def test_an_engine_gives_the_tokens_of_whole_texts(changes: dict[str, Any]) -> None:
    model, prompts = telling(**changes), [[3, 1, 4, 1, 5] * 9, [2, 7, 1], [8] * 20]
    engine, texts = Engine(model, None, step_tokens=32), dict[int, list[int]]()
    for prompt in prompts:
        texts[engine.add(engine.request(prompt, SamplingParams(temperature=0, max_tokens=12)))] = [*prompt]
    for piece in engine.pieces():
        texts[piece.index].append(piece.token)
    for prompt, text in zip(prompts, texts.values(), strict=True):
        logits = model(torch.tensor([text]))[0, len(prompt) - 1 : -1]
        assert text[len(prompt) :] == logits.argmax(-1).tolist()
    assert len({*texts[0][45:], *texts[1][3:], *texts[2][20:]}) > 5


def test_only_layers_with_keys_have_a_cache() -> None:
    model = telling()
    assert [shape.head_dim for shape in model.cache_layers] == [6, 10, 6]
    assert model.new_state(1, 10).token_bytes == 4 * 2 * 2 * (6 + 10 + 6)


@pytest.mark.parametrize("how", ["blocks", "selective"])
def test_shared_keys_have_the_same_gradients_if_blocks_are_computed_again(how: Any) -> None:
    tokens = torch.arange(40)[None] % 60
    gradients = []
    for recomputed in (False, True):
        model = telling().train()
        if recomputed:
            recompute_blocks(model, how)
        model(tokens).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
