"""Words for [MASK]: those of the whole text's logits, in order; what cannot be filled in is said."""

import pytest
import torch

from keifu import checkpoints
from keifu.data.catalogue.catalogue import fetch
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text.fill import fill
from keifu.inference.text.generate import generate
from keifu.inference.text.model import causal
from keifu.models import bert, gpt2


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train_tokenizer("wordpiece", ["the cat sat on the mat, the dog ran after the cat"] * 3, 90, lowercase=True)


@pytest.fixture
def model(wordpiece: Tokenizer) -> bert.Bert:
    built = bert.build(bert.Config(wordpiece.vocab_size, 16, 16, 24, 2, 4))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return built.train()


def test_guesses_are_the_likeliest_words(model: bert.Bert, wordpiece: Tokenizer) -> None:
    found = fill(model, wordpiece, "the [MASK] sat on [MASK]", count=4)
    assert model.training and [len(guesses) for guesses in found] == [4, 4]
    ids = wordpiece.encode("the [MASK] sat on [MASK]", special=True, allow_special=True)
    places = [n for n, token in enumerate(ids) if token == wordpiece.token_id("[MASK]")]
    with torch.no_grad():
        probabilities = model.eval().words(model.encode(torch.tensor([ids]))).softmax(-1)[0]
    for place, guesses in zip(places, found, strict=True):
        assert [guess.token for guess in guesses] == probabilities[place].topk(4).indices.tolist()
        assert [guess.probability for guess in guesses] == pytest.approx(probabilities[place].topk(4).values.tolist())
        assert all(guess.word == wordpiece.decode([guess.token]) for guess in guesses)


def test_other_special_tokens_in_the_text_stay_text(model: bert.Bert, wordpiece: Tokenizer) -> None:
    assert fill(model, wordpiece, "a [SEP] [MASK]") != fill(model, wordpiece, "a [MASK]")
    ids = wordpiece.encode("a [SEP]", special=True)
    assert ids.count(wordpiece.token_id("[SEP]")) == 1


def test_what_cannot_be_filled_in_is_said(model: bert.Bert, wordpiece: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no \[MASK\] in 'the cat'"):
        fill(model, wordpiece, "the cat")
    with pytest.raises(UserError, match="the model reads 16"):
        fill(model, wordpiece, "the cat " * 9 + "[MASK]")
    with pytest.raises(UserError, match="A DecoderLM fills in no words"):
        fill(gpt2.build(gpt2.Config(31, 16, 16, 24, 1, 2)), wordpiece, "[MASK]")
    with pytest.raises(UserError, match="no mask_token"):
        fill(model, train_tokenizer("characters", ["abc"], 10), "[MASK]")


def test_a_bert_asked_to_write_says_what_it_does_instead(model: bert.Bert, wordpiece: Tokenizer) -> None:
    for ask in (lambda: generate(model, wordpiece, "the"), lambda: causal(model)):
        with pytest.raises(UserError, match=r"a Bert reads both sides .* embed .* classify .* fill in \[MASK\]"):
            ask()


def test_the_command_line_says_so_too(capsys: pytest.CaptureFixture) -> None:
    from keifu import cli

    try:
        fetch("minilm")
    except (UserError, OSError) as error:
        pytest.skip(f"MiniLM cannot be had here: {error}")
    capsys.readouterr()  # how much was fetched
    for command in (["generate", "minilm", "Once"], ["chat", "minilm", "Hello"]):
        with pytest.raises(SystemExit):
            cli.main(command)
        error = capsys.readouterr().err
        assert "minilm writes no text: a Bert reads both sides" in error and error.count("\n") == 1


def test_a_model_without_the_head_for_words_says_so(wordpiece: Tokenizer, tmp_path) -> None:
    plain = bert.build(bert.Config(wordpiece.vocab_size, 16, 16, 24, 1, 2, words=False, next_sentence=False))
    checkpoints.save(plain, wordpiece, tmp_path)
    with pytest.raises(ValueError, match="This BERT has no head for masked words"):
        fill(*checkpoints.load(tmp_path), "the [MASK]")
