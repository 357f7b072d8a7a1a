"""Recurrent language models equal torch's networks bit for bit, from the file that they are saved in, and write text
with their state."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import keifu
from keifu import checkpoints
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import generate
from keifu.layers.recurrent.cells import LSTM
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.classic import lstm

NETWORKS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
TEXT = "the cat sat on the mat and the dog ran. "


class Published(nn.Module):
    """The language model of PyTorch's examples, without the bias of its head."""

    def __init__(self, cell: str, vocab_size: int, dim: int, n_layers: int):
        super().__init__()
        self.encoder = nn.Embedding(vocab_size, dim)
        self.rnn = NETWORKS[cell](dim, dim, n_layers, batch_first=True)
        self.decoder = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(tokens))[0])


def small(cell: str = "lstm", **different: int | float | bool) -> DecoderLM:
    torch.manual_seed(0)
    values = {"vocab_size": 37, "context_length": 64, "dim": 13, "n_layers": 3, "dropout": 0.0} | different
    return lstm.build(lstm.Config(cell=cell, **values)).eval()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("cell", NETWORKS)
@torch.no_grad()
def test_the_file_is_one_of_torchs_network_and_gives_the_same_bits(cell: str, tmp_path: Path) -> None:
    model = small(cell)
    checkpoints.save(model, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    published = Published(cell, 37, 13, 3)
    published.load_state_dict(stored)  # strict: no name is missing or extra
    tokens = torch.randint(37, (4, 21))
    assert torch.equal(model(tokens), published(tokens))
    again = checkpoints.load_model(tmp_path)
    assert torch.equal(again(tokens), model(tokens))
    checkpoints.save(again, None, tmp_path / "again")
    back = load_file(tmp_path / "again/model.safetensors")
    assert back.keys() == stored.keys() and all(torch.equal(back[name], stored[name]) for name in stored)


@pytest.mark.parametrize("cell", NETWORKS)
@torch.no_grad()
def test_a_text_is_written_by_the_state_as_by_reading_all_again(cell: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer("characters", [TEXT], 99)
    model = small(cell, vocab_size=tokenizer.vocab_size)
    checkpoints.save(model, tokenizer, tmp_path)
    loaded, tokenizer = keifu.load(tmp_path)
    prompts, length = ["the cat", "dog ran. the mat"], 30
    written = [generate(loaded, tokenizer, text, raw=True, max_tokens=length, temperature=0.0) for text in prompts]
    for text, found in zip(prompts, written, strict=True):
        tokens = tokenizer.encode(text)
        for _ in range(length):
            tokens.append(int(loaded(torch.tensor([tokens]))[0, -1].argmax()))
        assert text + found == tokenizer.decode(tokens)


def test_dropout_acts_between_layers_and_not_on_the_state() -> None:
    model = small(dropout=0.5).train()
    for name, kept in (("first", 0), ("second", 1)):
        seen: list[Tensor] = []
        layer = model.blocks[kept].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        model(torch.arange(8)[None])
        layer.remove()
        assert 0.2 < float((seen[0] == 0).float().mean()) < 0.8, name
    network = model.blocks[0].get_submodule("attention.network")
    assert isinstance(network, nn.LSTM) and network.dropout == 0


def test_forget_gates_begin_open() -> None:
    of_input, of_state = biases(small().blocks[0].get_submodule("attention"))
    assert torch.equal(of_input + of_state, torch.ones(13))


def biases(layer: nn.Module) -> list[Tensor]:
    assert isinstance(layer, LSTM)
    named = dict(layer.network.named_parameters())
    return [named[name][layer.dim : 2 * layer.dim].detach() for name in ("bias_ih_l0", "bias_hh_l0")]


def test_an_unknown_cell_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'lstm'"):
        lstm.Config(cell="lsmt")
