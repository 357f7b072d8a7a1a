"""gpt-oss (OpenAI, 2025): a mixture of experts whose attention has sinks, and windows of 128 tokens in every other
layer.

A sink is a learned score of each head for an extra key with the value 0, so that a head can attend to nothing. Gate and
up are clamped, and every layer has biases. The files stack the experts of a layer in one tensor, in MXFP4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention, SinkAttention
from keifu.layers.attention.positions import RopeScaling
from keifu.layers.feedforward import ClampedFeedForward
from keifu.layers.mixture import MixtureOfExperts, SoftmaxRouter
from keifu.layers.normalisation import FullPrecisionRMSNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.mixture import mixtral
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config:
    """Sizes and settings of a model. The defaults are gpt-oss-120b. hidden_dim: width of one expert."""

    vocab_size: int = 201_088
    context_length: int = 131_072
    dim: int = 2880
    hidden_dim: int = 2880
    n_layers: int = 36
    n_heads: int = 64
    n_kv_heads: int = 8
    head_dim: int = 64
    n_experts: int = 128
    n_experts_per_token: int = 4
    gate_slope: float = 1.702
    gate_limit: float = 7.0
    balancing: float = 0.9  # coefficient of the balancing loss
    norm_eps: float = 1e-5
    rope_theta: float = 150_000.0
    rope_scaling: RopeScaling | None = RopeScaling("yarn", 32.0, 4096, truncate=False)
    sliding_window: int = 128  # tokens that a local layer attends to, including the token itself
    global_layers: tuple[int, ...] | None = None  # None: every second, from layer 1 on
    attention_bias: bool = True
    tied: bool = False
    dropout: float = 0.0


# The numbers of parameters are from the model card, table 1.
SIZES = {"gpt-oss-20b": Config(n_layers=24, n_experts=32), "gpt-oss-120b": Config()}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_attention, config), partial(_feedforward, config), norm=FullPrecisionRMSNorm)


def _attention(config: Config, layer: int) -> Attention:
    window = None if layer in llama.global_layers(config, 2) else config.sliding_window
    return llama.attention(config, config.attention_bias, window=window, layer=SinkAttention)


def _feedforward(config: Config, layer: int) -> MixtureOfExperts:
    expert = partial(ClampedFeedForward, config.dim, config.hidden_dim, config.gate_slope, config.gate_limit)
    router = SoftmaxRouter(config.dim, config.n_experts, config.n_experts_per_token, bias=True)
    return MixtureOfExperts(router, [expert() for _ in range(config.n_experts)])


WEIGHT_NAMES = mixtral.DENSE_NAMES | {
    "blocks.*.attention.sinks": "model.layers.*.self_attn.sinks",
    "blocks.*.feedforward.router.gate": "model.layers.*.mlp.router",
    "blocks.*.feedforward.experts.*.gate_up": "model.layers.*.mlp.experts.*.[gate,up]_slice",
    "blocks.*.feedforward.experts.*.down": "model.layers.*.mlp.experts.*.down_slice",
}
MODEL_TYPES = {"gpt_oss": "GptOssForCausalLM"}
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
    "quant_method": "mxfp4",
}  # fmt: skip
UNSUPPORTED: dict[str, Any] = {"quantization_config": MXFP4, "hidden_act": "silu"}

FIELDS: hf.Fields = {name: field for name, field in llama.FIELDS.items() if name != "activation"} | {
    "n_kv_heads": hf.Field("num_key_value_heads", 8),
    "head_dim": hf.Field("head_dim", 64),
    "n_experts": hf.Field("num_local_experts", 128),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 4, also=("experts_per_token",)),
    "gate_slope": hf.Field("swiglu_alpha", 1.702, float),
    "gate_limit": hf.Field("swiglu_limit", 7.0, float),
    "balancing": hf.Field("router_aux_loss_coef", 0.001, float),
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
    "sliding_window": hf.Field("sliding_window", 128),
    "attention_bias": hf.Field("attention_bias", True),
    "rope": hf.rope(150_000.0),
    "global_layers": llama.published_layers(2),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _required_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    usual = tuple(range(1, values["n_layers"], 2))
    return {"global_layers": usual if values.get("global_layers") == usual else None}


GGUF = {
    "gpt-oss": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.EXPERTS | {
            "blocks.*.attention.sinks": "blk.*.attn_sinks.weight",
            "blocks.*.feedforward_norm": "blk.*.post_attention_norm",
        },
        fields=gguf.WINDOW_FIELDS | gguf.EXPERT_COUNTS | {"expert_feed_forward_length": "hidden_dim"},
        fixed={"gate_slope": 1.702, "gate_limit": 7.0, "attention_bias": True, "tied": False, "dropout": 0.0},
        windows=True, truncate=False, derive=_required_layers, needed=(*gguf.EXPERT_COUNTS,),
    ),
}  # fmt: skip
REFUSED = {"tensor": "SinkAttention"}
