"""Every model with a published counterpart gives transformers' logits from transformers' files, and back."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from gemma4_cases import CASES as GEMMA4
from model_entries import ENTRIES, ModelEntry
from quick import others_slow
from safetensors.torch import save_file

from keifu import checkpoints
from keifu.checkpoints.registry import describe

SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 42, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama(**changes):
    return transformers.LlamaConfig(**SIZES | changes)


def neo(**changes):
    """Return a model with layers global and local in turn; the window is much shorter than the test's 61 tokens."""
    sizes = {"vocab_size": 97, "max_position_embeddings": 64, "hidden_size": 20, "num_layers": 3, "num_heads": 5}
    kinds = [[["global", "local"], 1], [["global"], 1]]
    return transformers.GPTNeoConfig(**sizes | {"attention_types": kinds, "window_size": 7} | changes)


def cohere(**changes):
    return transformers.CohereConfig(**SIZES | {"logit_scale": 0.3} | changes)


def deepseek(**changes):
    """Return six experts in two groups; every size of the attention differs from the others."""
    sizes = {
        "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 14, "qk_rope_head_dim": 6, "qk_nope_head_dim": 5,
        "v_head_dim": 7, "n_group": 2, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return transformers.DeepseekV3Config(**SIZES | sizes | changes)


def hybrid(make=transformers.Qwen3NextConfig, **changes):
    """Return five layers, of which the fourth has attention; every size of a Gated DeltaNet differs from the others.

    Its outputs may be almost 0 with random weights: with a small ε, transformers' float32 is itself 6e-5 off.
    """
    sizes = {
        "rms_norm_eps": 0.01,
        "num_hidden_layers": 5, "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "linear_key_head_dim": 5, "linear_value_head_dim": 7, "moe_intermediate_size": 20, "num_experts": 6,
        "shared_expert_intermediate_size": 14, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    return make(**SIZES | sizes | changes)


def rope(kind: str, **settings):
    """Return LLaMA with 32 places and a rotary scaling; the test's 61 tokens go beyond."""
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **settings}
    return llama(head_dim=16, max_position_embeddings=32, rope_parameters=parameters)


def longrope(pairs: int, **settings):
    """Return rotary parameters of Phi-3 with a long context."""
    short, long = [1.0 + 0.1 * pair for pair in range(pairs)], [2.0 + 0.7 * pair for pair in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, **settings}


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CASES = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=20, n_layer=3, n_head=5),
    "gpt2-wide-exact-gelu": lambda: transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=20, n_layer=2, n_head=5, n_inner=33, activation_function="gelu"
    ),
    "gpt2-untied": lambda: transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=20, n_layer=2, n_head=5, layer_norm_epsilon=0.1, tie_word_embeddings=False
    ),
    "gpt1": lambda: transformers.OpenAIGPTConfig(vocab_size=97, n_positions=64, n_embd=20, n_layer=3, n_head=5),
    "gpt1-untied-silu": lambda: transformers.OpenAIGPTConfig(
        vocab_size=97, n_positions=64, n_embd=20, n_layer=2, n_head=5, layer_norm_epsilon=0.1, afn="silu",
        tie_word_embeddings=False,
    ),
    "gpt-neo": neo,
    "gpt-neo-window-of-one": lambda: neo(window_size=1, intermediate_size=33, activation_function="gelu"),
    "gpt-neo-all-global-untied": lambda: neo(
        num_layers=2, attention_types=[[["global"], 2]], tie_word_embeddings=False
    ),
    "cohere-multi-query": lambda: cohere(num_key_value_heads=1),
    "cohere-grouped-wide-heads": lambda: cohere(head_dim=10, layer_norm_eps=0.1, hidden_act="gelu"),
    "cohere-multi-head-untied": lambda: cohere(num_key_value_heads=4, tie_word_embeddings=False),
    "cohere-linear-rope": lambda: cohere(
        rope_parameters={"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.5}
    ),
    "llama1": lambda: llama(num_key_value_heads=4, rms_norm_eps=1e-6),
    "llama2-grouped": lambda: llama(rms_norm_eps=1e-5),
    "llama3": lambda: rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "smollm2-tied": lambda: llama(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
    ),
    "tinyllama-multi-query": lambda: llama(num_key_value_heads=1),
    "llama-biased-odd-heads": lambda: llama(attention_bias=True, mlp_bias=True, head_dim=10, hidden_act="gelu"),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "mistral-without-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=8),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=10),
    "qwen3-biased-window-tied": lambda: transformers.Qwen3Config(
        **SIZES, head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7}, head_dim=10, sliding_window=7, query_pre_attn_scalar=168
    ),
    "gemma3-scaled-untied": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=4, layer_types=["full_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=False, rope_scaling={"rope_type": "linear", "factor": 8.0}, hidden_activation="silu",
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "olmo2-multi-head-biased-tied": lambda: transformers.Olmo2Config(
        **SIZES | {"num_key_value_heads": 4}, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=0.1,
        rope_parameters={"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.5}, hidden_act="gelu",
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES, pad_token_id=None),
    "smollm3-biased-untied": lambda: transformers.SmolLM3Config(
        **SIZES, no_rope_layers=[0, 1, 1], attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        pad_token_id=None,
    ),
    "smollm3-windows": lambda: transformers.SmolLM3Config(
        **SIZES | {"num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1},
        use_sliding_window=True, sliding_window=6, pad_token_id=None,
    ),
    "smollm3-listed-windows": lambda: transformers.SmolLM3Config(
        **SIZES, use_sliding_window=False, sliding_window=5, pad_token_id=None,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **SIZES | {"max_position_embeddings": 128}, original_max_position_embeddings=64, rope_parameters=longrope(3),
        pad_token_id=None,
    ),
    "phi3-longrope-beyond-partial-tied": lambda: transformers.Phi3Config(
        **SIZES | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}, tie_word_embeddings=True,
        original_max_position_embeddings=32, sliding_window=200, pad_token_id=None,
        rope_parameters=longrope(6, partial_rotary_factor=0.75, attention_factor=1.3),
    ),
    "phi3": lambda: transformers.Phi3Config(
        **SIZES, sliding_window=7, original_max_position_embeddings=64, pad_token_id=None
    ),
    "phi3-full-attention-tied": lambda: transformers.Phi3Config(
        **SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=True, original_max_position_embeddings=64,
        pad_token_id=None,
    ),
    "exaone4": lambda: transformers.Exaone4Config(
        **SIZES | {"num_hidden_layers": 5}, head_dim=10, sliding_window=5, pad_token_id=None
    ),
    "exaone4-no-windows-tied": lambda: transformers.Exaone4Config(
        **SIZES | {"hidden_size": 35, "num_attention_heads": 5, "num_key_value_heads": 1}, head_dim=14,
        sliding_window=None, layer_types=["full_attention"] * 3, tie_word_embeddings=True, pad_token_id=None,
        rms_norm_eps=0.01, rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "exaone4-one-global-layer": lambda: transformers.Exaone4Config(
        **SIZES | {"num_key_value_heads": 4}, sliding_window=3, pad_token_id=None,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], hidden_act="gelu",
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **SIZES | {"num_hidden_layers": 4}, full_attn_idxs=[1, 3], block_multiple_of=5, pad_token_id=None
    ),
    "lfm2-long-convolutions-untied": lambda: transformers.Lfm2Config(
        **SIZES | {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1}, conv_L_cache=5,
        layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False, tie_word_embeddings=False,
        norm_eps=0.01, pad_token_id=None,
    ),
    "lfm2-biased-convolutions": lambda: transformers.Lfm2Config(
        **SIZES, full_attn_idxs=[1], conv_L_cache=4, conv_bias=True, pad_token_id=None
    ),
    "glm4": lambda: transformers.Glm4Config(**SIZES, head_dim=12, pad_token_id=None),
    "glm4-whole-heads-unbiased-tied": lambda: transformers.Glm4Config(
        **SIZES | {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3}, head_dim=10,
        attention_bias=False, tie_word_embeddings=True, pad_token_id=None, hidden_act="gelu",
        rope_parameters={"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.5, "partial_rotary_factor": 1.0},
    ),
    "glm4-a-fifth-of-a-head": lambda: transformers.Glm4Config(
        **SIZES | {"hidden_size": 42, "num_attention_heads": 5, "num_key_value_heads": 1}, head_dim=20,
        rms_norm_eps=0.01, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.2},
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=10, sliding_window=7, query_pre_attn_scalar=144, attn_logit_softcapping=2.5,
        final_logit_softcapping=1.5, attn_implementation="eager",
    ),
    "gemma2-without-caps-untied": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=4, layer_types=["full_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=False, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True,
        hidden_activation="silu", rope_parameters={"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.5},
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES, embedding_multiplier=12.0, attention_multiplier=0.3, residual_multiplier=0.22, logits_scaling=8.0,
        tie_word_embeddings=True, pad_token_id=None,
    ),
    "granite-biased-untied": lambda: transformers.GraniteConfig(
        **SIZES | {"num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, logits_scaling=3.0,
        residual_multiplier=1.7, rms_norm_eps=0.1, pad_token_id=None,
    ),
    "ministral": lambda: transformers.MinistralConfig(
        **SIZES, sliding_window=7, head_dim=10,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "ministral-full-attention-tied": lambda: transformers.MinistralConfig(
        **SIZES, sliding_window=5, tie_word_embeddings=True, head_dim=8, layer_types=["full_attention"] * 3
    ),
    "ministral3": lambda: transformers.Ministral3Config(
        **SIZES | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}, head_dim=10,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.4, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "ministral3-window-tied": lambda: transformers.Ministral3Config(
        **SIZES, head_dim=10, sliding_window=6, tie_word_embeddings=True,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.1},
    ),
    "nanochat-yarn": lambda: transformers.NanoChatConfig(
        **SIZES, final_logit_softcapping=1.5, rms_norm_eps=0.01, rope_parameters=YARN
    ),
    "nanochat": lambda: transformers.NanoChatConfig(**SIZES, final_logit_softcapping=1.5),
    "nanochat-biased-tied-uncapped": lambda: transformers.NanoChatConfig(
        **SIZES | {"num_key_value_heads": 1}, final_logit_softcapping=None, attention_bias=True, rms_norm_eps=0.1,
        tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.5},
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES | {"intermediate_size": 44}, num_local_experts=5),
    "mixtral-one-expert-window-tied": lambda: transformers.MixtralConfig(
        **SIZES | {"intermediate_size": 44}, num_local_experts=3, num_experts_per_tok=1, sliding_window=7, head_dim=10,
        tie_word_embeddings=True,
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=10, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True
    ),
    "qwen3-moe-dense-layers": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1],
        attention_bias=True, use_sliding_window=True, sliding_window=5,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **SIZES | {"intermediate_size": 20}, num_experts=6, num_experts_per_tok=3
    ),
    "olmoe-normalised-biased": lambda: transformers.OlmoeConfig(
        **SIZES | {"intermediate_size": 20}, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        attention_bias=True,
    ),
    "deepseek-v3": lambda: deepseek(),
    "deepseek-v3-one-matrix-yarn": lambda: deepseek(
        q_lora_rank=None, first_k_dense_replace=0, n_group=1, topk_group=1, n_shared_experts=2, norm_topk_prob=False,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "mscale": 1.0, "mscale_all_dim": 0.8,
        },
    ),
    "deepseek-v3-experts-in-groups-of-two-linear": lambda: deepseek(
        n_group=3, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=3, num_hidden_layers=5,
        rope_parameters={"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.5},
    ),
    "deepseek-v3-halves-biased": lambda: deepseek(rope_interleave=False, attention_bias=True, rms_norm_eps=0.1),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SIZES | {"intermediate_size": 20}, head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=7
    ),
    "gpt-oss-one-window-tied": lambda: transformers.GptOssConfig(
        **SIZES | {"intermediate_size": 28}, head_dim=16, num_local_experts=3, num_experts_per_tok=1, sliding_window=4,
        layer_types=["full_attention", "full_attention", "sliding_attention"], tie_word_embeddings=True,
        attention_bias=False, swiglu_limit=0.3, swiglu_alpha=1.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "qwen3-next": hybrid,
    "qwen3-next-dense-layers-tied": lambda: hybrid(
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention"],
        mlp_only_layers=[1], decoder_sparse_step=2, norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True,
        linear_conv_kernel_dim=3, linear_num_key_heads=3, linear_num_value_heads=3, rms_norm_eps=0.1,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
        },
    ),
    "qwen3-next-odd-heads-all-sparse": lambda: hybrid(
        hidden_size=40, num_attention_heads=5, num_key_value_heads=1, linear_num_key_heads=3, linear_num_value_heads=3,
        linear_conv_kernel_dim=1, full_attention_interval=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5, "partial_rotary_factor": 0.34},
    ),
    "qwen3.5": lambda: hybrid(transformers.Qwen3_5TextConfig),
    "qwen3.5-tied-one-head-of-keys": lambda: hybrid(
        transformers.Qwen3_5TextConfig, linear_num_key_heads=1, linear_conv_kernel_dim=2, tie_word_embeddings=True,
        layer_types=["linear_attention"] * 4 + ["full_attention"], attention_bias=True, rope_parameters=None,
        head_dim=8,
    ),
    "qwen3.5-moe": lambda: hybrid(transformers.Qwen3_5MoeTextConfig, num_experts_per_tok=3),
    "linear": lambda: rope("linear", factor=2.5),
    "dynamic": lambda: rope("dynamic", factor=3.0),
    "dynamic-with-an-original-length": lambda: rope("dynamic", factor=3.0, original_max_position_embeddings=16),
    "yarn": lambda: rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn-every-setting": lambda: rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.2, beta_fast=20,
        beta_slow=2, truncate=False,
    ),
    "yarn-attention-factor": lambda: rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8
    ),
}  # fmt: skip

CASES |= GEMMA4


def of_toy(entry: ModelEntry) -> transformers.PreTrainedConfig:
    """Return transformers' config of a model's toy."""
    _, json = describe(replace(entry.toy, vocab_size=97, context_length=64))
    return transformers.AutoConfig.for_model(**json, pad_token_id=None)


COVERED = {case().model_type for case in CASES.values()}
CASES |= {
    name: partial(of_toy, entry)
    for name, entry in ENTRIES.items()
    if entry.published and not COVERED & {*entry.row.model_types}
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


OTHERS = {  # what a model's other cases have too, or two of them; these are marked slow
    "gpt2-untied", "gpt1-untied-silu", "gpt-neo-all-global-untied", "cohere-multi-head-untied", "cohere-linear-rope",
    "smollm2-tied", "mistral-without-window", "qwen2-tied", "qwen3-biased-window-tied", "gemma3-scaled-untied",
    "olmo2-multi-head-biased-tied", "smollm3-windows", "phi3-longrope-beyond-partial-tied", "phi3-full-attention-tied",
    "gemma2-without-caps-untied", "granite-biased-untied", "ministral-full-attention-tied", "ministral3-window-tied",
    "glm4-a-fifth-of-a-head", "exaone4-one-global-layer",
    "nanochat-biased-tied-uncapped", "mixtral-one-expert-window-tied", "qwen3-moe-dense-layers",
    "olmoe-normalised-biased", "deepseek-v3-experts-in-groups-of-two-linear", "deepseek-v3-halves-biased",
    "gpt-oss-one-window-tied", "qwen3-next-odd-heads-all-sparse", "qwen3.5-tied-one-head-of-keys",
    "dynamic-with-an-original-length", "yarn-attention-factor",
}  # fmt: skip


@pytest.mark.parametrize("case", others_slow(CASES, *(name for name in CASES if name not in OTHERS)))
@torch.no_grad()
def test_logits_both_ways(case, published, weights, tmp_path) -> None:
    reference = published(CASES[case]())
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    length = 61
    tokens = torch.randint(0, 97, (2, length))
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    got = model(tokens)
    assert close(got, expected)

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    difference = again(tokens).logits - expected  # where memory begins may change a sum's order
    assert difference.abs().max() <= 1e-6 * expected.abs().max()

    if not case.startswith("dynamic") and "beyond" not in case:  # angles that depend on how many tokens follow
        state = model.new_state(2, length)
        pieces = [model(tokens[:, :11], state), model(tokens[:, 11:55], state)]
        pieces += [model(tokens[:, i : i + 1], state) for i in range(55, length)]
        assert close(torch.cat(pieces, 1), expected)
        short = tokens[1:, : length - 6]
        padded = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1)])
        in_batch = model(padded, None, torch.tensor([0, 6]))
        assert close(in_batch[0], expected[0])
        assert close(in_batch[1, 6:], reference(short).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("limit", [9_000, 40_000])
def test_shards_both_ways(limit, published, weights, tmp_path) -> None:
    reference = published(llama())
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = checkpoints.load_model(tmp_path / "theirs")
    checkpoints.save(model, None, tmp_path / "ours", max_shard_bytes=limit)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 1
    for tensors in map(weights_of, files):
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    tokens = torch.randint(0, 97, (1, 9))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(again(tokens).logits, reference(tokens).logits)
    assert torch.equal(checkpoints.load_model(tmp_path / "ours")(tokens), model(tokens))

    checkpoints.save(model, None, tmp_path / "ours")  # now whole: no shard may stay behind
    assert [file.name for file in (tmp_path / "ours").glob("model*")] == ["model.safetensors"]


def weights_of(file) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def rewrite(directory, change) -> None:
    """Rewrite a directory's weights by a function of the dictionary of tensors."""
    path = directory / "model.safetensors"
    save_file(change(weights_of(path)), path, metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "masks"),
    [
        ("gpt1", ["attn.bias"]),
        ("gpt2", ["attn.bias", "attn.masked_bias"]),
        ("gpt-neo", ["attn.attention.bias", "attn.attention.masked_bias"]),
    ],
)
def test_gpts_as_their_makers_wrote_them(case, masks, published, weights, tmp_path) -> None:
    """No prefix, and the causal masks among the weights."""
    reference = published(CASES[case]())
    reference.save_pretrained(tmp_path / "theirs")
    names = [f"h.{n}.{mask}" for n in range(3) for mask in masks]

    def old(tensors):
        causal = {n: torch.tensor(-1e4) if "masked" in n else torch.ones(64, 64).tril()[None, None] for n in names}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | causal

    rewrite(tmp_path / "theirs", old)
    model = checkpoints.load_model(tmp_path / "theirs")
    tokens = torch.randint(0, 97, (2, 30))
    assert close(model(tokens), reference(tokens).logits)
    skipped = checkpoints.inspect(tmp_path / "theirs").skipped
    assert sorted(skipped) == sorted(names)
    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert {name.removeprefix("transformer.") for name in saved} == original.keys() - set(skipped)
    assert all(torch.equal(tensor, original[name.removeprefix("transformer.")]) for name, tensor in saved.items())


@torch.no_grad()
@pytest.mark.parametrize("case", ["gpt1", "gpt2", "cohere-multi-query", "smollm2-tied", "qwen2-tied"])
def test_tied_file_that_holds_the_head_too(case, published, tmp_path) -> None:
    reference = published(CASES[case]())
    reference.save_pretrained(tmp_path)
    embedding = reference.get_input_embeddings().weight.clone()
    tokens = torch.randint(0, 97, (1, 12))

    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    model = checkpoints.load_model(tmp_path)
    assert model.head is None and close(model(tokens), reference(tokens).logits)
    assert checkpoints.inspect(tmp_path).skipped == ["lm_head.weight"]

    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": embedding + 0.5})
    model = checkpoints.load_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.head is not None and close(model(tokens), theirs(tokens).logits)
    assert any("they are kept apart" in note for note in checkpoints.inspect(tmp_path).notes)

    stored = weights_of(tmp_path / "model.safetensors")
    name = next(name for name in stored if name.endswith(("wte.weight", "embed_tokens.weight", "tokens_embed.weight")))
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != name} | {"lm_head.weight": embedding.clone()})
    assert close(checkpoints.load_model(tmp_path)(tokens), reference(tokens).logits)


@torch.no_grad()
def test_base_model_without_its_prefix(published, tmp_path) -> None:
    reference = published(CASES["smollm2-tied"]())
    reference.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in weights_of(tmp_path / "model.safetensors")
    tokens = torch.randint(0, 97, (1, 12))
    assert close(checkpoints.load_model(tmp_path)(tokens), reference(tokens).logits)


@pytest.mark.parametrize(("stored", "held"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float64", "float64")])
def test_types_of_numbers(stored, held, published, weights, tmp_path) -> None:
    published(llama()).to(vars(torch)[stored]).save_pretrained(tmp_path / "theirs")
    assert next(checkpoints.load_model(tmp_path / "theirs").parameters()).dtype == vars(torch)[held]
    model = checkpoints.load_model(tmp_path / "theirs", dtype=vars(torch)[stored])
    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == stored


def test_mixed_types_are_held_in_one_that_loses_nothing(published, weights, tmp_path) -> None:
    published(llama()).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v if v.ndim == 1 else v.bfloat16() for k, v in tensors.items()})
    model = checkpoints.load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, weights(tmp_path)["model.norm.weight"])
    assert any("cast to float32" in row.done for row in checkpoints.inspect(tmp_path).rows)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells where files are mapped")
def test_weights_are_not_copied(published, tmp_path) -> None:
    """Weights that need no change are in the file's own memory map; a change in memory leaves the file as it is."""
    published(llama()).save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    spans = [(int(start, 16), int(end, 16)) for start, end in mapped]

    def in_file(tensor):
        return any(start <= tensor.data_ptr() < end for start, end in spans)

    block = model.blocks[0]
    assert in_file(model.embedding.weight) and in_file(block.feedforward.down.weight)
    assert not in_file(block.attention.qkv.weight)  # joined of three
    assert not model.training and not any(parameter.is_meta for parameter in model.parameters())
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.embedding.weight.add_(1)  # as training does: the process has its own pages from now on
    assert (tmp_path / "model.safetensors").read_bytes() == before
