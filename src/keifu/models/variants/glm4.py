"""GLM-4-0414 (GLM Team, 2024, and Zhipu AI, 2025): LLaMA's layers with norms before and after each sublayer.

Rotary positions turn half of each head, and the pairs are neighbours. Queries, keys and values have biases in the 9B
model. The files name the norm before the feed-forward network "post_attention_layernorm", as LLaMA's do, and the one
after the attention "post_self_attn_layernorm".
"""

from dataclasses import dataclass, field
from functools import partial

from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import Rotary
from keifu.layers.transformer.blocks import SandwichNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model. The defaults are GLM-4-9B-0414."""

    vocab_size: int = 151_552
    context_length: int = 32_768
    dim: int = 4096
    hidden_dim: int = 13_696
    n_layers: int = 40
    n_heads: int = 32
    n_kv_heads: int = 2
    head_dim: int = 128
    rope_dim: int = 64  # numbers of a head that are rotated by position
    qkv_bias: bool = True  # whether queries, keys and values have a bias
    norm_eps: float = field(default=1e-5, kw_only=True)


SIZES = {
    "glm4-9b": Config(),
    "glm4-32b": Config(dim=6144, hidden_dim=23_040, n_layers=61, n_heads=48, n_kv_heads=8, qkv_bias=False),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_attention, config), block=SandwichNorm, n_norms=4)


def _attention(config: Config, layer: int) -> Attention:
    rotary = Rotary(config.rope_dim, config.rope_theta, config.rope_scaling, interleaved=True)
    return llama.attention(config, config.qkv_bias, out_bias=False, rotary=rotary)


WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "blocks.*.post_attention_norm": "model.layers.*.post_self_attn_layernorm",
    "blocks.*.post_feedforward_norm": "model.layers.*.post_mlp_layernorm",
    "blocks.*.feedforward.gate_up": "model.layers.*.mlp.gate_up_proj",
}
MODEL_TYPES = {"glm4": "Glm4ForCausalLM"}


FIELDS: hf.Fields = llama.DECODER_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 2),
    "head_dim": hf.Field("head_dim", 128),
    "qkv_bias": hf.Field("attention_bias", True),
    "norm_eps": hf.Field("rms_norm_eps", 1.5625e-7, float),
    "rope": hf.partial_rope(128, 0.5),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "glm4": gguf.GgufArchitecture(
        names=gguf.JOINED_GATE | gguf.POST_NORMS, fields=gguf.ROTARY_FIELDS,
        fixed={"activation": "silu", "dropout": 0.0}, optional={"qkv_bias": "blk.0.attn_q.bias"},
    ),
}  # fmt: skip
