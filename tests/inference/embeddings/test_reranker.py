"""Cross-encoders: the scores of transformers' model and tokenizer, as sentence-transformers' CrossEncoder has them."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import keifu
from keifu.data.tokenizers.pairs import longest_first
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.classifiers import text_classifier
from keifu.inference.embeddings.reranker import rank, reranker

WORDS = "the cat sat on a mat while seven dogs ran far away"
IDENTITY = "torch.nn.modules.linear.Identity"
QUERIES = ["the cat", "猫", "who ran? " * 3, "the dogs far away and again " * 8]
DOCUMENTS = [
    "x", "the cat", "  spaced   out \n\t text ", "!!! ???", "Ünïcode 猫 が 好き", "\u200b\x00odd", "🙂 İstanbul ß ﬁ",
    "a" * 300, *("the cat sat " * count for count in range(1, 13)), "seven dogs ran far away " * 40,
]  # fmt: skip


@pytest.fixture
def cross_encoder(tmp_path: Path) -> Path:
    """Save a random BertForSequenceClassification with one label, and return its folder."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("wordpiece", [WORDS] * 2, 200)
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=32, num_labels=1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    return tmp_path


def written(folder: Path, name: str, **entries: object) -> None:
    """Add entries to a JSON file of a folder."""
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | entries))


@torch.no_grad()
def scores_of_transformers(folder: Path, query: str) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pairs = [(query, document) for document in DOCUMENTS]
    inputs = tokenizer(pairs, padding=True, truncation="longest_first", max_length=32, return_tensors="pt")
    assert inputs["token_type_ids"].any()
    return model(**inputs).logits[:, 0]


@pytest.mark.parametrize("query", QUERIES)
def test_the_scores_are_those_of_transformers_in_any_batch(cross_encoder: Path, query: str) -> None:
    model, tokenizer = keifu.load(str(cross_encoder))
    found = rank(model, tokenizer, query, DOCUMENTS, cut=True)
    expected = scores_of_transformers(cross_encoder, query)
    torch.testing.assert_close(found.scores, expected.sigmoid(), atol=1e-6, rtol=1e-5)
    assert expected.std() > 0.01 and found.shortened > 0
    alone = [rank(model, tokenizer, query, [document], cut=True).scores for document in DOCUMENTS]
    torch.testing.assert_close(torch.cat(alone), found.scores, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("version", [3, 4, 6])
def test_a_score_without_sigmoid_is_read_from_files_of_any_version_and_saved(
    cross_encoder: Path, version: int, tmp_path: Path
) -> None:
    expected = scores_of_transformers(cross_encoder, "the cat")
    if version == 3:
        written(cross_encoder, "config.json", sbert_ce_default_activation_function=IDENTITY)
    elif version == 4:
        written(cross_encoder, "config.json", sentence_transformers={"activation_fn": IDENTITY})
    else:
        kind = "sentence_transformers.base.modules.transformer.Transformer"
        (cross_encoder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
        written(cross_encoder, "config_sentence_transformers.json", activation_fn=IDENTITY, model_type="CrossEncoder")
    model, tokenizer = keifu.load(str(cross_encoder))
    keifu.save(model, tokenizer, tmp_path / "saved")
    for folder in (cross_encoder, tmp_path / "saved"):
        model, tokenizer = keifu.load(str(folder))
        found = rank(model, tokenizer, "the cat", DOCUMENTS, cut=True).scores
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_name_of_a_token_in_a_text_is_no_token(cross_encoder: Path) -> None:
    model, tokenizer = keifu.load(str(cross_encoder))
    plain, spelled = rank(model, tokenizer, "the cat", ["sep a", "[SEP] a"]).tokens, tokenizer.token_id("[SEP]")
    assert tokenizer.encode("[SEP]") != [spelled] and plain > len(tokenizer.encode("the cat a")) * 2 + 6


@pytest.mark.parametrize("lengths", [(first, second) for first in range(12) for second in range(12)])
def test_the_longer_text_is_cut_first(lengths: tuple[int, int]) -> None:
    for room in range(2, 25):
        first, second = longest_first(*lengths, room)
        assert first + second == min(sum(lengths), room) and first <= lengths[0] and second <= lengths[1]
        if first < lengths[0] and second < lengths[1]:
            assert abs(first - second) <= 1


def test_what_cannot_be_scored_is_refused(cross_encoder: Path) -> None:
    model, tokenizer = keifu.load(str(cross_encoder))
    with pytest.raises(UserError, match="Document 2 of 2 has 105 tokens together with the query; the model takes 32"):
        rank(model, tokenizer, "the cat", ["a", "the cat " * 50])
    with pytest.raises(UserError, match="Document 2 is empty"):
        rank(model, tokenizer, "the cat", ["a", " \n"])
    with pytest.raises(UserError, match="The query is empty"):
        rank(model, tokenizer, "", ["a"])
    with pytest.raises(UserError, match="half a surrogate pair"):
        rank(model, tokenizer, "a", ["\ud800"])
    with pytest.raises(UserError, match="knows no labels: it reranks"):
        text_classifier(model, tokenizer)
    with pytest.raises(UserError, match="other gives no score for a query and a document"):
        reranker(torch.nn.Linear(1, 1), "other")
