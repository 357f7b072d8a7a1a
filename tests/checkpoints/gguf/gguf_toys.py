"""Configs that are written as GGUF: those that differ for llama.cpp, and the toy of each other model.

They are written, read again, and compared with llama.cpp, where it is installed.
"""

from dataclasses import replace
from typing import Any

from model_entries import ENTRIES

from keifu.layers.attention.positions import RopeScaling
from keifu.models import gemma3, gpt2, llama, olmo2, palm, qwen3
from keifu.models.hybrid import lfm2, qwen3_5, qwen3_next
from keifu.models.mixture import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from keifu.models.variants import exaone4, gemma2, glm4, granite, ministral, phi3, smollm3

SMALL = {"vocab_size": 320, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "context_length": 128}
SCALINGS = {
    "linear": RopeScaling("linear", 2.5, 128),
    "yarn": RopeScaling("yarn", 4.0, 16, attention_factor=1.1),
    "llama3": RopeScaling("llama3", 8.0, 24),
}
LATENT = {
    "expert_dim": 32, "n_dense_layers": 1, "head_dim": 16, "rope_dim": 8, "value_dim": 12, "q_rank": 24, "kv_rank": 32,
    "n_experts": 8, "n_experts_per_token": 3, "n_groups": 4, "n_groups_per_token": 2,
}  # fmt: skip
DELTA = {
    "n_kv_heads": 2, "head_dim": 16, "rope_dim": 8, "n_linear_key_heads": 2, "n_linear_value_heads": 6,
    "linear_key_dim": 16, "linear_value_dim": 16,
}  # fmt: skip
SHARED_EXPERT = {"expert_dim": 32, "shared_dim": 24, "n_experts": 6, "n_experts_per_token": 2}


def longrope(factor: float, trained: int, **settings: Any) -> RopeScaling:
    short, long = (1.0, 1.1, 1.2, 1.4, 1.7, 2.5), (1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
    return RopeScaling("longrope", factor, trained, short_divisors=short, long_divisors=long, **settings)


MINISTRAL3 = RopeScaling("yarn", 4.0, 16, mscale=1.0, mscale_all_dim=0.8)
CONFIGS = {
    "gpt2": gpt2.Config(**SMALL, dropout=0.0),
    "gpt2-untied": gpt2.Config(**SMALL, dropout=0.0, tied=False),
    "llama": llama.Config(**SMALL, n_kv_heads=2, norm_eps=1e-5),
    "llama-tied-multi-query": llama.Config(**SMALL, n_kv_heads=1, tied=True, rope_theta=1e5),
    "llama-biased": llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, out_bias=True, feedforward_bias=True),
    "llama-wide-heads": llama.Config(**SMALL, n_kv_heads=2, head_dim=32),
    "qwen2": llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, tied=True),
    "qwen3": qwen3.Config(**SMALL, n_kv_heads=2, head_dim=32),
    "qwen3-tied": qwen3.Config(**SMALL, n_kv_heads=1, head_dim=16, tied=True, rope_theta=1e4),
    "olmo2": olmo2.Config(**SMALL, n_kv_heads=2),
    "gemma3": gemma3.Config(**SMALL | {"n_layers": 7}, n_kv_heads=2, head_dim=32, sliding_window=8),
    "gemma3-scaled-untied": gemma3.Config(
        **SMALL | {"n_layers": 6},
        head_dim=16,
        sliding_window=5,
        rope_scaling=RopeScaling("linear", 8.0, 128),
        tied=False,
    ),
    "mixtral": mixtral.Config(**SMALL, n_kv_heads=2),
    "mixtral-tied": mixtral.Config(**SMALL, n_kv_heads=1, n_experts=5, n_experts_per_token=1, tied=True),
    "qwen3moe": qwen3_moe.Config(
        **SMALL, n_kv_heads=2, head_dim=32, expert_dim=32, n_experts=12, n_experts_per_token=3
    ),
    "granite": granite.Config(**SMALL, n_kv_heads=2, attention_scale=0.3, logit_divisor=3.0, residual_scale=0.4),
    "granite-biased-untied": granite.Config(
        **SMALL, n_kv_heads=4, attention_bias=True, feedforward_bias=True, tied=False, embedding_scale=3.0
    ),
    "granite-llama3": granite.Config(**SMALL, n_kv_heads=2, rope_scaling=SCALINGS["llama3"]),
    "mixtral-llama3": mixtral.Config(**SMALL, n_kv_heads=2, rope_theta=1e4, rope_scaling=SCALINGS["llama3"]),
    "smollm3": smollm3.Config(**SMALL | {"n_layers": 5}, n_kv_heads=2),
    "gemma2": gemma2.Config(
        **SMALL | {"n_layers": 5}, n_kv_heads=2, head_dim=32, sliding_window=8, attention_cap=5.0, logit_cap=8.0
    ),
    "glm4": glm4.Config(**SMALL, n_kv_heads=2, head_dim=32, rope_dim=12),
    "glm4-unbiased-yarn": glm4.Config(
        **SMALL,
        n_kv_heads=2,
        head_dim=16,
        rope_dim=16,
        qkv_bias=False,
        tied=True,
        rope_scaling=RopeScaling("yarn", 4.0, 16),
    ),
    "exaone4-of-64-layers": exaone4.Config(
        **SMALL | {"n_layers": 64},
        n_kv_heads=2,
        head_dim=16,
        sliding_window=8,
        rope_theta=1e4,
        rope_scaling=SCALINGS["llama3"],
    ),
    "exaone4": exaone4.Config(**SMALL, n_kv_heads=4, head_dim=16, sliding_window=None, tied=True, rope_scaling=None),
    "ministral3": ministral.Config(
        **SMALL,
        n_kv_heads=2,
        head_dim=32,
        sliding_window=None,
        query_growth=0.1,
        rope_scaling=MINISTRAL3,
        rope_theta=1e4,
    ),
    "ministral": ministral.Config(**SMALL, n_kv_heads=2, head_dim=16, sliding_window=None, rope_theta=1e4),
    "phi3": phi3.Config(**SMALL, n_kv_heads=2, sliding_window=None, tied=True),
    "phi3-long": phi3.Config(**SMALL, n_kv_heads=2, sliding_window=None, rope_dim=12, rope_scaling=longrope(8.0, 16)),
    "phi3-short": phi3.Config(
        **SMALL | {"context_length": 1024},
        n_kv_heads=2,
        sliding_window=None,
        rope_dim=12,
        rope_scaling=longrope(4.0, 256, attention_factor=1.3),
    ),
    "lfm2": lfm2.Config(**SMALL | {"n_layers": 4}, n_kv_heads=2, global_layers=(1, 3)),
    "lfm2-long-convolutions": lfm2.Config(**SMALL, n_kv_heads=4, global_layers=(0,), convolution=5, tied=False),
    "command-r": palm.Config(**SMALL, n_kv_heads=2, head_dim=16, logit_scale=0.3),
    "command-r-multi-query": palm.Config(**SMALL, head_dim=16, rope_theta=5e5),
    "deepseek-v3": deepseek_v3.Config(**SMALL, **LATENT, rope_scaling=None),
    "deepseek-v3-yarn-normalised-by-nothing": deepseek_v3.Config(
        **SMALL | LATENT | {"n_groups": 1, "n_groups_per_token": 1},
        normalised=False,
        n_shared_experts=2,
        rope_scaling=RopeScaling("yarn", 4.0, 16, mscale=0.7, mscale_all_dim=0.7),
        rope_theta=1e4,
    ),
    "deepseek-v3-one-matrix-of-queries": deepseek_v3.Config(
        **SMALL | LATENT | {"n_layers": 27, "q_rank": None}, rope_scaling=None
    ),
    "gpt-oss": gpt_oss.Config(
        **SMALL, n_kv_heads=2, head_dim=32, n_experts=6, n_experts_per_token=2, sliding_window=7, rope_scaling=None
    ),
    "qwen3-next": qwen3_next.Config(**SMALL | {"n_layers": 5}, **DELTA, **SHARED_EXPERT),
    "qwen3-next-every-second-layer": qwen3_next.Config(
        **SMALL | {"n_layers": 4} | DELTA | {"n_linear_value_heads": 2},
        **SHARED_EXPERT,
        global_layers=(1, 3),
        tied=True,
    ),
    "qwen3.5": qwen3_5.Config(**SMALL | {"n_layers": 5}, **DELTA),
    "qwen3.5-other-sizes": qwen3_5.Config(
        **SMALL | {"n_layers": 4} | DELTA | {"n_linear_value_heads": 2, "rope_dim": 10},
        convolution=3,
        global_layers=(1, 3),
        tied=True,
    ),
    "qwen3.5-experts": qwen3_5.Config(**SMALL | {"n_layers": 4}, **DELTA, **SHARED_EXPERT),
    "olmoe": olmoe.Config(**SMALL, n_experts=9, n_experts_per_token=4),
    **{name: llama.Config(**SMALL, n_kv_heads=2, rope_scaling=scaling) for name, scaling in SCALINGS.items()},
}
SPECIAL = {type(config) for config in CONFIGS.values()}
CONFIGS |= {
    name: replace(entry.toy, vocab_size=320, context_length=128)
    for name, entry in ENTRIES.items()
    if entry.row.gguf and type(entry.toy) not in SPECIAL
}
