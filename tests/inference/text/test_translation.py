"""Translation around a model that repeats its source: sentences, batches, limits, and what is said when something is
wrong."""

import json
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text import translation
from keifu.inference.text.model import Translator
from keifu.inference.text.translation import TranslationParams, translate, translate_texts
from keifu.models import bert, gpt2, transformer

LETTERS = "abcdefghijklmnopqrstuvwxyz ABC.?!。あいうえお<>"


class EchoState:
    """The sources and how much of each was repeated."""

    def __init__(self, source: Tensor, end: int):
        self.source, self.length, self.end = F.pad(source, (0, 1), value=end), 0, end

    def select(self, rows: Tensor) -> None:
        self.source = self.source[rows]


class Echo(nn.Module):
    """Gives back its source, whatever the target so far; it counts the batches and tells the largest."""

    def __init__(self, vocab_size: int, end: int, pad: int, context_length: int = 40, ends: bool = True):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=vocab_size, context_length=context_length, start_id=pad, end_id=end, pad_id=pad
        )
        self.batches: list[int] = []
        self.ends = ends

    def start(self, source: Tensor, source_mask: Tensor | None = None, capacity: int | None = None) -> EchoState:
        self.batches.append(len(source))
        return EchoState(source, self.config.end_id)

    def hidden(self, target: Tensor, state: EchoState) -> Tensor:
        place = min(state.length, state.source.shape[1] - 1)
        state.length += 1
        return state.source[:, place : place + 1, None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        logits = 20.0 * F.one_hot(hidden[..., 0].long(), self.config.vocab_size)
        if not self.ends:
            logits[..., self.config.end_id] = -50
        return logits


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """Return a tokenizer with a token for each letter, one for all others, one for the end and one for padding."""
    rules = json.loads(train_tokenizer("characters", [LETTERS], 64, ["<pad>", "</s>", "<unk>"]).backend.to_str())
    rules["model"]["unk_token"] = "<unk>"
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(rules)), special)


@pytest.fixture
def echo(letters: Tokenizer) -> Echo:
    return Echo(letters.vocab_size, letters.token_id("</s>"), letters.token_id("<pad>"))


def test_each_sentence_is_translated_and_they_stand_on_one_line(echo: Echo, letters: Tokenizer) -> None:
    texts = ["a pen. A book? ", "", "あい。うえ。", "  ", "abc"]
    assert translate(echo, letters, texts) == ["a pen. A book?", "", "あい。うえ。", "", "abc"]
    [parts, none, *_] = translate_texts(echo, letters, texts)
    assert [part.source for part in parts] == ["a pen.", "A book?"] and none == []
    assert [part.source_tokens for part in parts] == [7, 8] and all(part.complete for part in parts)
    assert parts[0].tokens == 6 and parts[0].score == pytest.approx(0, abs=1e-3)


def test_a_text_that_is_not_split_is_one(echo: Echo, letters: Tokenizer) -> None:
    [[whole]] = translate_texts(echo, letters, ["a. A."], split=lambda text: [text])
    assert whole.text == "a. A."


def test_the_batch_size_changes_the_batches_alone(echo: Echo, letters: Tokenizer) -> None:
    texts = [LETTERS[:n] for n in (3, 30, 7, 7, 1, 22, 15)]
    done: list[int] = []
    expected = translate_texts(echo, letters, texts, progress=done.append)
    assert done[-1] == len(texts) and done == sorted(done)
    echo.batches.clear()
    assert translate_texts(echo, letters, texts, TranslationParams(batch_size=2)) == expected
    assert max(echo.batches) <= 2 and sum(echo.batches) == len(texts)
    assert [part.text for [part] in expected] == [text.strip() for text in texts]


def test_a_real_model_translates_a_text_alone_as_among_others(letters: Tokenizer) -> None:
    ids = {
        "start_id": letters.token_id("<pad>"),
        "end_id": letters.token_id("</s>"),
        "pad_id": letters.token_id("<pad>"),
    }
    sizes = {"context_length": 48, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 3}
    model = transformer.build(transformer.Config(vocab_size=letters.vocab_size, **sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5) if parameter.ndim > 1 else None
    assert isinstance(model, Translator)
    texts = [LETTERS[n : n + k] for n, k in ((0, 12), (3, 2), (7, 30), (20, 9), (5, 12))]
    together = translate_texts(model, letters, texts, split=lambda text: [text])
    for text, [among] in zip(texts, together, strict=True):
        [[alone]] = translate_texts(model, letters, [text], split=lambda text: [text])
        assert (alone.text, alone.tokens) == (among.text, among.tokens)
        assert alone.score == pytest.approx(among.score, rel=1e-4)
    assert model.training  # as it was before


def test_no_more_tokens_than_the_source_and_fifty_nor_than_the_model_takes(letters: Tokenizer) -> None:
    end, pad = letters.token_id("</s>"), letters.token_id("<pad>")
    endless = Echo(letters.vocab_size, end, pad, context_length=70, ends=False)
    for source, wanted, written in (("abc", None, 54), ("a" * 30, None, 70), ("abc", 5, 5), ("abc", 500, 70)):
        [[part]] = translate_texts(endless, letters, [source], TranslationParams(max_tokens=wanted))
        assert part.tokens == written and not part.complete


def test_a_sentence_too_long_is_said_with_both_lengths_and_not_cut(echo: Echo, letters: Tokenizer) -> None:
    assert translate(echo, letters, ["a" * 39]) == ["a" * 39]
    with pytest.raises(UserError, match=r"^Sentence 2 of text 3 has 41 tokens, but this model takes 40: "):
        translate(echo, letters, ["a", "", "an. " + "B" * 40])
    assert echo.batches == [1]


def test_unknown_characters_are_counted(echo: Echo, letters: Tokenizer) -> None:
    [[part]] = translate_texts(echo, letters, ["a猫b犬"])
    assert (part.unknown, part.source_tokens) == (2, 5)


def test_settings_out_of_range(echo: Echo, letters: Tokenizer) -> None:
    for name in ("beam", "max_tokens", "batch_size"):
        with pytest.raises(UserError, match=f"{name} must be a whole number from 1 .* not 0"):
            TranslationParams(**{name: 0})
    with pytest.raises(UserError, match="alpha must be a number .* not nan"):
        TranslationParams(alpha=float("nan"))


def test_another_kind_of_model_is_said() -> None:
    sizes = {"vocab_size": 9, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1, "context_length": 8}
    told = {"keifu generate": gpt2.build(gpt2.Config(**sizes)), "keifu embed": bert.build(bert.Config(**sizes))}
    for verb, model in {**told, "choose an encoder-decoder": nn.Linear(1, 1)}.items():
        with pytest.raises(UserError, match=f"^This model does not translate: .*{verb}"):
            translation.translator(model)
