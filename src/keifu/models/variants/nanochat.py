"""nanochat (Karpathy, 2025): norms without weights, also after the embedding; squared ReLU; a soft cap on the logits.

Rotary positions have the opposite direction. nanochat normalises queries and keys after the rotation, and keifu before
it: a rotation does not change lengths.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import ReversedRotary
from keifu.layers.feedforward import FeedForward
from keifu.layers.normalisation import PlainRMSNorm
from keifu.layers.transformer.decoder import DecoderLM, NormedEmbedding, SoftCappedLM
from keifu.models import llama
from keifu.models.hf import config as hf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are the model of depth 20."""

    vocab_size: int = 65_536
    context_length: int = 2048
    dim: int = 1280
    hidden_dim: int = 5120
    n_layers: int = 20
    n_heads: int = 10
    n_kv_heads: int = 10
    activation: str = field(default="relu2", kw_only=True)
    logit_cap: float | None = 15.0


SIZES = {
    "nanochat-d20": Config(),
    "nanochat-d32": Config(dim=2048, hidden_dim=8192, n_layers=32, n_heads=16, n_kv_heads=16),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    embedding = NormedEmbedding(config.vocab_size, config.dim, config.norm_eps)
    model = SoftCappedLM if config.logit_cap else DecoderLM
    network = partial(FeedForward, config.dim, config.hidden_dim, activation(config.activation), bias=False)
    sublayers = partial(_attention, config), lambda layer: network()
    return llama.assemble(config, *sublayers, norm=PlainRMSNorm, embedding=embedding, model=model)


def _attention(config: Config, layer: int) -> Attention:
    head_dim = config.dim // config.n_heads
    scaling, magnitude = config.rope_scaling, 1.0
    if scaling:  # in nanochat the norms are after the rotation and cancel its magnitude
        scaling, magnitude = replace(scaling, attention_factor=1.0), scaling.magnitude()
    norm = partial(PlainRMSNorm, head_dim, config.norm_eps / magnitude**2)
    rotary = ReversedRotary(head_dim, config.rope_theta, scaling)
    return llama.attention(config, config.attention_bias, rotary=rotary, qk_norm=(norm(), norm()))


WEIGHT_NAMES = {name: theirs for name, theirs in llama.WEIGHT_NAMES.items() if "norm" not in name} | {
    "blocks.*.feedforward.up": "model.layers.*.mlp.fc1",
    "blocks.*.feedforward.down": "model.layers.*.mlp.fc2",
}
del WEIGHT_NAMES["blocks.*.feedforward.gate_up"]
MODEL_TYPES = {"nanochat": "NanoChatForCausalLM"}

FIELDS: hf.Fields = llama.BIAS_FIELDS | {
    "activation": hf.activation_field("hidden_act", "relu2"),
    "logit_cap": hf.Field("final_logit_softcapping", 15.0, if_none=hf.null),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)
REFUSED = {"gguf": "llama.cpp has no code for this model", "native": "SoftCappedLM", "tensor": "PlainRMSNorm"}
