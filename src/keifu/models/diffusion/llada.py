"""LLaDA (Nie et al., 2025, "Large Language Diffusion Models"): text by masked diffusion. LLaMA's blocks without the
causal mask predict all masked tokens at once. The paper shows that this scales like a language model. Training masks
any share of the tokens (as in MDLM, Sahoo et al., 2024), so that a text can be generated from masks alone, in any
order.

Axes: batch, length = tokens, dim, vocab.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.positions import Positions
from keifu.layers.dropout import Dropout
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.ranges import Count, Natural, NotNegative, Positive

Tokens = Int[Tensor, "batch length"]


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The defaults are LLaDA-8B. mask_token: the id that hides a token."""

    vocab_size: Count = 126_464  # tokens in the vocabulary
    context_length: Count = 4096  # longest sequence in tokens
    dim: Count = 4096  # width of the hidden states
    hidden_dim: Count = 12_288  # width inside the feed-forward layers
    n_layers: Count = 32  # Transformer blocks
    n_heads: Count = 32  # attention heads
    n_kv_heads: Count | None = None  # key and value heads; None: as many as n_heads
    norm_eps: NotNegative = field(default=1e-5, kw_only=True)  # number ε in the normalisation
    rope_theta: Positive = field(default=500_000.0, kw_only=True)  # base of the rotary frequencies
    mask_token: Natural = 126_336  # id of the token that hides another

    def __post_init__(self) -> None:
        if self.mask_token >= self.vocab_size:
            raise UserError(f"mask_token is {self.mask_token}, which must be below vocab_size ({self.vocab_size}).")


SIZES = {"llada-8b": Config()}


class MaskedDiffusionLM(nn.Module):
    """Embedding, bidirectional blocks, norm and head. `config` has the mask token."""

    def __init__(self, decoder: DecoderLM):
        super().__init__()
        self.config, self.embedding, self.dropout = decoder.config, decoder.embedding, Dropout(decoder.config.dropout)
        self.blocks, self.norm, self.head = decoder.blocks, decoder.norm, decoder.head

    def hidden(self, tokens: Tokens) -> Float[Tensor, "batch length dim"]:
        """Return the hidden states after the final norm. Each token sees all others."""
        x = self.dropout(self.embedding(tokens))
        positions = Positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, mask=None, positions=positions, cache=None)
        return self.norm(x)

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch length vocab"]:
        """Return the logits of the token at each position, including the mask token's."""
        return nn.functional.linear(self.hidden(tokens), self.head_weight)

    def predict_masked(self, tokens: Tokens) -> Float[Tensor, "batch length vocab"]:
        """Return the logits of the masked tokens, in float32. The mask token has the logit -inf."""
        return self(tokens).float().index_fill_(-1, tokens.new_tensor([self.config.mask_token]), -torch.inf)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix of the head, for losses that do not need all logits at once."""
        return self.embedding.weight if self.head is None else self.head.weight


def build(config: Config) -> MaskedDiffusionLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return MaskedDiffusionLM(llama.assemble(config, lambda layer: llama.attention(config)))


_BLOCK = "model.transformer.blocks.*"
WEIGHT_NAMES = {
    "embedding": "model.transformer.wte",
    "blocks.*.attention_norm": f"{_BLOCK}.attn_norm",
    "blocks.*.attention.qkv": f"{_BLOCK}.[q,k,v]_proj",
    "blocks.*.attention.out": f"{_BLOCK}.attn_out",
    "blocks.*.feedforward_norm": f"{_BLOCK}.ff_norm",
    "blocks.*.feedforward.gate_up": f"{_BLOCK}.[ff,up]_proj",
    "blocks.*.feedforward.down": f"{_BLOCK}.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}
MODEL_TYPES = {"llada": "LLaDAModelLM"}
UNSUPPORTED = {
    "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "rope": True, "alibi": False, "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False,
    "bias_for_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "multi_query_attention": False,
}  # fmt: skip
FIELDS: hf.Fields = {
    "vocab_size": hf.Field("embedding_size", lambda json: json["vocab_size"], also=("vocab_size",)),
    "context_length": "max_sequence_length",
    "dim": "d_model",
    "hidden_dim": hf.Field("mlp_hidden_size", lambda json: json["mlp_ratio"] * json["d_model"]),
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": hf.Field("n_kv_heads", None, if_none=lambda config: config.n_heads),
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
    "rope_theta": hf.Field("rope_theta", 10_000.0, float),
    "activation": hf.activation_field("activation_type", "silu"),
    "tied": hf.Field("weight_tying", False),
    "dropout": hf.Field("attention_dropout", 0.0, hf.rate, also=("residual_dropout", "embedding_dropout")),
    "mask_token": "mask_token_id",
    "unsupported": hf.constants(**UNSUPPORTED, rope_full_precision=True, use_cache=False),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)
