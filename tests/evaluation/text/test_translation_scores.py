"""BLEU and chrF as sacrebleu gives them, with a language's own tokenizer, and a translator's evaluation on pairs."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.data.translation.pairs import Pairs, split
from keifu.errors import UserError
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text import perplexity, translation
from keifu.evaluation.text.translation import Scorer, language_of
from keifu.inference.text.likelihood import score
from keifu.inference.text.translation import Translation
from keifu.models import llama, transformer

JAPANESE = ["これはペンです。", "私は東京に住んでいます。", "彼女は毎日本を読む。", "猫が好きです。"]
ENGLISH = ["This is a pen.", "I live in Tokyo.", "She reads books every day.", "I like cats."]


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: threads that wait for each other cost tiny models more than they give, and very much on a busy
    machine."""
    torch.set_num_threads(1)


def test_scores_are_sacrebleus_with_their_signatures() -> None:
    found = ["This is the pen.", "I live in Tokyo now.", "She read a book every day.", "I like cats."]
    scores = Scorer("en")(found, ENGLISH)
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(found, [ENGLISH]).score)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(found, [ENGLISH]).score)
    assert "tok:13a" in scores.bleu_signature and "nc:6" in scores.chrf_signature
    assert Scorer("en")(ENGLISH, ENGLISH).bleu == pytest.approx(100)


@pytest.mark.parametrize(("language", "tokenizer"), [("ja", "ja-mecab"), ("zh", "zh"), ("", "13a"), ("fr", "13a")])
def test_the_tokenizer_is_the_languages(language: str, tokenizer: str) -> None:
    scorer = Scorer(language)
    texts = [" ".join([*JAPANESE, *ENGLISH])]
    scores = scorer(texts, texts)
    assert f"tok:{tokenizer}" in scores.bleu_signature and scores.bleu == pytest.approx(100) and not scorer.note


def test_without_mecab_characters_count_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    scorer = Scorer("ja")
    assert "tok:char" in scorer(JAPANESE, JAPANESE).bleu_signature
    assert "characters (tok:char)" in scorer.note and "pip install '.[evaluation]' in keifu's checkout" in scorer.note


def test_without_sacrebleu_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install '.\[evaluation\]' in keifu's checkout"):
        Scorer("en")(ENGLISH, ENGLISH)


def test_a_language_is_told_by_its_script() -> None:
    texts = {"ja": JAPANESE, "zh": ["我住在东京。", "这是一支笔。"], "ko": ["나는 학생입니다."], "": ENGLISH}
    assert {language: language_of(each) for language, each in texts.items()} == {each: each for each in texts}
    assert language_of(["東京都立中央図書館の開館時間変更"]) == "ja", "few signs are kana in a Japanese title"
    assert language_of(["私はTomです。"]) == "ja" and language_of([]) == language_of(["123"]) == ""


def test_scores_by_length_cover_every_pair() -> None:
    sources = ["a", "a b c d e", "a b c d e f", "a " * 46, "a " * 200]
    rows = Scorer("en").by_length(sources, sources, sources, spaced=True).rows
    assert [row[:2] for row in rows] == [("1-5", 2), ("6-10", 1), ("46 and more", 2)]
    rows = Scorer("en").by_length(JAPANESE, ENGLISH, ENGLISH, spaced=False).rows
    assert [row[:2] for row in rows] == [("1-10", 3), ("11-20", 1)]
    assert all(chrf == pytest.approx(100) for *_, chrf in rows)


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    trained = train_tokenizer("characters", [*JAPANESE, *ENGLISH], 128, special_tokens=["<pad>", "</s>"])
    return Tokenizer(trained.backend, {"pad_token": "<pad>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def model(characters: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    ids = {"start_id": characters.pad_id, "end_id": characters.eos_id, "pad_id": characters.pad_id}
    config = transformer.Config(
        characters.vocab_size, context_length=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2, **ids
    )
    return transformer.build(config).eval()


def test_a_file_counts_whole_and_the_figures_are_those_of_its_translations(
    model: torch.nn.Module, characters: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{a}\t{b}\n" for a, b in zip(ENGLISH, JAPANESE, strict=True)))
    assert translation.takes(model) and translation.accepts(str(file))
    found = translation.evaluate(model, characters, EvalRequest(str(file), by_length=True, beam=2))
    assert found.items and [row[:2] for row in found.items.rows] == list(zip(ENGLISH, JAPANESE, strict=True))
    texts = [row[2] for row in found.items.rows]
    assert found.figures["chrF"] == pytest.approx(sacrebleu.corpus_chrf(texts, [JAPANESE]).score, abs=0.006)
    assert found.figures["pairs"] == 4 and "tok:ja-mecab" in str(found.figures["BLEU signature"])
    table = found.tables["by length"]
    assert table.columns[0] == "source words" and sum(row[1] for row in table.rows) == 4
    back = translation.evaluate(model, characters, EvalRequest(str(file), limit=3, reverse=True, by_length=True))
    assert back.figures["pairs"] == 3 and "tok:13a" in str(back.figures["BLEU signature"])
    assert back.tables["by length"].columns[0] == "source characters"


def test_of_a_catalogue_name_the_held_out_pairs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"文{n}。", f"Sentence {n}.") for n in range(60)]
    pairs = Pairs("tatoeba-ja-en", rows, ("ja", "en"))
    monkeypatch.setattr(translation, "read_pairs", lambda name, reverse, *how: pairs.reversed() if reverse else pairs)
    forward, _ = translation.test_pairs(EvalRequest("tatoeba-ja-en"))
    backward, _ = translation.test_pairs(EvalRequest("tatoeba-ja-en", reverse=True))
    assert forward.rows == split(pairs).test and backward.rows == [(b, a) for a, b in forward.rows]
    assert backward.languages == ("en", "ja")


def test_pairs_with_a_near_copy_in_training_are_scored_apart(
    model: torch.nn.Module, characters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = "これはペンです私東京に住んでいま彼女毎日本を読む猫が好き"
    distinct = [((known[n % 20] + known[n % 7 + 3]) * (n % 3 + 3), f"{'pen cat ' * n}Tokyo.") for n in range(40)]
    pairs = Pairs("tatoeba-ja-en", distinct, ("ja", "en"))
    held = split(pairs).test
    near = [(held[0][0] + "私", "She reads a pen every day in Tokyo.")]
    monkeypatch.setattr(translation, "read_pairs", lambda name, reverse, *how: pairs.reversed() if reverse else pairs)
    for reverse in (False, True):
        found = translation.training_pairs("tatoeba-ja-en", ("en", "ja") if reverse else ("ja", "en"))
        assert found == [pair[::-1] if reverse else pair for pair in split(pairs).train]
    monkeypatch.setattr(translation, "training_pairs", lambda on, languages: near)
    result = translation.evaluate(model, characters, EvalRequest("tatoeba-ja-en", beam=1))
    table = result.tables["near copies in the training part"]
    assert [row[:2] for row in table.rows] == [("without", len(held) - 1), ("with", 1)]


def test_intervals_are_those_of_a_bootstrap_over_sentences() -> None:
    found = ["This is the pen.", "I live in Tokyo now.", "She read a book every day.", "I like cats."] * 5
    references, scorer = ENGLISH * 5, Scorer("en")
    metrics = sacrebleu.corpus_bleu, sacrebleu.corpus_chrf
    for text, one in zip(scorer.intervals(found, references), metrics, strict=True):
        low, high = map(float, text.split(" to "))
        generator = np.random.default_rng(1)
        again = []
        for _ in range(300):
            chosen = generator.integers(0, 20, 20)
            again.append(one([found[n] for n in chosen], [[references[n] for n in chosen]]).score)
        wanted = np.percentile(again, [2.5, 97.5])
        width = wanted[1] - wanted[0]
        assert abs(low - wanted[0]) < 0.25 * width and abs(high - wanted[1]) < 0.25 * width


def test_the_direction_is_the_models_where_its_run_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs("tatoeba-ja-en", [(f"文{n}。", f"Sentence {n}.") for n in range(60)], ("ja", "en"))
    monkeypatch.setattr(translation, "read_pairs", lambda name, reverse, *how: pairs.reversed() if reverse else pairs)
    told = {
        (("ja", "en"), False): (("ja", "en"), 0),
        (("en", "ja"), False): (("en", "ja"), 1),  # swapped, and said
        (("en", "ja"), True): (("en", "ja"), 0),
        (("ja", "en"), True): (("en", "ja"), 1),  # as asked for, though it fits the model badly
        (("en", "de"), False): (("ja", "en"), 1),
        (("", ""), False): (("ja", "en"), 0),
    }
    for (trained, reverse), (languages, remarks) in told.items():
        found, notes = translation.test_pairs(EvalRequest("tatoeba-ja-en", reverse=reverse, languages=trained))
        assert (found.languages, len(notes)) == (languages, remarks)
        assert found.rows[0][0].startswith("文") == (languages[0] == "ja")


def test_the_target_language_of_a_plain_file_is_the_models(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Tom\tトム\n")
    pairs, _ = translation.test_pairs(EvalRequest(str(tmp_path / "a.tsv"), languages=("en", "ja")))
    assert pairs.languages == ("en", "ja")


def test_translations_that_were_cut_and_unknown_tokens_are_said() -> None:
    whole, cut = (Translation("ab", "c", -1.0, 1, complete, 10, unknown=3 * complete) for complete in (True, False))
    assert translation.remarks([cut, whole, cut]) == [
        "2 of 3 translations reached their limit of tokens and were not finished.",
        "3 tokens of the sources (10.00%) are unknown to the model's vocabulary.",
    ]
    assert translation.remarks([replace(whole, unknown=0)]) == []


def test_a_language_models_loss_is_that_of_its_text(tmp_path: Path, characters: Tokenizer) -> None:
    torch.manual_seed(0)
    config = llama.Config(characters.vocab_size, context_length=12, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    writer = llama.build(config).eval()
    text = "".join(ENGLISH)[:41]
    (tmp_path / "text.txt").write_text(text)
    assert perplexity.takes(writer) and not translation.takes(writer)
    found = perplexity.evaluate(writer, characters, EvalRequest(str(tmp_path / "text.txt"), batch_size=2)).figures
    end = characters.eos_id
    ids = [end, *characters.encode(text), end]
    total = sum(float(score(writer, torch.tensor([ids[i : i + 12]])).sum()) for i in range(0, 42, 11))
    assert found["tokens"] == 42 and found["loss"] == pytest.approx(-total / 42, abs=1e-3)
    bits = -total / 42 / torch.log(torch.tensor(2.0)) * 42 / 41
    assert found["bits per byte"] == pytest.approx(float(bits), abs=1e-3)
