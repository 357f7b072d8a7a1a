"""PaLM: the paper's counts, its first numbers, the scaled logits, and what Cohere's files may say."""

import pytest
import torch

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.errors import UserError
from keifu.models import palm
from keifu.models.sizes import published_sizes
from keifu.training.objectives.language_modeling import causal_language_modeling

SMALL = {"vocab_size": 31, "context_length": 16, "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 3}
PAPER = {size.name: size.paper for size in published_sizes()}


@pytest.mark.parametrize("name", ["palm-8b", "palm-62b", "palm-540b"])
def test_sizes_count_what_the_paper_prints(name):
    with torch.device("meta"):
        model = palm.build(palm.SIZES[name])
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert abs(counted - PAPER[name]) < 0.01e9  # all the digits that the paper prints
    assert not [key for key, _ in model.named_parameters() if key.endswith("bias")]


def test_first_numbers_have_the_papers_spread():
    model = palm.build(palm.Config(**SMALL | {"vocab_size": 900, "hidden_dim": 400}, head_dim=20))
    spread = {name: float(weight.detach().std()) for name, weight in model.named_parameters() if weight.ndim > 1}
    inputs = {"qkv": 48, "attention.out": 60, "gate_up": 48, "down": 400, "embedding": 1}
    for name, std in spread.items():
        of = next(n for key, n in inputs.items() if key in name)
        assert std == pytest.approx(of**-0.5, rel=0.05), name
    logits = model(torch.randint(0, 900, (4, 16)))
    assert 0.8 < float(logits.detach().std()) < 1.2  # that is what 1 / √dim is for


@pytest.mark.parametrize("tied", [True, False])
def test_loss_sees_the_scaled_logits(tied):
    model = palm.build(palm.Config(**SMALL, head_dim=20, tied=tied, logit_scale=0.3))
    tokens = torch.randint(0, 31, (2, 12))
    expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="sum")
    torch.testing.assert_close(causal_language_modeling(model, {"tokens": tokens}).total, expected)


def test_cache_holds_one_head():
    model = palm.build(palm.Config(**SMALL, head_dim=20))
    assert [keys.shape for keys in model.new_state(2, 9).keys] == [(2, 1, 9, 20)] * 2


@pytest.mark.parametrize("setting", ["use_qk_norm", "attention_bias"])
def test_settings_of_cohere_that_are_not_here_are_refused(setting):
    json = describe(palm.Config(**SMALL))[1] | {setting: True}
    with pytest.raises(UserError, match=f"sets {setting} to True, which keifu does not implement"):
        read_config(json, "config.json")


def test_defaults_of_cohere():
    json = describe(palm.Config(**SMALL, head_dim=None))[1]
    for name in ("logit_scale", "rope_theta", "rope_parameters", "rope_scaling", "num_key_value_heads"):
        del json[name]
    config = read_config(json, "config.json")[1]
    assert (config.logit_scale, config.rope_theta, config.n_kv_heads, config.head_dim) == (0.0625, 500_000.0, 3, None)


def test_a_gguf_of_heads_that_llama_cpp_lacks_is_refused_with_the_way_out(tmp_path):
    """llama.cpp runs Command-R, whose heads have dim / n_heads numbers."""
    with pytest.raises(UserError, match=r"runs no such model: command-r needs head_dim=None.* directory \(hf\)"):
        checkpoints.save_gguf(palm.build(palm.Config(**SMALL)), None, tmp_path / "x.gguf")
