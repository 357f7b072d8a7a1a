"""The evaluation of a masked language model, on random weights, beside figures that are counted here."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from keifu import checkpoints, cli
from keifu.data.text.masked_lm import MaskedText, MaskingScheme, MaskingVocabulary
from keifu.data.text.sentence_shards import prepare_sentences
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation.text.masked_words import CLASSES, NeighbourLookup, _fill_in, token_classes
from keifu.inference.text.translation import sentences
from keifu.models import bert

WORDS = ["red", "blue", "cat", "dog", "sees", "runs", "the", "a", "house", "tree"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    random = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    lines = [[WORDS[n] for n in torch.randint(0, 10, (21,), generator=random).tolist()] for _ in range(120)]
    documents = [" ".join(line[:9]) + ". " + " ".join(line[9:]) + "." for line in lines]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return path


@pytest.mark.parametrize("pairs", [True, False])
@torch.no_grad()
def test_the_figures_are_those_of_the_held_out_documents(
    pairs: bool, text: Path, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer("wordpiece", text.read_text().splitlines(), 60)
    sizes = {"dim": 12, "hidden_dim": 20, "n_layers": 1, "n_heads": 2, "context_length": 17}
    torch.manual_seed(1)
    model = bert.build(bert.Config(tokenizer.vocab_size, **sizes, words=True, next_sentence=pairs, pooled=pairs))
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter) * 0.3
    checkpoints.save(model, tokenizer, tmp_path / "bert")
    cli.main(["evaluate", str(tmp_path / "bert"), "--on", str(text), "--limit", "7", "--batch-size", "3", "--json"])
    found = json.loads(capsys.readouterr().out)

    data = MaskedText(
        prepare_sentences(text, tokenizer, sentences), MaskingVocabulary.of(tokenizer),
        MaskingScheme(length=17, sentence_pairs=pairs), 3, validation_rows=7,
    )  # fmt: skip
    mask_id = tokenizer.token_id("[MASK]")
    seen = prepare_sentences(text, tokenizer, sentences).training.tokens.tolist()
    between = Counter(zip(seen, seen[2:], seen[1:], strict=False))
    right, logs, told, looked_up = [], [], [], []
    for batch in data.validation():
        hidden = model.eval().encode(batch["tokens"], batch.get("segments"), batch["mask"])
        for row, (places, targets) in enumerate(zip(batch["places"], batch["targets"], strict=True)):
            for place, target in zip(places.tolist(), targets.tolist(), strict=True):
                if target >= 0 and batch["tokens"][row, place] == mask_id:
                    scores = model.words(hidden[row, place]).log_softmax(-1)
                    right.append(int(scores.argmax()) == target)
                    logs.append(float(scores[target]))
                    around = batch["tokens"][row, place - 1].item(), batch["tokens"][row, place + 1].item()
                    counts = {key[2]: count for key, count in between.items() if key[:2] == around}
                    if counts and sorted(counts.values())[-2:-1] != [max(counts.values())]:  # one is most frequent
                        looked_up.append((around, max(counts, key=lambda token: counts[token])))
        if pairs:
            told += (model.next_sentence(model.pool(hidden)).argmax(-1) == batch["random_next"]).tolist()
    assert found["masked words"] == len(right) > 7
    assert found["masked words right"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert found["perplexity of masked words"] == pytest.approx(torch.tensor(logs).mean().neg().exp().item(), rel=1e-3)
    assert found.get("sentence pairs right") == (pytest.approx(sum(told) / 7, abs=1e-4) if pairs else None)
    assert "7 rows of at most 17 tokens" in found["notes"][0]
    assert sum(line["count"] for line in found["by class"]) == len(right)
    lookup = NeighbourLookup(np.array(seen), tokenizer.vocab_size)
    answers = lookup(*(np.array(side) for side in zip(*(around for around, _ in looked_up), strict=True)))
    assert answers.tolist() == [answer for _, answer in looked_up] and looked_up


class Blank(torch.nn.Module):
    """A masked model that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, tokens: torch.Tensor, segments: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 4)

    def words(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(states), 20)


def test_the_neighbours_of_a_hidden_token_are_the_left_one_and_the_right_one() -> None:
    batch = {
        "tokens": torch.tensor([[2, 5, 9, 6, 7, 3], [2, 8, 8, 9, 4, 3]]),
        "places": torch.tensor([[2, 4], [1, 3]]),
        "targets": torch.tensor([[11, 12], [13, 14]]),
        "mask": torch.ones(2, 6, dtype=torch.bool),
    }
    hidden, _ = _fill_in(Blank(), [batch], mask_id=9)
    assert (hidden.left.tolist(), hidden.right.tolist()) == ([5, 8], [6, 4])
    assert (hidden.targets.tolist(), hidden.rows.tolist()) == ([11, 14], [0, 1])
    assert hidden.losses == pytest.approx(np.full(2, np.log(20)))


def test_lookup_falls_back_to_one_neighbour_and_to_the_commonest() -> None:
    tokens = np.array([1, 2, 3, 1, 2, 3, 1, 4, 3, 5, 2, 2, 2])
    lookup = NeighbourLookup(tokens, 7)
    left, right = np.array([1, 5, 6, 6]), np.array([3, 0, 3, 6])
    # between 1 and 3: 2 twice, 4 once; after 5: 2; before 3: 2 twice; nothing known: 2 is the commonest
    assert lookup(left, right).tolist() == [2, 2, 2, 2]
    assert NeighbourLookup(np.array([1, 4, 3, 6, 6, 6]), 7)(np.array([1, 1]), np.array([3, 5])).tolist() == [4, 4]


def test_classes_are_punctuation_pieces_common_and_other_words() -> None:
    tokenizer = train_tokenizer("wordpiece", ["red cat, dogs. red"] * 50, 40)
    vocabulary = MaskingVocabulary.of(tokenizer)
    ids = tokenizer.encode("red, red.")
    classes = token_classes(tokenizer, vocabulary, np.array(ids))
    named = {tokenizer.backend.id_to_token(token): CLASSES[classes[token]] for token in range(tokenizer.vocab_size)}
    assert named[","] == "punctuation" and named["red"] == "the 100 commonest words"
    assert {name for token, name in named.items() if token.startswith("##")} == {"pieces of words"}


def test_published_shares_follow_from_the_counts_that_were_written() -> None:
    told = json.loads((Path(__file__).parents[3] / "docs/results/data/bert-en.json").read_text(encoding="utf-8"))
    for line in told["tables"]["by class"]:
        some = [row for row in told["rows"] if row[1] == line["tokens"]]
        count, right, looked_up = (sum(row[column] for row in some) for column in (2, 3, 4))
        assert line["count"] == count
        assert (line["right"], line["looked up"]) == (round(right / count, 4), round(looked_up / count, 4))
    hidden, right, looked_up = (sum(row[column] for row in told["rows"]) for column in (2, 3, 4))
    figures = told["figures"]
    assert (figures["masked words"], figures["masked words right"]) == (hidden, round(right / hidden, 4))
    assert figures["masked words looked up"] == round(looked_up / hidden, 4)
