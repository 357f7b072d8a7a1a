"""A model with a layer that tensor parallelism does not know is refused in one sentence, before anything is split."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from keifu.distributed.mesh import Mesh
from keifu.distributed.pod import parallelize
from keifu.distributed.tensor import stacks_of, tensor_parallel
from keifu.errors import UserError
from keifu.layers.attention.attention import Attention
from keifu.layers.feedforward import GatedFeedForward
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, seq2seq, transformer
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.diffusion import ddpm
from keifu.training.hardware.recompute import blocks_of


class Router(nn.Module):
    """A mixture of two known feed-forward networks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(GatedFeedForward(16, 24, F.silu) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((expert(x) for expert in self.experts), start=torch.zeros(()))


class Wrapped(nn.Module):
    """A block of an unknown class around a known one."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


def block(feedforward: nn.Module | None = None, wide_norm: bool = False) -> PreNorm:
    attention = Attention(16, 4, qk_norm=(RMSNorm(4), RMSNorm(16 if wide_norm else 4)))
    return PreNorm(attention, feedforward or GatedFeedForward(16, 24, F.silu), (RMSNorm(16), RMSNorm(16)))


def decoder(*blocks: nn.Module) -> DecoderLM:
    return DecoderLM(nn.Embedding(31, 16), blocks, RMSNorm(16))


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ([block(), block(Router())], "blocks.1.feedforward is a Router, which tensor parallelism cannot split: leave"),
        ([block(), Wrapped(block())], "blocks.1 is a Wrapped, which tensor parallelism cannot split"),
        ([Wrapped(block())], "blocks.0 is a Wrapped, which"),
        ([block(wide_norm=True)], "blocks.0.attention.k_norm is a RMSNorm over all heads, which"),
        ([nn.Linear(16, 16)], "no Transformer block to split"),
    ],
    ids=["nested in", "around", "around all", "norm over all heads", "none"],
)  # fmt: skip
def test_an_unknown_layer_is_refused_before_anything_is_split(blocks: list[nn.Module], sentence: str) -> None:
    model = nn.ModuleDict({"body": decoder(*blocks)})
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=sentence):
        tensor_parallel(model, Mock(spec=DeviceMesh))
    assert before == {name: p.shape for name, p in model.named_parameters()}


WORDS = {"vocab_size": 31, "context_length": 16, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
TOWERS = clip_text.Config(31, 8, 16, 24, 3, 4, end_id=30, embedding_dim=8)
PICTURES = clip_image.Config(12, 4, 3, 16, 24, 2, 4, embedding_dim=8)


@pytest.mark.parametrize(
    ("model", "blocks", "stacks"),
    [
        (llama.build(llama.Config(**WORDS)), 2, [2]),
        (transformer.build(transformer.Config(**WORDS)), 4, [2, 2]),
        (clip.build(clip.Config(TOWERS, PICTURES)), 5, [2, 3]),
        (ddpm.build(ddpm.Config(size=8, channels=1, dim=16, n_residual_blocks=1, multipliers=(1, 2), norm_groups=4)),
         12, []),
    ],
    ids=["llama", "transformer", "clip", "ddpm"],
)  # fmt: skip
def test_the_blocks_are_the_ones_that_the_model_lists(model: nn.Module, blocks: int, stacks: list[int]) -> None:
    assert len(blocks_of(nn.ModuleList([model]))) == blocks
    names = {module: name for name, module in model.named_modules()}
    assert sorted(map(len, stacks_of(model, names))) == stacks


def test_a_model_without_blocks_cannot_compile_or_checkpoint_them() -> None:
    model = seq2seq.build(seq2seq.Config(31, dim=8, embedding_dim=8, attention_dim=8, maxout_dim=8))
    with pytest.raises(UserError, match="--mesh.activation-checkpointing acts on blocks, and this model lists none"):
        parallelize(model, Mesh(activation_checkpointing=True), None)
