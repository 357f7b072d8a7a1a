"""`keifu embed` and `keifu classify` on encoders of a few thousand weights: texts from anywhere, vectors and labels."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keifu import checkpoints, cli
from keifu.commands import classify
from keifu.data.text.skip_grams import word_tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.evaluation.classification.metrics import Confusion
from keifu.models import bert, llama
from keifu.models.classic import word2vec

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "ran", "far", "away"]
SMALL = bert.Config(context_length=16, dim=24, hidden_dim=40, n_layers=1, n_heads=3, words=False, next_sentence=False)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders with an encoder, one that has labels, and a model that writes."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("wordpiece", [" ".join(WORDS)] * 2, 200)
    config = replace(SMALL, vocab_size=tokenizer.vocab_size)
    causal = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=16, dim=16, hidden_dim=16, n_layers=1, n_heads=2
    )
    built = {
        "plain": bert.build(config),
        "labelled": bert.build(replace(config, labels=("cats", "dogs", "mats"))),
        "causal": llama.build(causal),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in built}
    for name, model in built.items():
        checkpoints.save(model, tokenizer, folders[name])
    return {name: str(folder) for name, folder in folders.items()}


def out(capsys: pytest.CaptureFixture, *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Return the error on stderr, after checking that it is one line."""
    with pytest.raises(SystemExit):
        cli.main(words)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_arguments_a_file_and_a_pipe_are_the_same_texts(
    models: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(b"the cat\r\nseven dogs\n")
    told = [out(capsys, "embed", models["plain"], "the cat", "seven dogs")]
    told += [out(capsys, "embed", models["plain"], "--file", str(file))]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\nseven dogs\n")))
    told += [out(capsys, "embed", models["plain"])]
    assert len(set(told)) == 1
    lines = [json.loads(line) for line in told[0].splitlines()]
    assert [line["text"] for line in lines] == ["the cat", "seven dogs"]
    assert np.linalg.norm([line["vector"] for line in lines], axis=1) == pytest.approx([1, 1], abs=1e-6)


def test_vectors_go_into_a_file(models: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ("embed", models["plain"], "the cat", "seven dogs", "far")
    printed = [json.loads(line)["vector"] for line in out(capsys, *words).splitlines()]
    assert out(capsys, *words, "-o", str(tmp_path / "v.npy")) == ""
    vectors = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert vectors.dtype == np.float32 and vectors.shape == (3, 24)
    assert np.abs(vectors - printed).max() < 1e-7
    out(capsys, *words, "--out", str(tmp_path / "v.json"))
    assert [row["vector"] for row in json.loads((tmp_path / "v.json").read_text())] == printed


def test_the_nearest_are_printed_as_a_table(
    models: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    texts = ("the cat", "the cat sat", "seven dogs")
    rows = [line.split("\t") for line in out(capsys, "embed", models["plain"], *texts, "--nearest", "2").splitlines()]
    assert rows[0] == ["text", "similarity", "nearest"] and len(rows) == 7
    assert [row[0] for row in rows[1:]] == ["the cat", "", "the cat sat", "", "seven dogs", ""]
    assert {rows[1][2], rows[2][2]} == {"the cat sat", "seven dogs"} and float(rows[1][1]) >= float(rows[2][1])
    file = tmp_path / "among.txt"
    file.write_text("seven dogs\nfar away\n")  # a text may be the first of those that are searched
    words = ("embed", models["plain"], "seven dogs", "--nearest", "1", "--among", str(file))
    assert out(capsys, *words).splitlines()[1] == "seven dogs\t1.000\tseven dogs"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a word2vec with four directions: in the plane, a king is male and royal.

    The vectors have unequal lengths, so that sums of vectors and of directions have other neighbours.
    """
    tokenizer = word_tokenizer(["<unk>", "king", "queen", "man", "woman", "crown", "apple"])
    model = word2vec.build(word2vec.Config(7, 3))
    points = [[1, 5, 1], [9, 9, 1], [-2, 2, 1], [4, 0, 1], [-3, 0, 1], [0, 1, 0], [1, -7, 4]]
    model.embedding.weight.data = torch.tensor(points, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("words")
    checkpoints.save(model, tokenizer, folder)
    return str(folder)


def nearest_rows(capsys: pytest.CaptureFixture, *arguments: str) -> list[list[str]]:
    return [line.split("\t") for line in out(capsys, "embed", *arguments).splitlines()[1:]]


def test_words_are_added_and_subtracted_by_direction(words: str, capsys: pytest.CaptureFixture) -> None:
    model: Any = checkpoints.load(words)[0]
    directions = torch.nn.functional.normalize(model.embedding.weight.detach().double(), dim=-1)
    _, king, queen, man, woman, crown, _ = directions
    for text, expected in (("king - man + woman", king - man + woman), ("- Man + crown", crown - man), ("king", king)):
        printed = json.loads(out(capsys, "embed", words, text))["vector"]
        assert printed == pytest.approx((expected / expected.norm()).tolist(), abs=1e-6)
    direction = (king - man + woman) / (king - man + woman).norm()
    rows = nearest_rows(capsys, words, "king - man + woman", "crown", "--nearest", "2")
    assert rows[0] == ["king - man + woman", f"{direction @ queen:.3f}", "queen"]
    assert rows[1] == ["", f"{direction @ crown:.3f}", "crown"]
    assert [row[2] for row in rows[2:]] == ["king", "queen"], "neither the word itself nor <unk> is a neighbour"


def test_words_may_be_searched_among_others(words: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "among.txt").write_text("man\nwoman\n")
    found = nearest_rows(capsys, words, "king", "--nearest", "1", "--among", str(tmp_path / "among.txt"))
    assert [row[2] for row in found] == ["man"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("king man", '"king man" has "man" without a sign'),
        ("king + Pear", '"Pear" is not in the vocabulary'),
        ("man - man", '"man - man" adds up to nothing'),
        ("king -", 'has "-" without a sign'),
    ],
)
def test_a_sum_without_a_meaning_is_refused(words: str, capsys: pytest.CaptureFixture, text: str, reason: str) -> None:
    assert reason in refused(capsys, "embed", words, text)


def test_more_neighbours_than_words_are_refused(words: str, capsys: pytest.CaptureFixture) -> None:
    assert "there are only 4" in refused(capsys, "embed", words, "king + man", "--nearest", "5")


def test_many_texts_show_how_far_the_work_has_come(
    models: dict[str, str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keifu.commands.embed.SILENT", 3)
    cli.main(["embed", models["plain"], *WORDS[:6]])
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 6 and "Embedding: done, 6 texts" in told.err


def test_a_long_text_is_cut_only_where_that_is_asked_for(models: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    long = " ".join(WORDS * 2)
    assert "Text 2 of 2 has 26 tokens; the model takes 16" in refused(capsys, "embed", models["plain"], "cat", long)
    cli.main(["embed", models["plain"], "cat", long, "--cut"])
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and told.err == "1 of 2 texts were cut to the model's 16 tokens.\n"


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        ("causal", ["cat"], "is a DecoderLM, which gives no vectors for texts: choose an encoder"),
        ("plain", ["cat", ""], "The command line: text 2 of 2 is empty"),
        ("plain", ["cat", "--file", "x.txt"], "There are two sources of texts, the arguments and x.txt"),
        ("plain", ["--file", "nowhere.txt"], "There is no file 'nowhere.txt'."),
        ("plain", ["cat", "-o", "v.txt"], "go into a .npy or a .json file, and v.txt is neither"),
        ("plain", ["cat", "--nearest", "1"], "1 nearest texts were requested, but there are only 0"),
        ("plain", ["cat", "--nearest", "0"], "--nearest must be a whole number from 1"),
        ("plain", ["cat", "--among", "x.txt"], "say how many with --nearest"),
        ("plain", ["cat", "--batch-size", "0"], "--batch-size must be a whole number from 1"),
    ],
)
def test_what_cannot_be_embedded_is_one_sentence(
    models: dict[str, str], model: str, words: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    assert sentence in refused(capsys, "embed", models[model], *words)


@pytest.mark.parametrize(("content", "sentence"), [("", "holds no text"), ("a\n\nb\n", "line 2 of 3 is empty")])
def test_an_empty_file_and_an_empty_line_are_named(
    models: dict[str, str], content: str, sentence: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text(content)
    assert sentence in refused(capsys, "embed", models["plain"], "--file", str(file))


def test_each_text_gets_a_label_and_its_probabilities(models: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    words = ("classify", models["labelled"], "the cat", "seven dogs ran")
    lines = [json.loads(line) for line in out(capsys, *words, "--json").splitlines()]
    for line in lines:
        shares = line["probabilities"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5) and line["label"] == max(shares, key=shares.get)
        assert all(share == round(share, 8) for share in shares.values())  # float32 has no more digits
    rows = [row.split("\t") for row in out(capsys, *words).splitlines()]
    assert rows[0] == ["label", "probability", "next", "text"] and [row[3] for row in rows[1:]] == [*words[2:]]
    for row, line in zip(rows[1:], lines, strict=True):
        shown = [row[0], *(part.split()[0] for part in row[2].split(", "))]
        assert shown == sorted(line["probabilities"], key=line["probabilities"].get, reverse=True)
        assert row[0] == line["label"] and float(row[1]) == pytest.approx(line["probabilities"][row[0]], abs=6e-4)


def test_a_table_with_labels_gives_figures_and_a_picture(
    models: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    texts = [" ".join(WORDS[n : n + 3]) for n in range(9)]
    found = [
        json.loads(line)["label"] for line in out(capsys, "classify", models["labelled"], *texts, "--json").splitlines()
    ]
    right = ["dogs", *found[1:]] if found[0] != "dogs" else ["cats", *found[1:]]
    table = tmp_path / "table.csv"
    table.write_text("kind,words\n" + "".join(f"{a},{b}\n" for a, b in zip(right, texts, strict=True)))
    words = ("classify", models["labelled"], "--on", str(table), "--text", "words", "--label", "kind")
    told = json.loads(out(capsys, *words, "--json", "--picture", str(tmp_path / "c.png")))
    assert told["accuracy"] == pytest.approx(8 / 9) and sum(map(sum, told["confusion"])) == 9
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    plain = out(capsys, *words)
    assert "right \\ given\tcats\tdogs\tmats\n" in plain
    assert plain.splitlines()[-1].startswith("Accuracy 88.9% of 9 texts")  # where a terminal shows it last


def test_a_table_in_another_encoding_is_read_by_its_name(
    models: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_bytes("表,label\nthe cat,cats\nthe dogs,dogs\n".encode("cp932"))
    words = ("classify", models["labelled"], "--on", str(tmp_path / "table.csv"), "--text", "表")
    assert "table.csv, line 1: 0x95 at byte 1 of the line is not UTF-8" in (said := refused(capsys, *words))
    assert "--encoding cp932" in said
    report = json.loads(out(capsys, *words, "--encoding", "cp932", "--json"))
    assert sum(map(sum, report["confusion"])) == 2
    assert "Did you mean 'cp932'" in refused(capsys, *words, "--encoding", "cp93")


@pytest.mark.parametrize("given", ["a cat,a cat,a dog", "a cat", " , ", "a cat, a cat"])
def test_labels_are_different_and_two_at_least(given: str) -> None:
    with pytest.raises(UserError, match="give two at least, each once"):
        classify._labels(given)


def test_of_many_labels_only_the_worst_are_printed(capsys: pytest.CaptureFixture) -> None:
    labels = [f"label {number}" for number in range(77)]
    right = torch.arange(77).repeat_interleave(10)
    given = right.clone()
    given[30:35] = 5  # half of label 3
    given[700:702] = 3
    classify._show_confusion(Confusion.of(right, given, labels), False, classify.Options("m", on="t"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20 and lines[-1].startswith("Accuracy 99.1% of 770 texts")
    assert lines[1].startswith("label 3\t") and sum(line.startswith("label") for line in lines) == 1 + 10 + 2
    assert "The 10 lowest F1 of 77 labels; --json prints all" in "\n".join(lines)
    assert "label 3\tlabel 5\t5" in lines and "label 70\tlabel 3\t2" in lines


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        ("causal", ["cat"], "generates text and has no head for labels: fine-tune it first (keifu train gpt1-finetune"),
        ("plain", ["cat"], "has no classification head: train one with keifu train classifier"),
        ("labelled", ["cat", "--picture", "c.png"], "name the table with --on"),
        ("labelled", ["cat", "--on", "table.csv"], "There are two sources of texts, table.csv"),
        ("labelled", ["--on", "table.csv", "--text", "txt"], "Did you mean 'text'"),
        ("labelled", ["--on", "table.csv"], "has labels that"),
        ("labelled", [" ".join(WORDS * 2)], "has 26 tokens; the model takes 16"),
        ("labelled", [" "], "holds no text"),
    ],
)
def test_what_cannot_be_classified_is_one_sentence(
    models: dict[str, str], model: str, words: list[str], sentence: str, capsys: pytest.CaptureFixture,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("text,label\ncat,cats\ndog,dog\n")
    said = refused(capsys, "classify", models[model], *words)
    assert sentence in said and ("never saw: 'dog'. It knows 'cats'" in said or "has labels" not in said)
