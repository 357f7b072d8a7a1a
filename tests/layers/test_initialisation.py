"""How weights are drawn: the deviation of each matrix, smaller where it writes to the residual stream."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from keifu.layers.attention.attention import Attention
from keifu.layers.initialisation import scale_residual_
from keifu.layers.transformer.blocks import PreNorm
from keifu.models import bert, gpt1, gpt2, gpt3, llama, palm, transformer
from keifu.models.unclip import prior as unclip_prior

SIZE: dict[str, Any] = {"vocab_size": 700, "context_length": 64, "dim": 96, "n_layers": 6, "n_heads": 4}
SIZE["hidden_dim"] = 256
SCALED = {"gpt2": gpt2, "gpt3": gpt3, "llama": llama}
WRITERS = ("attention.out.weight", "feedforward.down.weight")


def check_deviation(weight: torch.Tensor, wanted: float) -> None:
    """Check that the deviation of these normal numbers is within six of its own deviations."""
    count = weight.numel()
    assert float(weight.mean()) == pytest.approx(0, abs=6 * wanted / math.sqrt(count))
    assert float(weight.std()) == pytest.approx(wanted, rel=6 / math.sqrt(2 * count))


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}


@pytest.mark.parametrize("name", SCALED)
def test_what_writes_to_the_residual_stream_begins_smaller(name: str) -> None:
    """By √(2 n_layers), GPT-2's section 2.3; everything else from N(0, 0.02²), places from N(0, 0.01²)."""
    module = SCALED[name]
    found = matrices(module.build(module.Config(**SIZE)))
    writers = {key for key in found if key.endswith(WRITERS)}
    assert len(writers) == 12
    for key, weight in found.items():
        usual = 0.01 if "position" in key else 0.02
        check_deviation(weight, 0.02 / math.sqrt(12) if key in writers else usual)


def test_the_prior_of_unclip_begins_so_too() -> None:
    config = unclip_prior.Config(8, 32, n_layers=3, n_heads=4, head_dim=16)
    found = matrices(unclip_prior.build(config))
    writers = {key for key in found if key.endswith(WRITERS)}
    assert len(writers) == 6
    for key in writers:
        check_deviation(found[key], 0.02 / math.sqrt(6))


def test_gpt1_and_bert_have_one_deviation() -> None:
    for weight in matrices(gpt1.build(gpt1.Config(**SIZE))).values():
        check_deviation(weight, 0.02)
    for name, weight in matrices(bert.build(bert.Config(**SIZE))).items():
        assert float(weight.abs().max()) <= 0.04, name
        cut = math.sqrt(1 - 2 * 2 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
        check_deviation(weight, 0.02 * cut)  # of a normal distribution cut off at two deviations


def test_palm_keeps_the_size_of_what_it_reads() -> None:
    """Kernels from N(0, 1 / inputs), embeddings from N(0, 1) (PaLM, section 2)."""
    for name, weight in matrices(palm.build(palm.Config(**SIZE, head_dim=24))).items():
        check_deviation(weight, 1.0 if "embed" in name or "tokens" in name else weight.shape[1] ** -0.5)


def test_the_transformers_parts_of_a_joined_matrix_are_glorots_each() -> None:
    model = transformer.build(transformer.Config(**SIZE | {"n_layers": 2}))
    joined = [m for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "parts")]
    assert joined
    for module in joined:
        for part in module.weight.detach().split(list(module.parts)):
            bound = math.sqrt(6 / sum(part.shape))
            assert 0.97 * bound < float(part.abs().max()) <= bound
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            check_deviation(module.weight.detach(), 96**-0.5)


class Experts(nn.Module):
    """A feed-forward network with two matrices that write to the residual stream, under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    @property
    def residual_weights(self) -> list[torch.Tensor]:
        return [self.one.weight, self.two.weight]


def test_a_block_lists_the_matrices_that_are_scaled() -> None:
    """By no name of theirs; a layer that lists none is an error, not a layer that is left out."""
    norms = (nn.LayerNorm(8), nn.LayerNorm(8))
    blocks = [PreNorm(Attention(8, 2), Experts(), norms) for _ in range(2)]
    listed = [w for block in blocks for w in (*block.attention.residual_weights, *block.feedforward.residual_weights)]
    before = [weight.clone() for weight in listed]
    scale_residual_(blocks)
    assert len(before) == 6
    for weight, old in zip(listed, before, strict=True):
        assert torch.equal(weight, old / 2)
    with pytest.raises(AttributeError, match="residual_weights"):
        scale_residual_([PreNorm(Attention(8, 2), nn.Linear(8, 8), norms)])
