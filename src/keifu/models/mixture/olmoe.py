"""OLMoE (Muennighoff et al., 2024): 64 small feed-forward networks, of which each token uses eight. All data, code and
logs of its training are public.

Queries and keys are normalised over all heads together. The weights of a token's experts are not normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, olmo2
from keifu.models.hf import config as hf
from keifu.models.mixture import mixtral, qwen3_moe
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are OLMoE-1B-7B. hidden_dim: width of one expert."""

    vocab_size: int = 50_304
    context_length: int = 4096
    dim: int = 2048
    hidden_dim: int = 1024
    n_layers: int = 16
    n_heads: int = 16
    n_kv_heads: int | None = None  # None: as many as n_heads
    n_experts: int = 64
    n_experts_per_token: int = 8
    normalised: bool = False  # whether the weights of a token's experts sum to 1
    balancing: float = 0.01  # coefficient of the balancing loss
    norm_eps: float = field(default=1e-5, kw_only=True)


SIZES = {"olmoe-1b-7b": Config()}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    mixture = partial(mixtral.mixture, config, config.hidden_dim, config.normalised)
    return llama.assemble(config, partial(olmo2.attention, config), lambda layer: mixture())


WEIGHT_NAMES = mixtral.DENSE_NAMES | qwen3_moe.EXPERT_NAMES | {
    f"blocks.*.attention.{part}_norm": f"model.layers.*.self_attn.{part}_norm" for part in "qk"
}  # fmt: skip
MODEL_TYPES = {"olmoe": "OlmoeForCausalLM"}
UNSUPPORTED = {"clip_qkv": None}

FIELDS: hf.Fields = olmo2.FIELDS | {
    "n_experts": hf.Field("num_experts", 64),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 8),
    "normalised": hf.Field("norm_topk_prob", False),
    "balancing": hf.Field("router_aux_loss_coef", 0.01, float),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _all_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Require as many heads of keys as of queries: llama.cpp normalises the keys of an OLMoE like the queries."""
    return {} if values.get("n_kv_heads") is None else {"n_kv_heads": values["n_heads"]}


GGUF = {
    "olmoe": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.QK_NORM | gguf.EXPERTS, fields=gguf.ROTARY_FIELDS | gguf.EXPERT_COUNTS,
        fixed=gguf.SILU | {"normalised": False, "tied": False}, derive=_all_keys, needed=(*gguf.EXPERT_COUNTS,),
    ),
}  # fmt: skip
REFUSED = {"tensor": "MixtureOfExperts"}
