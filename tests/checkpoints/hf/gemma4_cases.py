"""Configurations of Gemma 4 for the comparison with transformers: each has something that the others lack."""

from collections.abc import Callable
from typing import Any

import transformers

FULL, LOCAL = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 24, "intermediate_size": 42,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "head_dim": 10, "global_head_dim": 16, "hidden_size_per_layer_input": 6, "sliding_window": 7, "pad_token_id": None,
    "rms_norm_eps": 0.01,
}  # fmt: skip
EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20}


def gemma4(**changes: Any) -> Callable[[], Any]:
    return lambda: transformers.Gemma4TextConfig(**SIZES | changes)


def ropes(full: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {FULL: full, LOCAL: local}}


CASES = {
    "gemma4-default-layers": gemma4(num_hidden_layers=7, final_logit_softcapping=1.5),
    "gemma4-shared-keys-wide": gemma4(
        num_hidden_layers=6, layer_types=[LOCAL, FULL, LOCAL, LOCAL, FULL, FULL], num_kv_shared_layers=3,
        use_double_wide_mlp=True, num_key_value_heads=1, hidden_size_per_layer_input=9, sliding_window=4,
    ),
    "gemma4-shared-keys-untied": gemma4(
        layer_types=[FULL, LOCAL, FULL, LOCAL, FULL], num_kv_shared_layers=1, tie_word_embeddings=False,
        head_dim=16, global_head_dim=6, num_key_value_heads=4, attention_bias=True, hidden_activation="silu",
        final_logit_softcapping=4.0,
    ),
    "gemma4-most-layers-share": gemma4(
        num_hidden_layers=7, layer_types=[FULL, LOCAL, LOCAL, FULL, LOCAL, LOCAL, FULL], num_kv_shared_layers=5,
        num_attention_heads=5, num_key_value_heads=1, sliding_window=1, vocab_size_per_layer_input=110,
    ),
    "gemma4-keys-as-values": gemma4(
        attention_k_eq_v=True, num_global_key_value_heads=1, num_key_value_heads=4, hidden_size_per_layer_input=0,
        layer_types=[LOCAL, LOCAL, FULL, LOCAL, FULL], attention_bias=True, rms_norm_eps=1e-6,
    ),
    "gemma4-keys-as-values-shared": gemma4(
        attention_k_eq_v=True, layer_types=[FULL, LOCAL, LOCAL, FULL, FULL], num_kv_shared_layers=2,
        **ropes(
            {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.4, "factor": 4.0},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        ),
    ),
    "gemma4-experts": gemma4(
        **EXPERTS, num_hidden_layers=3, layer_types=[LOCAL, FULL, FULL], hidden_size_per_layer_input=0,
        attention_k_eq_v=True, num_global_key_value_heads=1,
    ),
    "gemma4-experts-and-embeddings-untied": gemma4(
        **EXPERTS | {"top_k_experts": 1}, num_hidden_layers=3, layer_types=[FULL, LOCAL, FULL],
        num_kv_shared_layers=1, tie_word_embeddings=False,
        **ropes(
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
            {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.6},
        ),
    ),
    "gemma4-listed-heads": gemma4(
        per_layer_config={1: {"head_dim": 12, "num_key_value_heads": 1}, 4: {"head_dim": 12, "num_key_value_heads": 1}},
        layer_types=[LOCAL, FULL, LOCAL, LOCAL, FULL],
    ),
}  # fmt: skip
