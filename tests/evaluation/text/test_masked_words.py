"""The evaluation of a masked language model, on random weights, beside figures that are counted here."""

import json
from pathlib import Path

import pytest
import torch

from keifu import checkpoints, cli
from keifu.data.text.masked_lm import MaskedText, MaskingScheme, MaskingVocabulary
from keifu.data.text.sentence_shards import prepare_sentences
from keifu.data.tokenizers.train import train_tokenizer
from keifu.generation.text.translation import sentences
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
    right, logs, told = [], [], []
    for batch in data.validation():
        hidden = model.eval().encode(batch["tokens"], batch.get("segments"), batch["mask"])
        for row, (places, targets) in enumerate(zip(batch["places"], batch["targets"], strict=True)):
            for place, target in zip(places.tolist(), targets.tolist(), strict=True):
                if target >= 0:
                    scores = model.words(hidden[row, place]).log_softmax(-1)
                    right.append(int(scores.argmax()) == target)
                    logs.append(float(scores[target]))
        if pairs:
            told += (model.next_sentence(model.pool(hidden)).argmax(-1) == batch["random_next"]).tolist()
    assert found["masked words"] == len(right) > 7
    assert found["masked words right"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert found["perplexity of masked words"] == pytest.approx(torch.tensor(logs).mean().neg().exp().item(), rel=1e-3)
    assert found.get("sentence pairs right") == (pytest.approx(sum(told) / 7, abs=1e-4) if pairs else None)
    assert "7 rows of at most 17 tokens" in found["notes"][0]
