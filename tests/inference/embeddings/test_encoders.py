"""Sentence embeddings: what transformers gives, whatever the batch and the order, and the neighbours of each text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from keifu import checkpoints
from keifu.data.catalogue.catalogue import fetch
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.encoders import embed, encode_texts, nearest
from keifu.models import bert, gpt2

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "ran", "far", "away", "from", "an", "old"]
WORDS += ["house", "by", "the", "sea"]
TEXTS = [" ".join(WORDS[start : start + length]) for start in range(5) for length in (1, 2, 3, 5, 8, 13)]
SMALL = bert.Config(
    context_length=16, dim=24, hidden_dim=40, n_layers=2, n_heads=3, words=False, next_sentence=False
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Tokenizer]:
    """Return an encoder of two layers, and a tokenizer with one token for each word."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("wordpiece", [" ".join(WORDS)] * 2, 200)
    return bert.build(replace(SMALL, vocab_size=tokenizer.vocab_size)), tokenizer


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    try:
        fetch("minilm")
    except (UserError, OSError) as error:
        pytest.skip(f"MiniLM cannot be had here: {error}")
    return checkpoints.load("minilm")


def alone(model: Any, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return an embedding by its definition: the mean of one text's hidden states, normalised to length 1."""
    ids = torch.tensor([tokenizer.encode(text, special=True)])
    with torch.no_grad():
        return F.normalize(model.eval().encode(ids).mean(1), dim=-1)[0]


def test_a_batch_of_any_size_and_order_gives_what_each_text_gives_alone(tiny: tuple[Any, Tokenizer]) -> None:
    expected = torch.stack([alone(*tiny, text) for text in TEXTS])
    for batch_size in (1, 3, 256):
        found = embed(*tiny, TEXTS, batch_size=batch_size)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    order = torch.randperm(len(TEXTS)).tolist()
    shuffled = embed(*tiny, [TEXTS[place] for place in order])
    torch.testing.assert_close(shuffled, expected[order], atol=1e-6, rtol=0)
    assert float((expected @ expected.T).min()) < 0.99  # and they are not all the same


POOLED = {  # by sentence-transformers' rule, for the hidden states of one text
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.amax(0),
    "mean_sqrt_len": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
}
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def sentence_transformer(folder: Path, tiny: tuple[Any, Tokenizer], pooling: dict[str, Any], *more: Any) -> Path:
    """Write a folder as sentence-transformers does."""
    checkpoints.save(*tiny, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))
    (folder / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, *more]))
    return folder


@pytest.mark.parametrize("way", POOLED)
def test_a_sentence_transformers_folder_is_pooled_by_its_own_rule(
    tiny: tuple[Any, Tokenizer], tmp_path: Path, way: str
) -> None:
    keys = {key: name == way for name, key in bert.POOLING_KEYS.items()}
    folder = sentence_transformer(tmp_path / "theirs", tiny, keys, NORMALIZE)
    model, tokenizer = checkpoints.load(folder)
    with torch.no_grad():
        hidden = [model.encode(torch.tensor([tokenizer.encode(text, special=True)]))[0] for text in TEXTS]
    expected = F.normalize(torch.stack([POOLED[way](states) for states in hidden]), dim=-1)
    torch.testing.assert_close(embed(model, tokenizer, TEXTS), expected, atol=1e-6, rtol=0)
    checkpoints.save(model, tokenizer, tmp_path / "ours")
    again = embed(*checkpoints.load(tmp_path / "ours"), TEXTS)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("pooling", "more", "reason"),
    [
        ({"pooling_mode_mean_tokens": True}, [DENSE], "lists Transformer, Pooling, Dense"),
        ({"pooling_mode_lasttoken": True}, [], r"pooled by \['lasttoken'\]"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, [], r"\['mean', 'max'\]"),
        ({}, [], "pooled by"),
        ({"pooling_mode": 3}, [], "pooled by"),
        ({"pooling_mode": "cls"}, [{"path": "../x"}], "modules are folders inside"),
        ({"pooling_mode": "cls"}, [3], "not a list of modules"),
    ],
)
def test_another_way_to_a_sentence_embedding_is_refused(
    tiny: tuple[Any, Tokenizer], tmp_path: Path, pooling: dict[str, Any], more: list[Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        checkpoints.load(sentence_transformer(tmp_path / "theirs", tiny, pooling, *more))


def test_minilm_gives_what_transformers_gives(minilm: tuple[Any, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    path = fetch("minilm")
    theirs, tokens = (
        transformers.AutoModel.from_pretrained(path).eval(),
        transformers.AutoTokenizer.from_pretrained(path),
    )
    texts = [
        "A cat.",
        "Stocks fell sharply as investors worried; naïve hopes of 3.5% faded.",
        "猫が好き",
        "x" * 40,
        "I",
    ]
    texts += [" ".join(WORDS[:length] * 3) for length in (1, 4, 7, 16)]
    read = tokens(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    mask = read["attention_mask"]
    with torch.no_grad():
        hidden = theirs(**read).last_hidden_state
    expected = F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert int(mask.sum(1).min()) < int(mask.sum(1).max())
    torch.testing.assert_close(embed(*minilm, texts), expected, atol=1e-5, rtol=0)


def test_minilm_knows_what_is_alike(minilm: tuple[Any, Any]) -> None:
    texts = [
        "A man is playing a guitar.",
        "Someone plays music on strings.",
        "The stock market fell.",
        "Shares lost value.",
    ]
    _, places = nearest(*[embed(*minilm, texts)] * 2, 1, themselves=True)
    assert places.flatten().tolist() == [1, 0, 3, 2]


def test_the_type_of_the_weights_is_that_of_the_work(tiny: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = tiny
    half = bert.build(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    found = embed(half, tokenizer, TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    assert 1e-5 < float((found - embed(model, tokenizer, TEXTS)).abs().max()) < 0.05


def test_embedding_leaves_the_model_as_it_was_and_its_result_can_be_learned_from(tiny: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = tiny
    expected = embed(model, tokenizer, TEXTS[:4])
    model.train()
    found = embed(model, tokenizer, TEXTS[:4])
    assert model.training
    torch.testing.assert_close(found, expected)  # without dropout
    weight = torch.zeros(model.config.dim, requires_grad=True)
    (found @ weight).sum().backward()
    assert weight.grad is not None


def test_a_text_that_is_too_long_is_an_error_with_both_lengths_unless_it_may_be_cut(
    tiny: tuple[Any, Tokenizer],
) -> None:
    model, tokenizer = tiny
    long = " ".join([*WORDS, *WORDS])
    with pytest.raises(UserError, match=r"^Text 2 of 2 has 40 tokens; the model takes 16: .*--cut"):
        embed(model, tokenizer, ["cat", long])
    cut = embed(model, tokenizer, ["cat", long], cut=True)
    torch.testing.assert_close(cut[1], alone(model, tokenizer, " ".join(WORDS[:14])))
    rows, shortened = encode_texts(tokenizer, ["cat", long], 16, cut=True)
    assert shortened == 1 and rows[1][-1] == rows[0][-1]  # the closing token stays


def test_what_cannot_be_embedded_is_said(tiny: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = tiny
    with pytest.raises(UserError, match="Text 2 of 2 is empty"):
        embed(model, tokenizer, ["cat", " "])
    with pytest.raises(UserError, match="There is no text"):
        embed(model, tokenizer, [])
    causal = gpt2.build(gpt2.Config(vocab_size=50, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=1))
    with pytest.raises(UserError, match="A DecoderLM gives no vectors for texts: choose an encoder, such as minilm"):
        embed(causal, tokenizer, ["cat"])


def test_the_nearest_are_those_of_all_comparisons() -> None:
    points = F.normalize(torch.randn(30, 5), dim=1)
    similarity, places = nearest(points[:7], points, 4)
    assert (places[:, 0] == torch.arange(7)).all()  # each is in the set itself
    expected = (points[:7] @ points.T).sort(descending=True)
    assert torch.equal(places, expected.indices[:, :4])
    torch.testing.assert_close(similarity, expected.values[:, :4])
    _, others = nearest(points, points, 3, themselves=True)
    assert torch.equal(others[:7], expected.indices[:, 1:4])
    with pytest.raises(UserError, match="30 nearest texts were requested, but there are only 29"):
        nearest(points, points, 30, themselves=True)


def test_embeddings_that_are_not_finite_are_refused(tiny: tuple[Any, Tokenizer]) -> None:
    model = bert.build(tiny[0].config)
    with torch.no_grad():
        model.blocks[0].feedforward.up.weight.fill_(3e38)
    with pytest.raises(UserError, match="numbers for the texts are not finite: its weights are damaged"):
        embed(model, tiny[1], TEXTS[:2])
