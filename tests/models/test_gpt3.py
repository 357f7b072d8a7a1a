"""GPT-3: table 2.1, the pattern of its layers, caches that keep the band, and what its files can say."""

import pytest
import torch

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.errors import UserError
from keifu.models import gpt2, gpt3
from keifu.models.sizes import published_sizes

SMALL = {"vocab_size": 31, "context_length": 64, "dim": 12, "hidden_dim": 30, "n_layers": 4, "n_heads": 3}
PAPER = {size.name: size.paper for size in published_sizes()}


@pytest.mark.parametrize("name", gpt3.SIZES)
def test_sizes_count_what_the_table_prints(name):
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in gpt3.build(gpt3.SIZES[name]).parameters())
    assert abs(counted / PAPER[name] - 1) < 0.02


def test_every_second_layer_sees_the_band_alone():
    model = gpt3.build(gpt3.Config(**SMALL, band=5))
    assert [block.attention.window for block in model.blocks] == [None, 5, None, 5]


def test_what_is_beyond_the_band_does_not_reach_a_banded_model():
    """With every dense layer silenced, two banded layers carry a token at most twice the band less one."""
    model, tokens = gpt3.build(gpt3.Config(**SMALL, band=5)).eval(), torch.randint(0, 31, (1, 40))
    with torch.no_grad():
        for block in model.blocks[::2]:
            block.attention.out.weight.zero_()
    embedded = model.embedding(tokens).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded
    gradient = torch.autograd.grad(model.hidden(tokens)[0, -1].square().sum(), embedded)[0][0].abs().sum(-1)
    assert (gradient[: 40 - 9] == 0).all() and (gradient[40 - 9 :] > 0).all()


def test_dense_is_gpt2_and_is_saved_as_such(tmp_path):
    model = gpt3.build(gpt3.Config(**SMALL, band=None)).eval()
    checkpoints.save(model, None, tmp_path)
    again, tokens = checkpoints.load_model(tmp_path), torch.randint(0, 31, (2, 50))
    assert isinstance(again.config, gpt2.Config)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "keifu_gpt3"),
        ({"band": None}, "gpt2"),
        ({"qkv_bias": False}, "keifu_gpt3"),
        ({"scaled_attention": False}, "keifu_gpt3"),
        ({"band": None, "qkv_bias": False}, "keifu_gpt3"),
        ({"qkv_bias": False, "scaled_attention": False}, "gpt_neo"),
        ({"qkv_bias": False, "scaled_attention": False, "band": None}, "gpt_neo"),
    ],
)
def test_a_model_is_saved_under_the_name_that_says_all_of_it(change, kind, tmp_path):
    model = gpt3.build(gpt3.Config(**SMALL | {"band": 6} | change)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    checkpoints.save(model, None, tmp_path)
    assert describe(model.config)[0].model_type == kind
    again, tokens = checkpoints.load_model(tmp_path), torch.randint(0, 31, (2, 50))
    assert torch.equal(again(tokens), model(tokens))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_order_of_layers_is_refused():
    neo = gpt3.Config(**SMALL, qkv_bias=False, scaled_attention=False)
    json = describe(neo)[1] | {"attention_types": [[["local", "global"], 2]]}
    with pytest.raises(UserError, match="is not supported: 4 layers, all global or every other"):
        read_config(json, "config.json")


def test_a_gguf_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"keifu writes no GGUF of keifu.models.gpt3, because .* directory \(hf\)"):
        checkpoints.save_gguf(gpt3.build(gpt3.Config(**SMALL)), None, tmp_path / "x.gguf")
