"""GPT-1: its size, its block as the paper draws it, what its config can say, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.errors import UserError
from keifu.models import gpt1

SMALL = {"vocab_size": 31, "context_length": 16, "dim": 12, "hidden_dim": 48, "n_layers": 2, "n_heads": 3}


def test_parameters_of_the_published_model():
    with torch.device("meta"):
        model = gpt1.build(gpt1.Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 116_534_784


def test_norms_come_after_each_sublayer_and_none_comes_last():
    model = gpt1.build(gpt1.Config(**SMALL)).eval()
    tokens = torch.randint(0, 31, (2, 9))
    x = model.embedding(tokens) + model.positions.weight[:9]
    for block in model.blocks:
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in block.attention.qkv(x).chunk(3, -1))
        scores = (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        attended = block.attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = F.layer_norm(x + attended, (12,))
        x = F.layer_norm(x + block.feedforward.down(F.gelu(block.feedforward.up(x), approximate="tanh")), (12,))
    torch.testing.assert_close(model(tokens), x @ model.embedding.weight.T)


@pytest.mark.parametrize("change", [{"hidden_dim": 33}, {"activation": "gelu"}, {"activation": "tanh"}])
def test_what_openai_gpt_cannot_say_is_kept_in_our_own_words(change, tmp_path):
    model = gpt1.build(gpt1.Config(**SMALL | change)).eval()
    checkpoints.save(model, None, tmp_path)
    again = checkpoints.load_model(tmp_path)
    tokens = torch.randint(0, 31, (1, 7))
    assert describe(model.config)[0].model_type == "keifu_gpt1" and again.config == model.config
    assert torch.equal(again(tokens), model(tokens))


def test_activation_that_the_published_code_lacks_is_refused():
    json = describe(gpt1.Config(**SMALL))[1] | {"afn": "tanh"}
    with pytest.raises(UserError, match="afn is 'tanh', and what is implemented is 'gelu', 'silu', 'swish', 'relu'"):
        read_config(json, "config.json")


def test_a_gguf_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"keifu writes no GGUF of keifu.models.gpt1, because .* directory \(hf\)"):
        checkpoints.save_gguf(gpt1.build(gpt1.Config(**SMALL)), None, tmp_path / "x.gguf")
