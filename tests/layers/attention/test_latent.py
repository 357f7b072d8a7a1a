"""Latent attention: the absorbed form of a cache gives what keys and values of all heads give, adapters included."""

import pytest
import torch
from torch import nn

from keifu.checkpoints.lora.peft import adapt
from keifu.layers.lora import LoraSettings, adapters
from keifu.models.mixture import deepseek_v3

SIZES = {"vocab_size": 31, "context_length": 32, "dim": 20, "hidden_dim": 28, "expert_dim": 12, "n_layers": 2}
ATTENTION = {"n_heads": 3, "head_dim": 5, "rope_dim": 6, "value_dim": 7, "q_rank": 8, "kv_rank": 9}
EXPERTS = {"n_experts": 4, "n_experts_per_token": 2, "n_groups": 2, "n_groups_per_token": 1, "rope_scaling": None}
CONFIG = deepseek_v3.Config(**SIZES, **ATTENTION, **EXPERTS, n_dense_layers=1)


@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_a_cache_of_latents_gives_what_all_heads_give(adapted: bool) -> None:
    torch.manual_seed(0)
    model = deepseek_v3.build(CONFIG).eval()
    plain = model(torch.arange(13)[None])
    if adapted:
        adapt(model, ["all-linear"], LoraSettings(rank=2))
        for adapter in adapters(model):
            nn.init.normal_(adapter.b, std=0.3)
    whole, state = model(torch.arange(13)[None]), model.new_state(1, 13)
    assert torch.allclose(whole, plain) != adapted
    parts = [model(torch.arange(13)[None, a:b], state) for a, b in [(0, 6), (6, 7), (7, 11), (11, 13)]]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_has_one_latent_for_all_heads() -> None:
    state = deepseek_v3.build(CONFIG).new_state(1, 4)
    assert [keys.shape for keys in state.keys] == [(1, 1, 4, 9 + 6)] * 2


@torch.no_grad()
def test_the_correction_decides_the_choice_and_not_the_weights(tmp_path) -> None:
    """Parity with transformers where the corrections are far from 0."""
    import transformers

    from keifu import checkpoints

    names = {"rope_dim": "qk_rope_head_dim", "head_dim": "qk_nope_head_dim"}
    torch.manual_seed(1)
    model = deepseek_v3.build(CONFIG).eval()
    plain = model(torch.arange(13)[None])
    for name, buffer in model.named_buffers():
        if name.endswith("correction"):
            buffer.normal_(std=2.0)
    changed = model(torch.arange(13)[None])
    assert not torch.allclose(changed, plain)
    checkpoints.save(model, None, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert [vars(theirs.config)[published] for published in names.values()] == [6, 5]
    torch.testing.assert_close(theirs(torch.arange(13)[None]).logits, changed, rtol=1e-5, atol=1e-5)
