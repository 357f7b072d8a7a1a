"""Writing and filling by masked diffusion: the order of the masks, steps, blocks, seeds, and what is refused."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keifu import checkpoints, cli
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text import unmasking
from keifu.inference.text.generate import generate as generate_text
from keifu.inference.text.unmasking import Unmasking, fill_gaps, unmask, write
from keifu.models.diffusion import llada

MASK = 9


class Sure(nn.Module):
    """A predictor that is surest of the last masks; it says the position of each, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.weight = SimpleNamespace(context_length=8, mask_token=MASK), nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def predict_masked(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens[0].tolist())
        places = torch.arange(tokens.shape[1])
        logits = torch.zeros(1, len(places), 10)
        logits[0, places, places] = 1.0 + places
        return logits


def test_the_surest_masks_become_tokens_first_block_after_block() -> None:
    model = Sure()
    assert unmask(model, [7, *[MASK] * 6], Unmasking(block=4)) == [7, 1, 2, 3, 4, 5, 6]
    assert len(model.seen) == 6
    assert model.seen[1] == [7, 9, 9, 9, 4, 9, 9] and model.seen[4] == [7, 1, 2, 3, 4, 9, 9]
    assert model.seen[5] == [7, 1, 2, 3, 4, 9, 6]


@pytest.mark.parametrize(("steps", "passes"), [(1, 2), (2, 2), (3, 3), (6, 6), (50, 6)])
def test_steps_are_shared_by_the_blocks(steps: int, passes: int) -> None:
    model = Sure()
    assert unmask(model, [MASK] * 6, Unmasking(steps=steps, block=4)) == [0, 1, 2, 3, 4, 5]
    assert len(model.seen) == passes


def test_tokens_that_are_given_stay_on_both_sides() -> None:
    assert unmask(Sure(), [7, MASK, 7, MASK, 7], Unmasking()) == [7, 1, 7, 3, 7]
    assert unmask(Sure(), [7, 8], Unmasking()) == [7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a saved model with a tokenizer of characters, whose mask is behind the vocabulary."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("characters", ["abcdef gh, ijk lmnop."], 40)
    sizes: dict[str, Any] = {"context_length": 24, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
    size = tokenizer.vocab_size
    model = llada.build(llada.Config(vocab_size=size + 1, mask_token=size, **sizes))
    nn.init.normal_(model.embedding.weight)
    place = tmp_path_factory.mktemp("llada")
    checkpoints.save(model, tokenizer, place)
    return str(place)


def test_the_command_writes_and_fills(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = checkpoints.load(folder)
    cli.parse(["generate", folder, "abc", "--max-tokens", "9", "--steps", "3", "--block", "4"])()
    expected = write(model, tokenizer, "abc", Unmasking(max_tokens=9, steps=3, block=4))
    assert capsys.readouterr().out == expected + "\n"
    assert generate_text(model, tokenizer, "abc", max_tokens=9, steps=3, block=4) == expected
    assert len(write(model, tokenizer, "abc", Unmasking(max_tokens=None))) <= 21
    cli.parse(["generate", folder, "abc ___ fgh ___.", "--gap", "3"])()
    filled = capsys.readouterr().out.strip("\n")
    assert filled.startswith("abc") and " fgh" in filled and filled.endswith(".") and len(filled) == 14
    assert filled == fill_gaps(model, tokenizer, "abc ___ fgh ___.", 3, Unmasking())


def test_a_seed_gives_the_same_text(folder: str) -> None:
    model, tokenizer = checkpoints.load(folder)
    texts = [write(model, tokenizer, "a", Unmasking(20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["abc", "--top-k", "4"], "There is no option of masked diffusion 'top_k'"),
        (["abc", "--json"], "--json is of models that write from left to right, and this is masked diffusion"),
        (["abc", "--guesses", "2", "--stream"], "--stream, --guesses is of models"),
        (["abcdefabcdefabcdefabcdef"], "The prompt has 24 tokens, and the model reads 24: shorten it"),
        (["abc ___", "--gap", "2", "--max-tokens", "9"], "--gap says how many tokens a gap gets: leave out --max-tok"),
        (["abc", "--gap", "2"], "There is no gap in 'abc': write ___"),
        (["abc ___", "--gap", "30"], "The text has 33 tokens with its masks, and the model reads 24"),
    ],
)
def test_what_masked_diffusion_cannot_do_is_said(folder: str, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        cli.parse(["generate", folder, *words])()


def test_models_from_left_to_right_refuse_the_options_of_masked_diffusion(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="fills no masks: load a model of masked diffusion"):
        unmask(nn.Linear(1, 1), [1], Unmasking())
    with pytest.raises(UserError, match="fills masks in any order, not from left to right, and has no cache: use"):
        cli.parse(["chat", folder, "abc"])()
    cli.parse(["generate", folder, "abc", "--weights", "int8"])()
    assert "which native code does not have" in capsys.readouterr().err


class Tied(Sure):
    """A predictor with n + 1 equally likely tokens at position n: the chance of any of them is 1 / (n + 1)."""

    def predict_masked(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens[0].tolist())
        places = torch.arange(tokens.shape[1])
        return torch.where(torch.arange(9) <= places[:, None], 40.0, 0.0)[None]


@pytest.mark.parametrize("seed", range(3))
def test_the_surest_masks_are_those_of_the_model_whatever_the_noise(seed: int) -> None:
    """The noise chooses the token, and not which mask becomes one."""
    model = Tied()
    model.config.mask_token = 9
    unmask(model, [MASK] * 6, Unmasking(temperature=1.0, seed=seed))
    masked = [[place for place, token in enumerate(row) if token == MASK] for row in model.seen]
    assert masked == [[*range(first, 6)] for first in range(6)]


def test_a_text_ends_at_its_first_end_token(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two end tokens, with text before, between and after them."""
    model, tokenizer = checkpoints.load(folder)
    a, b, c, (end,) = (tokenizer.encode(letter) for letter in "bcdp")
    tokenizer.stop_ids = {end}
    monkeypatch.setattr(unmasking, "unmask", lambda model, ids, how: [*ids[:1], *a, *a, end, *b, end, *c])
    assert write(model, tokenizer, "a", Unmasking(max_tokens=7)) == "bb"


def test_steps_that_do_not_divide_the_masks_fill_all_of_them() -> None:
    model = Sure()
    assert unmask(model, [MASK] * 7, Unmasking(steps=3, block=8)) == [*range(7)]
    assert [row.count(MASK) for row in model.seen] == [7, 5, 3]


class Two(Sure):
    """A predictor of two tokens at every position, whose logits differ by 2."""

    def predict_masked(self, tokens: Tensor) -> Tensor:
        return torch.tensor([2.0, 0.0, *[-torch.inf] * 8]).expand(1, tokens.shape[1], 10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_divides_the_logits(temperature: float, likely) -> None:
    """The likelier of two tokens has the share sigmoid(2 / temperature): 0.982, 0.881 and 0.731."""
    model = Two()
    model.config.context_length = 4000
    found = unmask(model, [MASK] * 4000, Unmasking(steps=1, block=4000, temperature=temperature, seed=5))
    assert {*found} == {0, 1} and likely(found.count(0), 4000, 1 / (1 + math.exp(-2 / temperature)))
