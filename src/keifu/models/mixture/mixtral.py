"""Mixtral (Jiang et al., 2024): Mistral's layers with eight feed-forward networks; each token uses two of them.

It was the first open mixture that matched dense models with five times as many active parameters. Mixtures are older
(Shazeer et al., 2017; Switch Transformers, Fedus et al., 2021).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.mixture import MixtureOfExperts, SoftmaxRouter
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model. The defaults are Mixtral 8x7B. hidden_dim: width of one expert."""

    vocab_size: int = 32_000
    context_length: int = 32_768
    dim: int = 4096
    hidden_dim: int = 14_336
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int | None = None  # None: dim / n_heads
    n_experts: int = 8
    n_experts_per_token: int = 2
    balancing: float = 0.02  # coefficient of the balancing loss
    norm_eps: float = field(default=1e-5, kw_only=True)
    rope_theta: float = field(default=1e6, kw_only=True)
    sliding_window: int | None = None  # tokens that a token attends to, including itself; None: all


SIZES = {
    "mixtral-8x7b": Config(),
    "mixtral-8x22b": Config(
        vocab_size=32_768, context_length=65_536, dim=6144, hidden_dim=16_384, n_layers=56, n_heads=48, balancing=0.001
    ),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA, since the paper does not give its own."""
    attention = partial(llama.attention, config, window=config.sliding_window)
    return llama.assemble(config, lambda layer: attention(), lambda layer: mixture(config, config.hidden_dim))


def mixture(config: Any, expert_dim: int, normalised: bool = True) -> MixtureOfExperts:
    """Build a mixture of gated networks with a softmax router."""
    router = SoftmaxRouter(config.dim, config.n_experts, config.n_experts_per_token, normalised)
    return MixtureOfExperts(router, [llama.gated_network(config, expert_dim) for _ in range(config.n_experts)])


DENSE_NAMES = {ours: theirs for ours, theirs in llama.WEIGHT_NAMES.items() if ".feedforward." not in ours}
WEIGHT_NAMES = DENSE_NAMES | {
    "blocks.*.feedforward.router.gate": "model.layers.*.block_sparse_moe.gate",
    "blocks.*.feedforward.experts.*.gate_up": "model.layers.*.block_sparse_moe.experts.*.[w1,w3]",
    "blocks.*.feedforward.experts.*.down": "model.layers.*.block_sparse_moe.experts.*.w2",
}
MODEL_TYPES = {"mixtral": "MixtralForCausalLM"}
UNSUPPORTED = {"router_jitter_noise": 0.0}

FIELDS: hf.Fields = llama.DECODER_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 8),
    "head_dim": hf.Field("head_dim", None),
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
    "n_experts": hf.Field("num_local_experts", 8),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 2),
    "balancing": hf.Field("router_aux_loss_coef", 0.001, float),
    "sliding_window": hf.Field("sliding_window", None),
    "rope": hf.rope(1e6),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "llama": gguf.GgufArchitecture(  # llama.cpp runs a Mixtral as a LLaMA with experts
        names=gguf.LLAMA | gguf.EXPERTS, fields=gguf.WINDOW_FIELDS | gguf.EXPERT_COUNTS,
        fixed={"activation": "silu", "dropout": 0.0}, interleaved=True, divisors="llama3",
        needed=(*gguf.EXPERT_COUNTS,),
    ),
}  # fmt: skip
REFUSED = {"tensor": "MixtureOfExperts"}
