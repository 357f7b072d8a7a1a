"""A toy of every kind of causal model, for the tests of text."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from keifu.layers.attention.positions import RopeScaling
from keifu.models import gemma3, gpt1, gpt2, gpt3, llama, olmo2, palm, qwen3
from keifu.models.hybrid import qwen3_next
from keifu.models.mixture import deepseek_v3, gpt_oss, mixtral
from keifu.models.variants import phi3

SIZE: dict[str, Any] = {"vocab_size": 261, "context_length": 67, "dim": 20, "hidden_dim": 36, "n_layers": 2}
LLAMA = {**SIZE, "n_heads": 4, "head_dim": 6}
TOYS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: gpt2.build(gpt2.Config(**SIZE, n_heads=5, dropout=0.3)),
    "gpt1": lambda: gpt1.build(gpt1.Config(**SIZE, n_heads=5)),
    "gpt3": lambda: gpt3.build(gpt3.Config(**SIZE, n_heads=5, band=6)),
    "palm": lambda: palm.build(palm.Config(**LLAMA | {"n_layers": 3})),
    "grouped": lambda: llama.build(llama.Config(**LLAMA, n_kv_heads=2)),
    "norms of queries and keys": lambda: qwen3.build(qwen3.Config(**LLAMA, n_kv_heads=2)),
    "norms after sublayers and of all heads": lambda: olmo2.build(
        olmo2.Config(**SIZE | {"dim": 24}, n_heads=4, n_kv_heads=2)
    ),
    "mixture of experts": lambda: mixtral.build(mixtral.Config(**LLAMA, n_kv_heads=2, n_experts=5)),
    "latent attention and shared experts": lambda: deepseek_v3.build(
        deepseek_v3.Config(
            **SIZE,
            expert_dim=12,
            n_dense_layers=1,
            n_heads=4,
            head_dim=6,
            rope_dim=4,
            value_dim=5,
            q_rank=8,
            kv_rank=7,
            n_experts=6,
            n_experts_per_token=2,
            n_groups=3,
            n_groups_per_token=2,
            rope_scaling=None,
        )
    ),
    "states of fixed size": lambda: qwen3_next.build(
        qwen3_next.Config(
            **LLAMA | {"head_dim": 8},
            n_kv_heads=2,
            rope_dim=4,
            n_linear_key_heads=2,
            n_linear_value_heads=4,
            linear_key_dim=6,
            linear_value_dim=8,
            expert_dim=12,
            shared_dim=10,
            n_experts=4,
            n_experts_per_token=2,
            global_layers=(1,),
            norm_eps=0.01,  # the outputs of toys are so small that a smaller one makes noise of them
        )
    ),
    "sinks and windows": lambda: gpt_oss.build(
        gpt_oss.Config(**LLAMA, n_kv_heads=2, n_experts=4, n_experts_per_token=2, sliding_window=5)
    ),
    "windows and global layers": lambda: gemma3.build(
        gemma3.Config(**LLAMA, n_kv_heads=2, sliding_window=5, global_layers=(1,))
    ),
    "angles by length": lambda: phi3.build(
        phi3.Config(
            **SIZE | {"dim": 24},
            n_heads=3,
            n_kv_heads=1,
            rope_dim=6,
            sliding_window=None,
            rope_scaling=RopeScaling(
                "longrope", 4.0, 16, short_divisors=(1.0, 1.1, 1.2), long_divisors=(2.0, 3.0, 4.0)
            ),
        )
    ),
    "window": lambda: llama.build(llama.Config(**LLAMA, n_kv_heads=2, sliding_window=5)),
    "late window": lambda: llama.build(
        llama.Config(**LLAMA, n_kv_heads=1, sliding_window=4, first_window_layer=1, qkv_bias=True, tied=True)
    ),
}
OF_ONE_CACHE = {  # toys whose keys and values are cached as another toy's are: in most tests they are slow
    "gpt1", "palm", "norms of queries and keys", "norms after sublayers and of all heads", "mixture of experts",
    "window",
}  # fmt: skip
TWO = ("gpt2", "windows and global layers")
of_two_models = pytest.mark.parametrize(  # for tests where the model hardly matters: the others are marked slow
    "model",
    [pytest.param(name, marks=[] if name in TWO else [pytest.mark.slow]) for name in TOYS],
    indirect=True,
)
KINDS_OF_MEMORY = {
    "grouped", "latent attention and shared experts", "states of fixed size", "windows and global layers",
}  # fmt: skip
of_kinds_of_memory = pytest.mark.parametrize(  # for tests of what is kept of a text: the others are marked slow
    "model",
    [pytest.param(name, marks=[] if name in KINDS_OF_MEMORY else [pytest.mark.slow]) for name in TOYS],
    indirect=True,
)
