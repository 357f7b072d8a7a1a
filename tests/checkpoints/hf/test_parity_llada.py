"""LLaDA's files give the logits of its released code, written here again from its description, and back."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.errors import UserError
from keifu.models.diffusion import llada

PUBLISHED = {  # of LLaDA-8B-Base
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
    "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
SMALL = {
    "d_model": 24, "embedding_size": 98, "vocab_size": 97, "mask_token_id": 96, "mlp_hidden_size": 42, "n_heads": 4,
    "n_kv_heads": 2, "n_layers": 3, "max_sequence_length": 64, "rms_norm_eps": 0.01,
}  # fmt: skip
EPS, HEADS, KV_HEADS, HEAD_DIM = 0.01, 4, 2, 6


def file_of(folder: Path, **changes: object) -> dict[str, Tensor]:
    """Write a folder of LLaDA's with random weights, and return them."""
    torch.manual_seed(0)
    sizes = {"q_proj": (24, 24), "k_proj": (12, 24), "v_proj": (12, 24), "attn_out": (24, 24), "ff_proj": (42, 24),
             "up_proj": (42, 24), "ff_out": (24, 42), "attn_norm": (24,), "ff_norm": (24,)}  # fmt: skip
    shapes = {f"blocks.{n}.{name}": shape for n in range(3) for name, shape in sizes.items()}
    shapes |= {"wte": (98, 24), "ln_f": (24,), "ff_out": (98, 24)}
    weights = {f"model.transformer.{name}.weight": torch.randn(shape) / 3 for name, shape in shapes.items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **SMALL, **changes}))
    return weights


def reference(weights: dict[str, Tensor], tokens: Tensor, theta: float = 500_000.0) -> Tensor:
    """Return the logits of pre-norm blocks with rotated halves, grouped heads and SwiGLU, where all tokens see all."""

    def w(name: str) -> Tensor:
        return weights[f"model.transformer.{name}.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w(name)

    def turned(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] / theta ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.cat([angles, angles], -1)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    x = w("wte")[tokens]
    for n in range(3):
        y = norm(x, f"blocks.{n}.attn_norm")
        q, k, v = ((y @ w(f"blocks.{n}.{part}_proj").T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in "qkv")
        q, k = turned(q), turned(k)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
        mixed = (q @ k.mT / HEAD_DIM**0.5).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ w(f"blocks.{n}.attn_out").T
        y = norm(x, f"blocks.{n}.ff_norm")
        y = F.silu(y @ w(f"blocks.{n}.ff_proj").T) * (y @ w(f"blocks.{n}.up_proj").T)
        x = x + y @ w(f"blocks.{n}.ff_out").T
    return norm(x, "ln_f") @ w("ff_out").T


@torch.no_grad()
def test_logits_and_files_both_ways(tmp_path: Path) -> None:
    weights = file_of(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    tokens = torch.randint(0, 97, (2, 31))
    expected = reference(weights, tokens)
    assert expected.std() > 0.1
    assert (model(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    changed = tokens.clone()
    changed[:, -1] = 96
    assert not torch.allclose(model(changed)[:, 0], expected[:, 0], atol=1e-3)  # the first token sees the last
    assert model.predict_masked(tokens)[..., 96].eq(-torch.inf).all()
    checkpoints.save(model, None, tmp_path / "ours")
    saved = load_file(tmp_path / "ours/model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["model_type"] == "llada" and written["architectures"] == ["LLaDAModelLM"]
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


def test_the_published_config_is_the_size_of_that_name() -> None:
    family, config = read_config(PUBLISHED, "config.json")
    assert family.model_type == "llada" and describe(config) == describe(llada.SIZES["llada-8b"])
    ours = describe(config)[1]
    assert all(PUBLISHED[name] == value or PUBLISHED[name] is None for name, value in ours.items())
    assert read_config({**PUBLISHED, "mlp_hidden_size": None}, "config.json")[1].hidden_dim == 4 * 4096


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block_type": "sequential"}, "sets block_type to 'sequential', which keifu does not implement"),
        ({"include_qkv_bias": True}, "sets include_qkv_bias to True"),
        ({"mask_token_id": 126464}, "mask_token is 126464, which must be below vocab_size"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_config({**PUBLISHED, **changes}, "config.json")
