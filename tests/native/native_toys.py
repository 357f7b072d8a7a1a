"""A toy of every kind of model that native code knows, with odd shapes, and what its packed weights stand for."""

import platform
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from model_entries import ENTRIES
from quick import quick
from torch import nn

from keifu.layers.attention.positions import RopeScaling
from keifu.layers.mixture import mixtures
from keifu.models import gemma3, gpt1, gpt2, gpt3, llama, olmo2, palm, qwen3
from keifu.models.mixture import gpt_oss, mixtral, olmoe, qwen3_moe
from keifu.models.variants import exaone4, glm4, ministral, phi3, smollm3
from keifu.native.library import INSTRUCTIONS
from keifu.native.model import NativeLM

ARM = platform.machine() in ("aarch64", "arm64")
OF_THIS_MACHINE = [name for name in INSTRUCTIONS if name == "portable" or name.startswith("neon") == ARM]
SMALL = {"vocab_size": 101, "context_length": 80, "dim": 60, "hidden_dim": 88, "n_layers": 3}
GROUPED = {**SMALL, "n_heads": 6, "n_kv_heads": 2}
YARN = RopeScaling("yarn", 4.0, 20)
LLAMA3 = RopeScaling("llama3", 8.0, 32)

TOYS = {
    "llama": lambda: llama.build(llama.Config(**GROUPED)),
    "llama of one head": lambda: llama.build(llama.Config(**SMALL, n_heads=1, tied=True)),
    "mistral": lambda: llama.build(llama.Config(**GROUPED, sliding_window=7)),
    "qwen2": lambda: llama.build(llama.Config(**GROUPED, qkv_bias=True, tied=True, rope_theta=1e6)),
    "llama with biases": lambda: llama.build(
        llama.Config(**GROUPED, qkv_bias=True, out_bias=True, feedforward_bias=True, activation="gelu")
    ),
    "llama 3": lambda: llama.build(llama.Config(**GROUPED, rope_scaling=LLAMA3, head_dim=24)),
    "yarn": lambda: llama.build(llama.Config(**GROUPED, rope_scaling=YARN)),
    "qwen3": lambda: qwen3.build(qwen3.Config(**GROUPED, head_dim=16)),
    "gemma3": lambda: gemma3.build(
        gemma3.Config(
            **{**GROUPED, "n_heads": 3, "n_kv_heads": 1},
            head_dim=22,
            sliding_window=9,
            global_layers=(1,),
            attention_scale=0.3,
            tied=False,
        )
    ),
    "gemma3 of windows": lambda: gemma3.build(gemma3.Config(**GROUPED, head_dim=16, sliding_window=9, tied=True)),
    "smollm3": lambda: smollm3.build(smollm3.Config(**GROUPED, position_free=(1,))),
    "phi3": lambda: phi3.build(phi3.Config(**GROUPED, sliding_window=7)),
    "exaone4": lambda: exaone4.build(
        exaone4.Config(**GROUPED, head_dim=16, sliding_window=9, global_layers=(1,), rope_scaling=LLAMA3)
    ),
    "glm4": lambda: glm4.build(glm4.Config(**GROUPED, head_dim=16, rope_dim=6)),
    "ministral": lambda: ministral.build(
        ministral.Config(**GROUPED, head_dim=16, sliding_window=9, global_layers=(1,))
    ),
    "olmo2": lambda: olmo2.build(olmo2.Config(**GROUPED)),
    "mixtral": lambda: mixtral.build(mixtral.Config(**GROUPED, n_experts=5)),
    "mixtral of one expert each": lambda: mixtral.build(
        mixtral.Config(**GROUPED, n_experts=5, n_experts_per_token=1, sliding_window=7)
    ),
    "mixtral of all experts": lambda: mixtral.build(mixtral.Config(**GROUPED, n_experts=3, n_experts_per_token=3)),
    "qwen3-moe": lambda: qwen3_moe.build(
        qwen3_moe.Config(**GROUPED, head_dim=16, expert_dim=20, n_experts=17, n_experts_per_token=4, dense_layers=(1,))
    ),
    "olmoe": lambda: olmoe.build(olmoe.Config(**SMALL, n_heads=6, n_experts=7, n_experts_per_token=3)),
    "gpt-oss": lambda: gpt_oss.build(
        gpt_oss.Config(**GROUPED, head_dim=12, n_experts=5, n_experts_per_token=2, sliding_window=9, gate_limit=1.5)
    ),
    "gpt1": lambda: gpt1.build(gpt1.Config(**SMALL, n_heads=5)),
    "gpt2": lambda: gpt2.build(gpt2.Config(**SMALL, n_heads=5)),
    "gpt2 without biases": lambda: gpt2.build(gpt2.Config(**SMALL, n_heads=5, bias=False, tied=False)),
    "gpt3": lambda: gpt3.build(gpt3.Config(**SMALL, n_heads=4, band=6)),
    "gpt-neo": lambda: gpt3.build(
        gpt3.Config(**SMALL, n_heads=4, band=6, scaled_attention=False, qkv_bias=False, activation="relu")
    ),
    "palm": lambda: palm.build(palm.Config(**SMALL, n_heads=4, n_kv_heads=1, head_dim=14)),
    "cohere": lambda: palm.build(
        palm.Config(**SMALL, n_heads=4, n_kv_heads=4, head_dim=None if SMALL["dim"] % 8 == 0 else 16, tied=False)
    ),
}
SPECIAL = {type(make().config) for make in TOYS.values()}
TOYS |= {
    name: partial(entry.build, vocab_size=SMALL["vocab_size"], context_length=SMALL["context_length"])
    for name, entry in ENTRIES.items()
    if "native" not in entry.row.refused and type(entry.toy) not in SPECIAL
}


def everywhere(kinds: Iterable[str], few: Iterable[str], weights: Iterable[str]) -> list[Any]:
    """Return instructions, kinds and weights, most of which are marked slow. Each kind runs with the instructions that
    every machine has, and each weights with each instructions."""
    every, *others = OF_THIS_MACHINE
    rest = [kind for kind in kinds if kind not in few]
    chosen = quick(product([every], kinds, weights), (1,), (2,)) + quick(product(others, few, weights), (0, 2), (1,))
    return chosen + [pytest.param(*case, marks=pytest.mark.slow) for case in product(others, rest, weights)]


def toy(kind: str, embedding_std: float = 1.0) -> nn.Module:
    """Return the model with weights so large that each layer counts.

    With a tied head and the usual embeddings, the most likely token is always the last one; with 0.3 it is not.
    """
    torch.manual_seed(1)
    model = TOYS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, embedding_std if "embedding" in name else parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for mixture in mixtures(model).values():
            decide(mixture.router, model.get_submodule("embedding").weight)
    return model


def decide(router: nn.Module, embedding: torch.Tensor) -> None:
    """Let a token's embedding say which experts it chooses, so clearly that rounding cannot change it."""
    tokens, n = torch.arange(len(embedding))[:, None], router.n_experts
    chosen = (tokens + 2 * torch.arange(router.k)) % n
    embedding[:, :n] = torch.full((len(embedding), n), -4.0).scatter(1, chosen, 4.0)
    router.gate.weight.copy_(torch.eye(n, embedding.shape[1]))


def unpacked(model: nn.Module, packed: NativeLM) -> nn.Module:
    """Return the model in float32 with the numbers that the packed weights represent."""
    model = deepcopy(model).float()
    state = model.state_dict()
    for (name, first), matrix in packed.packer.matrices.items():
        rows = torch.empty(matrix.rows, matrix.columns)
        packed.library.call(
            "unpack", matrix.format, matrix.data, matrix.rows, matrix.columns, 0, matrix.rows, rows.data_ptr()
        )
        state[name][first : first + matrix.rows] = rows
    return model
