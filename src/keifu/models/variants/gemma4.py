"""The text model of Gemma 4 (Gemma Team, 2026): each layer gets its own embedding of every token, and the last layers
use the keys and values of an earlier one.

Local layers (sliding window) and global ones have heads of different sizes. In global layers only a quarter of the
pairs turn with the position, and the keys may serve as values. Values are normalised, and scores are not scaled. In the
26B model each layer has experts next to its feed-forward network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention, Cache, CacheShape, Scoring
from keifu.layers.attention.kv_cache import PassCache
from keifu.layers.attention.masks import Mask
from keifu.layers.attention.positions import Positions, ProportionalRotary, RopeScaling, Rotary
from keifu.layers.dropout import Dropout
from keifu.layers.linear import JoinedLinear, Linear
from keifu.layers.mixture import MixtureOfExperts, Router, Routing, SoftmaxRouter
from keifu.layers.normalisation import FullPrecisionRMSNorm, PlainRMSNorm
from keifu.layers.transformer.blocks import SandwichNorm, Stream
from keifu.layers.transformer.decoder import DecoderLM, Hidden, ScaledEmbedding, SoftCappedLM, State, Tokens
from keifu.models import gemma3, llama
from keifu.models.hf import config as hf
from keifu.ranges import Count, Natural

LayerInput = Float[Tensor, "batch length layer_dim"]


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are Gemma 4 E2B."""

    vocab_size: int = 262_144
    context_length: int = 131_072
    dim: int = 1536
    hidden_dim: int = 6144
    n_layers: int = 35
    n_heads: int = 8
    n_kv_heads: int = 1
    head_dim: int = 256  # width of a head in local layers
    global_head_dim: Count = 512  # width of a head in global layers
    global_kv_heads: Count | None = None  # key and value heads of global layers; None: as many as n_kv_heads
    rope_theta: float = field(default=1e6, kw_only=True)
    turning: float | None = 0.25  # share of the pairs of a global head that turn; None: usual rotary positions
    local_rope_theta: float = 10_000.0
    local_rope_scaling: RopeScaling | None = None
    local_turning: float | None = None  # the same share in local layers
    activation: str = field(default="gelu_tanh", kw_only=True)
    sliding_window: int = 512  # tokens that a local layer attends to, including the token itself
    global_layers: tuple[int, ...] | None = None  # None: every sixth, from layer 5 on, and the last
    n_shared_layers: Natural = 0  # last layers that use the keys and values of an earlier layer of their kind
    wide_shared: bool = False  # whether the feed-forward networks of these layers are twice as wide
    keys_as_values: bool = False  # whether the keys of global layers, before norm and rotation, are their values
    layer_dim: Natural = 256  # width of the embedding that each layer has of its own; 0: none
    layer_vocab_size: Count | None = None  # tokens with such embeddings; None: vocab_size
    logit_cap: float | None = 30.0
    n_experts: Count | None = None  # experts of each layer; None: no layer has experts
    n_experts_per_token: Count = 8
    expert_dim: Count = 704  # inner width of an expert
    tied: bool = field(default=True, kw_only=True)


_large = partial(
    Config, context_length=262_144, global_head_dim=512, sliding_window=1024, keys_as_values=True, layer_dim=0
)

SIZES = {
    "gemma4-e2b": Config(
        global_layers=(4, 9, 14, 19, 24, 29, 34), n_shared_layers=20, wide_shared=True
    ),
    "gemma4-e4b": Config(dim=2560, hidden_dim=10_240, n_layers=42, n_kv_heads=2, n_shared_layers=18),
    "gemma4-26b-a4b": _large(
        dim=2816, hidden_dim=2112, n_layers=30, n_heads=16, n_kv_heads=8, global_kv_heads=2, n_experts=128
    ),
    "gemma4-31b": _large(dim=5376, hidden_dim=21_504, n_layers=60, n_heads=32, n_kv_heads=16, global_kv_heads=4),
}  # fmt: skip


class NormedValues(Attention):
    """Attention whose values are normalised in each head, without weights."""

    def __init__(self, *sizes: Any, v_norm: nn.Module, **settings: Any):
        super().__init__(*sizes, **settings)
        self.v_norm = v_norm

    def forward(
        self, x: Hidden, mask: Mask | None = None, positions: Positions | None = None, cache: Cache | None = None
    ) -> Hidden:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.tensor_split([self.n_heads + self.n_kv_heads], 2)
        return self.out(self._mix(torch.cat([qk, self.v_norm(v)], 2), mask, positions, cache))


class KeysAsValues(nn.Module):
    """Joined matrix of queries and keys; the keys are the values too."""

    def __init__(self, dim: int, inner: int, kv: int, bias: bool):
        super().__init__()
        self.inner, self.matrix = inner, JoinedLinear(dim, (inner, kv), bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch joined"]:
        y = self.matrix(x)
        return torch.cat([y, y[..., self.inner :]], -1)


class SharedKeysAttention(nn.Module):
    """Attention of queries to the keys and values of an earlier layer, so that the layer has no cache of its own
    (cross-layer attention, Brandon et al., 2024). `cache` is that layer's, in a pass without earlier tokens too."""

    def __init__(
        self, dim: int, n_heads: int, head_dim: int, bias: bool, rotary: Rotary, window: int | None, q_norm: nn.Module,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.head_dim, self.rotary, self.window, self.dropout = head_dim, rotary, window, Dropout(dropout)
        self.q, self.q_norm = Linear(dim, n_heads * head_dim, bias), q_norm
        self.out = Linear(n_heads * head_dim, dim, bias)

    def forward(self, x: Hidden, mask: Mask | None, positions: Positions, cache: Cache) -> Hidden:
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim)))
        q = positions.rotation(self.rotary).apply(q).transpose(1, 2)
        return self.out(cache.attend(q, None, None, self.window, Scoring(self.dropout, 1.0)))

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.out.weight]


class ScaledRouter(SoftmaxRouter):
    """Router that normalises and scales the token first, and multiplies the weight of each expert by a learned
    number."""

    def __init__(self, dim: int, n_experts: int, k: int, eps: float):
        super().__init__(dim, n_experts, k)
        self.norm = PlainRMSNorm(dim, eps)
        self.scale, self.expert_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(n_experts))

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        routing = super().forward(self.norm(x) * self.scale * len(self.scale) ** -0.5)
        return routing._replace(weights=routing.weights * self.expert_scale[routing.experts])


class NormedExperts(MixtureOfExperts):
    """Mixture whose experts get the normalised token, while the router gets the token itself."""

    def __init__(self, router: Router, experts: Sequence[nn.Module], norm: nn.Module):
        super().__init__(router, experts)
        self.norm = norm

    def _outputs(self, tokens: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
        return super()._outputs(self.norm(tokens), experts, counts)


class Branches(nn.Module):
    """Sum of the outputs of a layer's feed-forward network and of its experts, each with a norm."""

    def __init__(self, mixture: NormedExperts, dense_norm: nn.Module, mixture_norm: nn.Module):
        super().__init__()
        self.mixture, self.dense_norm, self.mixture_norm = mixture, dense_norm, mixture_norm

    def forward(self, x: Stream, dense: Stream) -> Stream:
        """Return the sum. x: the residual stream. dense: output of the feed-forward network."""
        return self.dense_norm(dense) + self.mixture_norm(self.mixture(x))


class LayerEmbeddings(nn.Module):
    """Per-layer embeddings: for each token and layer a small vector, half looked up and half computed from the token's
    usual embedding (Gemma 3n, 2025)."""

    def __init__(self, vocab_size: int, dim: int, n_layers: int, layer_dim: int, eps: float):
        super().__init__()
        self.n_layers = n_layers
        self.embedding = ScaledEmbedding(vocab_size, n_layers * layer_dim, layer_dim**0.5)
        self.projection = Linear(dim, n_layers * layer_dim, bias=False)
        self.norm = FullPrecisionRMSNorm(layer_dim, eps)

    def forward(self, tokens: Tokens, x: Hidden) -> Float[Tensor, "batch length all_layers"]:
        """Return the vectors of all layers, one after the other. x: the usual embeddings of the tokens."""
        computed = (self.projection(x) * x.shape[-1] ** -0.5).unflatten(-1, (self.n_layers, -1))
        return (self.norm(computed).flatten(-2) + self.embedding(tokens)) * 2**-0.5


class LayeredEmbedding(ScaledEmbedding):
    """Embedding of a token, followed by its embeddings for all layers."""

    def __init__(self, vocab_size: int, dim: int, scale: float, layers: LayerEmbeddings):
        super().__init__(vocab_size, dim, scale)
        self.layers = layers

    def forward(self, input: Tokens) -> Float[Tensor, "batch length all"]:  # noqa: A002
        x = super().forward(input)
        return torch.cat([x, self.layers(input, x)], -1)


class LayerGate(nn.Module):
    """Third sublayer: the stream gates the layer's own embedding of the token."""

    def __init__(self, dim: int, layer_dim: int, activation: Callable[[Tensor], Tensor], norm: nn.Module):
        super().__init__()
        self.gate, self.projection = Linear(dim, layer_dim, bias=False), Linear(layer_dim, dim, bias=False)
        self.activation, self.norm = activation, norm

    def forward(self, x: Stream, own: LayerInput) -> Stream:
        return self.norm(self.projection(self.activation(self.gate(x)) * own))


class Gemma4Block(SandwichNorm):
    """`SandwichNorm` with experts next to the feed-forward network (`branches`), a sublayer for the layer's own
    embedding (`gate`), and a factor of the whole stream."""

    def __init__(self, *layers: Any, branches: Branches | None = None, gate: LayerGate | None = None):
        super().__init__(*layers)
        self.branches, self.gate = branches, gate
        self.register_buffer("scale", torch.ones(1))
        self.scale: Tensor

    def forward(self, x: Stream, own: LayerInput | None = None, **context: Any) -> Stream:
        x = x + self.attention_dropout(self.post_attention_norm(self.attention(self.attention_norm(x), **context)))
        y = self.feedforward(self.feedforward_norm(x))
        if self.branches is not None:
            y = self.branches(x, y)
        x = x + self.feedforward_dropout(self.post_feedforward_norm(y))
        if self.gate is not None and own is not None:
            x = x + self.gate(x, own)
        return x * self.scale


class Gemma4LM(DecoderLM):
    """Language model whose layers have their own embeddings and share keys and values."""

    def _hidden(
        self, x: Float[Tensor, "batch length all"], positions: Tensor, state: State | None = None,
        mask: Mask | None = None,
    ) -> Hidden:  # fmt: skip
        owners, dim = key_layers(self.config), self.config.dim
        own = x[..., dim:].chunk(len(owners), -1) if x.shape[-1] > dim else [None] * len(owners)
        caches = [PassCache(mask) if state is None else state.layer(i) for i in range(max(owners) + 1)]
        x = self.dropout(x[..., :dim])
        shared = Positions(positions, None if state is None else state.sequence_lengths)
        for block, vectors, owner in zip(self.blocks, own, owners, strict=True):
            x = block(x, own=vectors, mask=mask, positions=shared, cache=caches[owner])
        if state is not None:
            state.advance()
        return self.norm(x)

    @property
    def cache_layers(self) -> list[CacheShape]:
        """Return the shape of the cache of each layer that has one: all but the last layers, which share."""
        blocks: list[Any] = list(self.blocks)
        return [block.attention.cache_shape for block in blocks[: max(key_layers(self.config)) + 1]]


class CappedGemma4LM(Gemma4LM, SoftCappedLM):
    """`Gemma4LM` with a soft cap on the logits."""


def global_layers(config: Config) -> tuple[int, ...]:
    """Return the layers with full attention; by default every sixth and the last."""
    last = config.n_layers - 1
    return tuple(sorted({*range(5, last, 6), last})) if config.global_layers is None else config.global_layers


def key_layers(config: Config) -> list[int]:
    """Return the layer whose keys and values each layer uses. Raises UserError if a layer has none to use."""
    full, first = global_layers(config), config.n_layers - config.n_shared_layers
    kinds = [layer in full for layer in range(config.n_layers)]
    sources = {kind: layer for layer, kind in enumerate(kinds[: max(0, first)])}
    if missing := {*kinds} - {*sources}:
        kind = "full attention" if True in missing else "a sliding window"
        raise UserError(
            f"The last {config.n_shared_layers} of {config.n_layers} layers share keys and values, but no earlier "
            f"layer with {kind} has them: choose a smaller n_shared_layers."
        )
    return [layer if layer < first else sources[kind] for layer, kind in enumerate(kinds)]


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    key_layers(config)
    embedding = ScaledEmbedding(config.vocab_size, config.dim, config.dim**0.5)
    if config.layer_dim:
        vocab_size = config.layer_vocab_size or config.vocab_size
        layers = LayerEmbeddings(vocab_size, config.dim, config.n_layers, config.layer_dim, config.norm_eps)
        embedding = LayeredEmbedding(config.vocab_size, config.dim, config.dim**0.5, layers)
    return llama.assemble(
        config, partial(_attention, config), partial(_feedforward, config), block=partial(_block, config),
        norm=FullPrecisionRMSNorm, n_norms=4, embedding=embedding,
        model=CappedGemma4LM if config.logit_cap else Gemma4LM,
    )  # fmt: skip


def _attention(config: Config, layer: int) -> nn.Module:
    window: int | None = config.sliding_window
    head_dim, n_kv_heads = config.head_dim, config.n_kv_heads
    theta, scaling, share = config.local_rope_theta, config.local_rope_scaling, config.local_turning
    full = layer in global_layers(config)
    if full:
        window, head_dim, n_kv_heads = None, config.global_head_dim, config.global_kv_heads or n_kv_heads
        theta, scaling, share = config.rope_theta, config.rope_scaling, config.turning
    rotary = Rotary(head_dim, theta, scaling)
    if share is not None:
        rotary = ProportionalRotary(head_dim, theta, scaling, share)
    norm = partial(FullPrecisionRMSNorm, head_dim, config.norm_eps)
    bias, dropout = config.attention_bias, config.dropout
    if layer >= config.n_layers - config.n_shared_layers:
        return SharedKeysAttention(config.dim, config.n_heads, head_dim, bias, rotary, window, norm(), dropout)
    attention = NormedValues(
        config.dim, config.n_heads, n_kv_heads, head_dim, bias, window=window, dropout=dropout, scale=1.0,
        rotary=rotary, qk_norm=(norm(), norm()), v_norm=PlainRMSNorm(head_dim, config.norm_eps),
    )  # fmt: skip
    if full and config.keys_as_values:
        attention.qkv = KeysAsValues(config.dim, config.n_heads * head_dim, n_kv_heads * head_dim, bias)
    return attention


def _feedforward(config: Config, layer: int) -> nn.Module:
    wide = config.wide_shared and layer >= config.n_layers - config.n_shared_layers
    return llama.gated_network(config, config.hidden_dim * (2 if wide else 1))


def _block(config: Config, *layers: Any) -> Gemma4Block:
    norm = partial(FullPrecisionRMSNorm, config.dim, config.norm_eps)
    branches = gate = None
    if config.n_experts:
        router = ScaledRouter(config.dim, config.n_experts, config.n_experts_per_token, config.norm_eps)
        experts = [llama.gated_network(config, config.expert_dim) for _ in range(config.n_experts)]
        branches = Branches(NormedExperts(router, experts, norm()), norm(), norm())
    if config.layer_dim:
        gate = LayerGate(config.dim, config.layer_dim, activation(config.activation), norm())
    return Gemma4Block(*layers, branches=branches, gate=gate)


_LAYER, _MIXTURE = "model.layers.*", "blocks.*.branches"
WEIGHT_NAMES = gemma3.WEIGHT_NAMES | {
    "blocks.*.attention.qkv.matrix": f"{_LAYER}.self_attn.[q,k]_proj",
    "blocks.*.attention.q": f"{_LAYER}.self_attn.q_proj",
    "blocks.*.scale": f"{_LAYER}.layer_scalar",
    "blocks.*.gate.gate": f"{_LAYER}.per_layer_input_gate",
    "blocks.*.gate.projection": f"{_LAYER}.per_layer_projection",
    "blocks.*.gate.norm": f"{_LAYER}.post_per_layer_input_norm",
    f"{_MIXTURE}.mixture.router.gate": f"{_LAYER}.router.proj",
    f"{_MIXTURE}.mixture.router.scale": f"{_LAYER}.router.scale",
    f"{_MIXTURE}.mixture.router.expert_scale": f"{_LAYER}.router.per_expert_scale",
    f"{_MIXTURE}.mixture.experts.*.gate_up": f"{_LAYER}.experts.*.[gate,up]_rows",
    f"{_MIXTURE}.mixture.experts.*.down": f"{_LAYER}.experts.*.down_rows",
    f"{_MIXTURE}.mixture.norm": f"{_LAYER}.pre_feedforward_layernorm_2",
    f"{_MIXTURE}.dense_norm": f"{_LAYER}.post_feedforward_layernorm_1",
    f"{_MIXTURE}.mixture_norm": f"{_LAYER}.post_feedforward_layernorm_2",
    "embedding.layers.embedding": "model.embed_tokens_per_layer",
    "embedding.layers.projection": "model.per_layer_model_projection",
    "embedding.layers.norm": "model.per_layer_projection_norm",
}
NOT_WEIGHTS = tuple(f"{_LAYER}.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm"))  # of sharing layers
MODEL_TYPES = {"gemma4_text": "Gemma4ForCausalLM"}
_ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _read_layers(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read the layers with full attention. transformers gives full attention to the last layer in any case."""
    n_layers = hf.check_layers(json, "num_hidden_layers")
    types = hf.read_layer_types(json) or hf.layer_types(n_layers, range(5, n_layers, 6))
    full = {layer for layer, kind in enumerate(types) if kind == "full_attention"} | {n_layers - 1}
    layers = tuple(sorted(full))
    return {"global_layers": None if layers == tuple(sorted({*range(5, n_layers, 6), n_layers - 1})) else layers}


def _write_layers(config: Config) -> dict[str, Any]:
    return {"layer_types": hf.layer_types(config.n_layers, global_layers(config))}


def _read_global_heads(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read the heads of global layers, from their own fields or from transformers' list of layers that differ."""
    n_kv_heads, same = json.get("num_key_value_heads", 4), json.get("attention_k_eq_v", False)
    own = {"head_dim": json.get("global_head_dim", 512)}
    if same and json.get("num_global_key_value_heads") is not None:
        own["num_key_value_heads"] = json["num_global_key_value_heads"]
    if (listed := json.get("per_layer_config")) is not None:
        config = {"n_layers": json["num_hidden_layers"], "global_layers": _read_layers(json)["global_layers"]}
        full = global_layers(Config(**config))
        listed = {str(layer).lstrip("0") or "0": fields for layer, fields in listed.items()}  # transformers: "05"
        lists = [listed.get(str(layer), {}) for layer in full]
        others = {*listed} - {*map(str, full)}
        if others or any(each != lists[0] for each in lists) or {*lists[0]} - {"head_dim", "num_key_value_heads"}:
            raise UserError(
                "its per_layer_config must give all layers with full attention the same head_dim and "
                "num_key_value_heads, and other layers nothing."
            )
        own = {"head_dim": json.get("head_dim", 256), **lists[0]}
    heads = own.get("num_key_value_heads")
    return {
        "keys_as_values": same,
        "global_head_dim": own["head_dim"],
        "global_kv_heads": None if heads == n_kv_heads else heads,
    }


def _write_global_heads(config: Config) -> dict[str, Any]:
    """Return the fields of the heads of global layers. transformers reads the number of their keys only if these are
    values too; otherwise it is in the list of layers."""
    own = {"head_dim": config.global_head_dim}
    if config.global_kv_heads is not None:
        own["num_key_value_heads"] = config.global_kv_heads
    listed = {"per_layer_config": {str(layer): own for layer in global_layers(config)}}
    return {
        "attention_k_eq_v": config.keys_as_values,
        "global_head_dim": config.global_head_dim,
        "num_global_key_value_heads": config.global_kv_heads,
    } | ({} if config.keys_as_values or config.global_kv_heads is None else listed)


def _read_ropes(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read base, scaling and share of turning pairs, for global and for local layers."""
    ropes = json.get("rope_parameters") or _ROPES
    if {*ropes} - {*_ROPES}:
        raise UserError(f"its rope_parameters must be of full_attention and sliding_attention, not of {[*ropes]}.")
    values: dict[str, Any] = {}
    for kind, prefix, share in (("full_attention", "", "turning"), ("sliding_attention", "local_", "local_turning")):
        rope = ropes.get(kind) or _ROPES[kind]
        values[share] = None
        if rope.get("rope_type") == "proportional":
            values[share] = float(rope.get("partial_rotary_factor", 1.0))
            linear = {"rope_type": "linear", "factor": rope.get("factor", 1.0)}
            rope = {"rope_theta": rope["rope_theta"]} | (linear if linear["factor"] != 1.0 else {})
        context = {"max_position_embeddings": json.get("max_position_embeddings", 131_072), "rope_parameters": rope}
        values |= {f"{prefix}{name}": value for name, value in hf.read_rope(context).items()}
    return values


def _write_ropes(config: Config) -> dict[str, Any]:
    full = _write_rope(config.rope_theta, config.rope_scaling, config.turning)
    local = _write_rope(config.local_rope_theta, config.local_rope_scaling, config.local_turning)
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _write_rope(theta: float, scaling: RopeScaling | None, share: float | None) -> dict[str, Any]:
    rope = hf.write_rope(theta, scaling)["rope_parameters"]
    return rope if share is None else {**rope, "rope_type": "proportional", "partial_rotary_factor": share}


def _read_experts(json: Mapping[str, Any]) -> dict[str, Any]:
    if not json.get("enable_moe_block", False):
        return {"n_experts": None}
    names = {"n_experts": "num_experts", "n_experts_per_token": "top_k_experts", "expert_dim": "moe_intermediate_size"}
    return {ours: json[theirs] for ours, theirs in names.items()}


def _write_experts(config: Config) -> dict[str, Any]:
    if not config.n_experts:
        return {"enable_moe_block": False}
    sizes = {"num_experts": config.n_experts, "top_k_experts": config.n_experts_per_token}
    return {"enable_moe_block": True, **sizes, "moe_intermediate_size": config.expert_dim}


def _read_direction(json: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse attention to later tokens. "vision" is no setting of texts: it lets the tokens of a picture see each
    other."""
    if (direction := json.get("use_bidirectional_attention")) not in (None, "vision"):
        raise UserError(f"its use_bidirectional_attention is {direction!r}, and only causal attention is implemented.")
    return {}


FIELDS: hf.Fields = llama.BIAS_FIELDS | {
    "vocab_size": hf.Field("vocab_size", 262_144),
    "context_length": hf.Field("max_position_embeddings", 131_072),
    "n_kv_heads": hf.Field("num_key_value_heads", 4),
    "head_dim": hf.Field("head_dim", 256),
    "activation": hf.activation_field("hidden_activation", "gelu_pytorch_tanh"),
    "sliding_window": hf.Field("sliding_window", 512),
    "tied": hf.Field("tie_word_embeddings", True),
    "logit_cap": hf.Field("final_logit_softcapping", None, if_none=hf.null),
    "layer_dim": hf.Field("hidden_size_per_layer_input", 256, int),
    "layer_vocab_size": hf.Field("vocab_size_per_layer_input", 262_144, if_none=lambda config: config.vocab_size),
    "n_shared_layers": hf.Field("num_kv_shared_layers", 0),
    "wide_shared": hf.Field("use_double_wide_mlp", False),
    "layers": hf.FieldGroup(_read_layers, _write_layers),
    "global_heads": hf.FieldGroup(_read_global_heads, _write_global_heads),
    "rope": hf.FieldGroup(_read_ropes, _write_ropes),
    "experts": hf.FieldGroup(_read_experts, _write_experts),
    "direction": hf.FieldGroup(_read_direction, lambda config: {}),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

REFUSED = {"native": "Gemma4", "tensor": "Gemma4", "gguf": "keifu writes no GGUF of it"}
