"""GGUF files of a model: how llama.cpp's fields and tensors correspond to a Config.

GGUF's "architecture" names the code in llama.cpp that runs a model. Properties that are fixed in this code (an
activation, for example) are not in the file: a `GgufArchitecture` lists them, and a Config with other values is not
written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """An architecture of llama.cpp, in a model's row.

    - names: table of weight names, from keifu's to GGUF's.
    - fields: GGUF's field, without the architecture's prefix → the Config's field, in addition to the common sizes.
    - fixed: values of the Config that llama.cpp's code requires.
    - optional: boolean field of the Config → a tensor that exists only if it is True.
    - interleaved: whether the rows of q and k are stored with rotary pairs next to each other.
    - windows: whether llama.cpp applies sliding windows. Otherwise it ignores them.
    - divisors: kind of rotary scaling whose divisors of the frequencies llama.cpp reads: llama3 or longrope.
    - log_multiplier: factor of the growth of the magnitude of yarn (mscale_all_dim) in the file; 0: it is not read.
    - mscale: of yarn in such a file; None: it equals mscale_all_dim.
    - truncate: whether the model's yarn rounds its bounds. llama.cpp always does.
    - attention_layers: field of the Config with the layers that have attention; the others have 0 heads in the file.
    - derive: computes further required values from the Config's values.
    - read: computes further values of the Config from a file's fields, without the architecture's prefix.
    - write: computes further fields of the file from the Config's values.
    - arrangements: from the Config's values, the `Arrangement` of each tensor that is stored in another way.
    - limit: from the Config's values, a property that llama.cpp requires and the model lacks; "" if there is none.
    - needed: fields that a file must have.
    """

    names: Mapping[str, str]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    optional: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    windows: bool = False
    divisors: str | None = None
    log_multiplier: float = 0.0
    mscale: float | None = 1.0
    truncate: bool = True
    attention_layers: str | None = None
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda metadata: {}
    write: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    arrangements: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: {}
    limit: Callable[[Mapping[str, Any]], str] = lambda values: ""
    needed: tuple[str, ...] = ()

    @property
    def rotary(self) -> bool:
        """Whether the architecture has rotary positions."""
        return "rope.freq_base" in self.fields

    @property
    def only_experts(self) -> bool:
        """Whether every layer has experts, so that the width of a layer without them is not used."""
        return "expert_feed_forward_length" in self.fields and self.fixed.get("dense_layers") == ()


BLOCKS = {
    "embedding": "token_embd",
    "blocks.*.attention_norm": "blk.*.attn_norm",
    "blocks.*.attention.out": "blk.*.attn_output",
    "blocks.*.feedforward_norm": "blk.*.ffn_norm",
    "blocks.*.feedforward.down": "blk.*.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
LLAMA = BLOCKS | {
    "blocks.*.attention.qkv": "blk.*.attn_[q,k,v]",
    "blocks.*.feedforward.gate_up": "blk.*.ffn_[gate,up]",
}
JOINED_GATE = BLOCKS | {
    "blocks.*.attention.qkv": "blk.*.attn_[q,k,v]",
    "blocks.*.feedforward.gate_up": "blk.*.ffn_up",
}
QK_NORM = {f"blocks.*.attention.{part}_norm": f"blk.*.attn_{part}_norm" for part in "qk"}
POST_NORMS = {
    "blocks.*.post_attention_norm": "blk.*.post_attention_norm",
    "blocks.*.post_feedforward_norm": "blk.*.post_ffw_norm",
}
REORDERED_NORMS = {
    "blocks.*.attention_norm": "blk.*.post_attention_norm",
    "blocks.*.feedforward_norm": "blk.*.post_ffw_norm",
}
EXPERTS = {
    "blocks.*.feedforward.router.gate": "blk.*.ffn_gate_inp",
    "blocks.*.feedforward.experts.*.gate_up": "blk.*.ffn_[gate,up]_exps.*",
    "blocks.*.feedforward.experts.*.down": "blk.*.ffn_down_exps.*",
}

ROTARY_FIELDS = {
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
WINDOW_FIELDS = ROTARY_FIELDS | {"attention.sliding_window": "sliding_window"}
EXPERT_COUNTS = {"expert_count": "n_experts", "expert_used_count": "n_experts_per_token"}
EXPERT_DIM = {"expert_feed_forward_length": "expert_dim"}

PLAIN = {"activation": "silu", "first_window_layer": 0, "dropout": 0.0}
SILU = {"activation": "silu", "attention_bias": False, "dropout": 0.0}


def unit_offset(names: Mapping[str, str]) -> dict[str, str]:
    """Return the names with the mark that the files' norms are larger by one."""
    return {ours: f"{theirs}+1" if ours.endswith("norm") else theirs for ours, theirs in names.items()}


def optional_window(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return that a file without a sliding window, or with one of 0, has none: the Config's default may have one."""
    return {"sliding_window": values.get("sliding_window") or None}
