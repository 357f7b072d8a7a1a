"""GPT-3 (Brown et al., 2020, "Language Models are Few-Shot Learners"): GPT-2 a hundred times as large, which learns a
task from examples in the prompt (few-shot). New in the model: banded (local) attention in every second layer (section
2.1, after Child et al., 2019), whose cost grows with the band's width and not with the square of the length.

Table 2.1 has inconsistent rows; this file uses d_model = n_heads · d_head: XL has 16 heads of 128 (the table's 24 would
make it 1.5 billion, not 1.3), and 13B has dim 5120 (the table's 5140 is not divisible by 40 heads). The band's width is
unpublished: 256 is from GPT-Neo, whose weights were published (Black et al., 2021; the same layers, with unscaled
attention and no biases on q, k and v). It is also unpublished whether the first layer is dense (here it is, as in
GPT-Neo) or banded, and the dropout rate (here 0).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import gpt1, gpt2
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count


@dataclass(frozen=True)
class Config(gpt1.Config):
    """GPT-1's fields, and those of the attention. The defaults are GPT-3 Small. band: None makes every layer dense, as
    in GPT-2."""

    vocab_size: Count = 50_257  # tokens in the vocabulary
    context_length: Count = 2048  # longest sequence in tokens
    dropout: BelowOne = 0.0  # share of dropped activations
    band: Count | None = 256  # width of the attention in layers 1, 3, 5, ..., including the token itself
    qkv_bias: bool = True  # whether queries, keys and values have a bias
    scaled_attention: bool = True  # whether scores are divided by √(dim / n_heads); not in GPT-Neo


def _size(n_layers: int, dim: int, n_heads: int, **changes: Any) -> Config:
    return Config(n_layers=n_layers, dim=dim, hidden_dim=4 * dim, n_heads=n_heads, **changes)


_neo = partial(_size, qkv_bias=False, scaled_attention=False)

SIZES = {
    "gpt3-small": _size(12, 768, 12),
    "gpt3-medium": _size(24, 1024, 16),
    "gpt3-large": _size(24, 1536, 16),
    "gpt3-xl": _size(24, 2048, 16),
    "gpt3-2.7b": _size(32, 2560, 32),
    "gpt3-6.7b": _size(32, 4096, 32),
    "gpt3-13b": _size(40, 5120, 40),
    "gpt3-175b": _size(96, 12_288, 96),
    "gpt-neo-125m": _neo(12, 768, 12),
    "gpt-neo-1.3b": _neo(24, 2048, 16),
    "gpt-neo-2.7b": _neo(32, 2560, 20),
}


def build(config: Config) -> DecoderLM:
    """Build a model with GPT-2's initialisation, as in the paper."""
    return gpt2.assemble(config, partial(_attention, config))


def _attention(config: Config, layer: int) -> Attention:
    window = config.band if layer % 2 == 1 else None
    sizes, scale = (config.dim, config.n_heads), None if config.scaled_attention else 1.0
    return Attention(*sizes, bias=config.qkv_bias, out_bias=True, window=window, dropout=config.dropout, scale=scale)


WEIGHT_NAMES = gpt2.WEIGHT_NAMES | {
    "blocks.*.attention.qkv": "transformer.h.*.attn.attention.[q,k,v]_proj",
    "blocks.*.attention.out": "transformer.h.*.attn.attention.out_proj",
    "blocks.*.feedforward.up": "transformer.h.*.mlp.c_fc",
    "blocks.*.feedforward.down": "transformer.h.*.mlp.c_proj",
}
PREFIX = gpt2.PREFIX
NOT_WEIGHTS = ("transformer.h.*.attn.attention.bias", "transformer.h.*.attn.attention.masked_bias")  # causal masks
MODEL_TYPES = {"gpt_neo": "GPTNeoForCausalLM"}

FIELDS: hf.Fields = gpt2.FIELDS | {  # GPT-Neo's fields
    "context_length": "max_position_embeddings",
    "dim": "hidden_size",
    "hidden_dim": hf.Field("intermediate_size", lambda json: 4 * json["hidden_size"]),
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "dropout": hf.Field("resid_dropout", 0.0, float, also=("embed_dropout", "attention_dropout")),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a config.json of model_type gpt_neo, or of gpt2, which describes a dense model."""
    if json["model_type"] == "gpt2":
        return Config(**hf.read_fields(json, gpt2.FIELDS), band=None)
    return Config(**hf.read_fields(json, FIELDS), band=_read_band(json), qkv_bias=False, scaled_attention=False)


def _read_band(json: dict[str, Any]) -> int | None:
    """Return the width of the band. attention_types, such as [[["global", "local"], 6]], lists the types of layers and
    their repetitions."""
    attention_types, n_layers = json["attention_types"], hf.check_layers(json, "num_layers")
    # one layer too many is enough for the error below
    layers = [layer for kinds, times in attention_types for layer in kinds * min(times, n_layers + 1)]
    if layers == ["global"] * n_layers:
        return None
    if layers != (["global", "local"] * n_layers)[:n_layers]:
        raise UserError(
            f"attention_types {attention_types} is not supported: {n_layers} layers, all global or every other."
        )
    return json.get("window_size", 256)


def _attention_types(n_layers: int, banded: bool) -> list[list[Any]]:
    """Return the value that `_read_band` reads."""
    pairs = n_layers // 2 if banded else 0
    entries = [[["global", "local"], pairs], [["global"], n_layers - 2 * pairs]]
    return [entry for entry in entries if entry[1]]


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json of GPT-2 for a dense model with GPT-2's attention, otherwise of GPT-Neo."""
    if config.band is None and config.qkv_bias and config.scaled_attention:
        return hf.write(config, gpt2.MODEL_TYPES, gpt2.FIELDS)
    return {
        **hf.write(config, MODEL_TYPES, FIELDS),
        "attention_types": _attention_types(config.n_layers, config.band is not None),
        "window_size": config.band or 256,
    }


REFUSED = {"gguf": "llama.cpp runs no GPT whose layers have a window"}
