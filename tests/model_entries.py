"""The entry of each language model in the tests: a toy for every table, and published config.json files.

A model's row is in its own file (`keifu/models/registration`); here is what only tests need. The tests derive from this
table that each model learns, decodes, runs on another device, is split, saved as GGUF, and read as published.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from keifu.models import gemma3, gpt1, gpt2, gpt3, llama, olmo2, palm, qwen3
from keifu.models.classic import lstm
from keifu.models.hybrid import lfm2, qwen3_5, qwen3_next
from keifu.models.mixture import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from keifu.models.registration import ModelRow, row
from keifu.models.variants import exaone4, gemma2, gemma4, glm4, granite, ministral, nanochat, phi3, smollm3


@dataclass(frozen=True)
class ModelEntry:
    """A small Config of a model, and config.json files as the makers published them, by the name of the size."""

    toy: Any
    published: Mapping[str, Mapping[str, Any]]

    @property
    def module(self) -> Any:
        return sys.modules[type(self.toy).__module__]

    @property
    def name(self) -> str:
        """The name of the model's file."""
        return self.module.__name__.removeprefix("keifu.models.")

    @property
    def row(self) -> ModelRow:
        return row(self.name)

    def build(self, **changes: Any) -> nn.Module:
        return self.module.build(type(self.toy)(**vars(self.toy) | changes))


SMALL = {"vocab_size": 31, "context_length": 16, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
MIXER = {
    "n_kv_heads": 2, "head_dim": 12, "rope_dim": 6, "n_linear_key_heads": 2, "n_linear_value_heads": 4,
    "linear_key_dim": 8, "linear_value_dim": 6, "global_layers": (1,),
}  # fmt: skip
COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
GEMMA4 = {
    "model_type": "gemma4_text", "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False,
    "enable_moe_block": False, "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06, "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.25,
    "rope_theta": 1000000.0, "rope_type": "proportional"}, "sliding_attention": {"rope_theta": 10000.0,
    "rope_type": "default"}}, "sliding_window": 512, "tie_word_embeddings": True, "use_cache": True,
    "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
}  # fmt: skip
HYBRID = {
    "attention_bias": False, "attention_dropout": 0.0, "full_attention_interval": 4, "head_dim": 256,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "num_attention_heads": 16,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_theta": 10000000, "tie_word_embeddings": False,
}  # fmt: skip
ENTRIES: dict[str, ModelEntry] = {
    "gpt1": ModelEntry(
        gpt1.Config(**SMALL, dropout=0.0),
        {
            "gpt1": {
                "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
                "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512,
                "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0,
                "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None, "vocab_size": 40478,
            },
        },
    ),
    "gpt2": ModelEntry(
        gpt2.Config(**SMALL, dropout=0.0),
        {
            "gpt2-medium": {
                "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
                "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
                "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16,
                "n_layer": 24, "n_positions": 1024, "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1,
                "summary_activation": None, "task_specific_params": {"text-generation": {"do_sample": True}},
                "vocab_size": 50257,
            },
        },
    ),
    "gpt3": ModelEntry(
        gpt3.Config(**SMALL, band=4),
        {
            "gpt-neo-1.3b": {
                "activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"], "attention_dropout": 0,
                "attention_types": [[["global", "local"], 12]], "bos_token_id": 50256, "embed_dropout": 0,
                "eos_token_id": 50256, "hidden_size": 2048, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
                "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 16, "num_layers": 24,
                "resid_dropout": 0, "vocab_size": 50257, "window_size": 256,
            },
        },
    ),
    "palm": ModelEntry(
        palm.Config(**SMALL, head_dim=12),
        {
            "command-r-v01": {
                **COMMON, "model_type": "cohere", "attention_bias": False, "hidden_size": 8192,
                "intermediate_size": 22528, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
                "max_position_embeddings": 8192, "num_attention_heads": 64, "num_hidden_layers": 40,
                "num_key_value_heads": 64, "pad_token_id": 0, "rope_theta": 8000000.0, "vocab_size": 256000,
            },
        },
    ),
    "llama": ModelEntry(
        llama.Config(**SMALL, n_kv_heads=2),
        {
            "llama-7b": {
                **COMMON, "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
                "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
                "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 32000,
            },
            "llama2-70b": {
                **COMMON, "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
                "max_position_embeddings": 4096, "num_attention_heads": 64, "num_hidden_layers": 80,
                "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
                "tie_word_embeddings": False, "vocab_size": 32000,
            },
            "llama3.1-8b": {
                **COMMON, "model_type": "llama", "attention_bias": False, "hidden_size": 4096,
                "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
                "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
                "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "vocab_size": 128256,
            },
            "llama3.2-1b": {
                **COMMON, "model_type": "llama", "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
                "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
                "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
            },
            "tinyllama-1.1b": {
                **COMMON, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
                "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22,
                "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
                "vocab_size": 32000,
            },
            "smollm2-135m": {
                **COMMON, "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
                "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
                "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_theta": 100000,
                "tie_word_embeddings": True, "vocab_size": 49152,
            },
            "mistral-7b": {
                **COMMON, "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
                "vocab_size": 32000,
            },
            "qwen2-0.5b": {
                **COMMON, "model_type": "qwen2", "attention_dropout": 0.0, "hidden_size": 896,
                "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
                "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
                "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
                "use_sliding_window": False, "vocab_size": 151936,
            },
        },
    ),
    "qwen3": ModelEntry(
        qwen3.Config(**SMALL, n_kv_heads=2, head_dim=16),
        {
            "qwen3-0.6b": {
                **COMMON, "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
                "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
                "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
                "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
                "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
            },
        },
    ),
    "gemma3": ModelEntry(
        gemma3.Config(**SMALL, n_kv_heads=1, head_dim=16, sliding_window=5, global_layers=(1,)),
        {
            "gemma3-1b": {
                "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0,
                "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
                "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
                "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
                "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
                "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
                "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
                "use_cache": True, "vocab_size": 262144,
            },
        },
    ),
    "smollm3": ModelEntry(
        smollm3.Config(**SMALL, n_kv_heads=2, position_free=(1,)),
        {
            "smollm3-3b": {
                **COMMON, "model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0,
                "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536, "mlp_bias": False,
                "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
                "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
                "rope_theta": 5000000.0, "sliding_window": None, "tie_word_embeddings": True,
                "use_sliding_window": False, "vocab_size": 128256,
            },
        },
    ),
    "phi3": ModelEntry(
        phi3.Config(**SMALL, n_kv_heads=2, sliding_window=5),
        {
            "phi3-mini": {
                **COMMON, "model_type": "phi3", "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_size": 3072,
                "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
                "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
                "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
                "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
            },
        },
    ),
    "gemma2": ModelEntry(
        gemma2.Config(**SMALL, n_kv_heads=1, head_dim=16, sliding_window=5, attention_cap=5.0, logit_cap=8.0),
        {
            "gemma2-2b": {
                "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0,
                "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
                "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
                "initializer_range": 0.02, "intermediate_size": 9216, "max_position_embeddings": 8192,
                "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
                "use_cache": True, "vocab_size": 256000,
            },
        },
    ),
    "gemma4": ModelEntry(
        gemma4.Config(
            **SMALL | {"n_layers": 4}, head_dim=16, global_head_dim=8, n_kv_heads=2, sliding_window=5,
            global_layers=(1, 3), n_shared_layers=2, wide_shared=True, layer_dim=6,
        ),
        {
            "gemma4-e2b": {
                **GEMMA4, "hidden_size": 1536, "hidden_size_per_layer_input": 256, "intermediate_size": 6144,
                "layer_types": ([*["sliding_attention"] * 4, "full_attention"]) * 7, "num_attention_heads": 8,
                "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
                "use_double_wide_mlp": True,
            },
            "gemma4-26b-a4b": {
                **GEMMA4, "attention_k_eq_v": True, "enable_moe_block": True, "hidden_size": 2816,
                "hidden_size_per_layer_input": 0, "intermediate_size": 2112,
                "layer_types": ([*["sliding_attention"] * 5, "full_attention"]) * 5, "max_position_embeddings": 262144,
                "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128,
                "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8,
                "num_kv_shared_layers": 0, "sliding_window": 1024, "top_k_experts": 8,
                "use_bidirectional_attention": "vision", "use_double_wide_mlp": False,
            },
        },
    ),
    "exaone4": ModelEntry(
        exaone4.Config(**SMALL, n_kv_heads=2, head_dim=16, sliding_window=5, global_layers=(1,), rope_scaling=None),
        {
            "exaone4-32b": {
                **COMMON, "model_type": "exaone4", "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120,
                "intermediate_size": 27392, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
                "max_position_embeddings": 131072, "num_attention_heads": 40, "num_hidden_layers": 64,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "rope_scaling": {"factor": 16.0,
                "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3"}, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
                "tie_word_embeddings": False, "vocab_size": 102400,
            },
        },
    ),
    "glm4": ModelEntry(
        glm4.Config(**SMALL, n_kv_heads=2, head_dim=16, rope_dim=8),
        {
            "glm4-9b": {
                **COMMON, "model_type": "glm4", "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128,
                "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
                "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
                "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
                "tie_word_embeddings": False, "vocab_size": 151552,
            },
        },
    ),
    "granite": ModelEntry(
        granite.Config(
            **SMALL, n_kv_heads=2, embedding_scale=6.0, attention_scale=0.3, residual_scale=0.5, logit_divisor=0.5,
        ),
        {
            "granite3-8b": {
                **COMMON, "model_type": "granite", "attention_bias": False, "attention_dropout": 0.0,
                "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "hidden_size": 4096,
                "intermediate_size": 12800, "logits_scaling": 16.0, "max_position_embeddings": 4096, "mlp_bias": False,
                "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
                "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
                "tie_word_embeddings": True, "vocab_size": 49155,
            },
        },
    ),
    "ministral": ModelEntry(
        ministral.Config(**SMALL, n_kv_heads=2, head_dim=8, sliding_window=5, global_layers=(1,)),
        {
            "ministral-8b": {
                **COMMON, "model_type": "ministral", "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 4096,
                "intermediate_size": 12288, "max_position_embeddings": 32768, "num_attention_heads": 32,
                "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 100000000.0,
                "sliding_window": 32768, "tie_word_embeddings": False, "vocab_size": 131072,
            },
        },
    ),
    "nanochat": ModelEntry(
        nanochat.Config(**SMALL, n_kv_heads=2, logit_cap=8.0),
        {
            "nanochat-d20": {
                "model_type": "nanochat", "attention_bias": False, "attention_dropout": 0.0,
                "final_logit_softcapping": 15.0, "hidden_act": "relu2", "hidden_size": 1280, "intermediate_size": 5120,
                "max_position_embeddings": 2048, "num_attention_heads": 10, "num_hidden_layers": 20,
                "num_key_value_heads": 10, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 65536,
            },
        },
    ),
    "mixtral": ModelEntry(
        mixtral.Config(**SMALL, n_kv_heads=2, n_experts=3),
        {
            "mixtral-8x7b": {
                **COMMON, "model_type": "mixtral", "attention_dropout": 0.0, "hidden_size": 4096,
                "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
                "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
                "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
                "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
            },
        },
    ),
    "qwen3-moe": ModelEntry(
        qwen3_moe.Config(
            **SMALL, n_kv_heads=2, head_dim=16, expert_dim=24, n_experts=6, n_experts_per_token=3, dense_layers=(1,),
        ),
        {
            "qwen3-30b-a3b": {
                **COMMON, "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0,
                "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
                "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
                "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
                "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
                "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
                "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
                "use_sliding_window": False, "vocab_size": 151936,
            },
        },
    ),
    "olmoe": ModelEntry(
        olmoe.Config(**SMALL | {"hidden_dim": 24}, n_experts=6, n_experts_per_token=3),
        {
            "olmoe-1b-7b": {
                **COMMON, "model_type": "olmoe", "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
                "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
                "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
                "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
                "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
                "tie_word_embeddings": False, "vocab_size": 50304,
            },
        },
    ),
    "deepseek-v3": ModelEntry(
        deepseek_v3.Config(
            **SMALL, expert_dim=24, n_dense_layers=1, head_dim=8, rope_dim=6, value_dim=10, q_rank=20, kv_rank=12,
            n_experts=6, n_experts_per_token=3, n_groups=3, n_groups_per_token=2, rope_scaling=None,
        ),
        {
            "deepseek-v3": {
                **COMMON, "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1,
                "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
                "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
                "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
                "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536,
                "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
                "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn"}, "routed_scaling_factor": 2.5,
                "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
                "v_head_dim": 128, "vocab_size": 129280,
            },
        },
    ),
    "gpt-oss": ModelEntry(
        gpt_oss.Config(**SMALL, n_kv_heads=2, head_dim=8, n_experts=4, n_experts_per_token=2, sliding_window=5),
        {
            "gpt-oss-20b": {
                **COMMON, "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0,
                "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096,
                "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
                "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
                "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
                "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 150000,
                "quantization_config": gpt_oss.MXFP4, "router_aux_loss_coef": 0.9, "sliding_window": 128,
                "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}, "swiglu_limit": 7.0,
                "tie_word_embeddings": False, "vocab_size": 201088,
            },
        },
    ),
    "olmo2": ModelEntry(
        olmo2.Config(**SMALL, n_kv_heads=2),
        {
            "olmo2-7b": {
                **COMMON, "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 4096,
                "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
                "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None,
                "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
            },
        },
    ),
    "qwen3-next": ModelEntry(
        qwen3_next.Config(
            **SMALL, **MIXER, expert_dim=24, shared_dim=20, n_experts=4, n_experts_per_token=2, dense_layers=(1,),
        ),
        {
            "qwen3-next-80b-a3b": {
                **COMMON, **HYBRID, "model_type": "qwen3_next", "decoder_sparse_step": 1, "hidden_size": 2048,
                "intermediate_size": 5120, "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True,
                "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
                "output_router_logits": False, "rope_scaling": None, "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": 512, "vocab_size": 151936,
            },
        },
    ),
    "lfm2": ModelEntry(
        lfm2.Config(**SMALL, n_kv_heads=2, global_layers=(1,)),
        {
            "lfm2-1.2b": {
                **COMMON, "model_type": "lfm2", "block_auto_adjust_ff_dim": True, "block_ff_dim": 12288,
                "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "conv_L_cache": 3, "conv_bias": False,
                "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048, "max_position_embeddings": 128000,
                "norm_eps": 1e-05, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
                "rope_theta": 1000000.0, "vocab_size": 65536,
            },
        },
    ),
    "qwen3.5": ModelEntry(
        qwen3_5.Config(**SMALL, **MIXER),
        {
            "qwen3.5-9b": {
                **COMMON, **HYBRID, "model_type": "qwen3_5_text", "attn_output_gate": True, "hidden_size": 4096,
                "intermediate_size": 12288, "num_hidden_layers": 32, "num_key_value_heads": 4, "vocab_size": 248320,
                "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
            },
            "qwen3.5-35b-a3b": {
                **COMMON, **HYBRID, "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "moe_intermediate_size": 512,
                "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2,
                "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "vocab_size": 248320,
            },
        },
    ),
    "lstm": ModelEntry(lstm.Config(31, 16, 32, 2, dropout=0.0), {}),
}  # fmt: skip
