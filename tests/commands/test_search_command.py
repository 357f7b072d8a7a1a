"""`keifu search`: passages of Markdown, text and HTML with their lines, an index that grows, and its damage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from keifu import checkpoints, cli
from keifu.commands.shared.inputs import warn_of_language
from keifu.data.text.passages import LONGEST, read_passages
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.embeddings import encoders
from keifu.inference.embeddings.reranker import rank
from keifu.models import bert

MARKDOWN = """# Notes

First the cat
sat on a mat.

```
# no heading
seven dogs
```

## Dogs ##
Seven dogs ran.
"""
HTML = """<html><head><title>x</title><script>let a = 1</script></head><body>
<h1>Far
away</h1>
<p>The cat <b>ran</b> &amp; sat.</p>
<ul><li>one</li><li>two</li></ul></body></html>
"""
WORDS = ["the", "cat", "sat", "on", "a", "mat", "seven", "dogs", "ran", "far", "away", "notes", "first"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an encoder of a few thousand weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("wordpiece", [" ".join(WORDS)] * 2, 200)
    small = bert.Config(
        context_length=64, dim=24, hidden_dim=40, n_layers=1, n_heads=3, words=False, next_sentence=False
    )
    folder = tmp_path_factory.mktemp("encoder")
    checkpoints.save(bert.build(replace(small, vocab_size=tokenizer.vocab_size)), tokenizer, folder)
    return str(folder)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of documents, and set an empty cache."""
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "notes"
    (folder / ".hidden").mkdir(parents=True)
    (folder / "a.md").write_text(MARKDOWN)
    (folder / "b.html").write_text(HTML)
    (folder / ".hidden" / "c.md").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def search(capsys: pytest.CaptureFixture, model: str, *words: str) -> list[dict]:
    cli.main(["search", "notes", *words, "--model", model, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_passages_have_their_lines_and_headings(notes: Path) -> None:
    found = [(each.line, each.heading, each.text) for each in read_passages(notes / "a.md", "a.md")]
    assert found == [
        (3, "Notes", "First the cat sat on a mat."), (7, "Notes", "# no heading seven dogs"),
        (12, "Dogs", "Seven dogs ran."),
    ]  # fmt: skip
    found = [(each.line, each.heading, each.text) for each in read_passages(notes / "b.html", "b.html")]
    assert found == [(4, "Far away", "The cat ran & sat."), (5, "Far away", "one"), (5, "Far away", "two")]


def test_a_long_paragraph_is_several_passages(notes: Path) -> None:
    lines = [f"line {number} " + "x" * 90 for number in range(1, 30)] + ["y" * (2 * LONGEST + 5)]
    (notes / "long.txt").write_text("\n".join(lines))
    found = read_passages(notes / "long.txt", "long.txt")
    assert all(len(each.text) <= LONGEST for each in found) and [each.line for each in found][-3:] == [30, 30, 30]
    assert " ".join(each.text for each in found[:-3]) == " ".join(lines[:-1])
    assert all(lines[each.line - 1].startswith(each.text[:7]) for each in found)


def test_the_same_words_are_found_with_file_and_line(notes: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    first, *rest = search(capsys, model, "Dogs: Seven dogs ran.", "--count", "6")
    assert (first["file"], first["line"]) == ("notes/a.md", 12) and first["similarity"] == pytest.approx(1, abs=1e-4)
    assert len(rest) == 5 and {each["file"] for each in rest} == {"notes/a.md", "notes/b.html"}
    values = [each["similarity"] for each in rest]
    assert values == sorted(values, reverse=True)
    cli.main(["search", "notes", "seven", "--model", model, "--count", "1"])
    assert "notes/" in capsys.readouterr().out


def test_each_precision_has_an_index_of_its_own(notes: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    whole, half = search(capsys, model, "the cat"), search(capsys, model, "the cat", "--precision", "bfloat16")
    files = [*(notes.parent / "cache" / "search").glob("*.safetensors")]
    assert len(files) == 2 and search(capsys, model, "the cat") == whole != half


def test_only_new_passages_are_embedded_again(
    notes: Path, model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keifu.inference.embeddings import search as searched

    counts = []

    def counted(model, rows, *rest):
        counts.append(len(rows))
        return encoders.embed_rows(model, rows, *rest)

    monkeypatch.setattr(searched, "embed_rows", counted)
    whole = search(capsys, model, "the cat")
    assert search(capsys, model, "the cat") == whole and counts == [6]
    (notes / "a.md").write_text(MARKDOWN.replace("Seven dogs ran.", "Seven cats sat."))
    search(capsys, model, "the cat")
    assert counts == [6, 1]
    [index] = (notes.parent / "cache" / "search").glob("*.safetensors")
    for damage in (b"", index.read_bytes()[:-9], b"x" * 99):
        index.write_bytes(damage)
        assert len(search(capsys, model, "the cat")) == 5
    assert counts == [6, 1, 6, 6, 6]
    (notes / "a.md").unlink()
    left = len(search(capsys, model, "the cat"))
    with safe_open(index, "pt") as file:
        kept = json.loads((file.metadata() or {})["passages"])
    assert len(kept) == left < 5, "passages that are gone leave the index"


def test_what_cannot_be_searched_is_said(notes: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    (notes / "bad.txt").write_bytes(b"\xff\xfe\xff")
    search(capsys, model, "the cat", "--count", "1")
    cli.main(["search", "notes", "cat", "--model", model, "--count", "1"])
    assert "Left out: " in capsys.readouterr().err
    (notes.parent / "empty").mkdir()
    for words, told in ((["empty", "x"], "holds no document"), (["nowhere", "x"], "There is no folder nowhere")):
        with pytest.raises(SystemExit):
            cli.main(["search", *words, "--model", model])
        assert told in capsys.readouterr().err


def test_minilm_says_that_it_reads_english(capsys: pytest.CaptureFixture) -> None:
    for question, passage, warned in (("cat", "the cat", False), ("猫", "the cat", True), ("cat", "猫が好き", True)):
        warn_of_language("minilm", [question], [passage])
        assert ("minilm reads English" in capsys.readouterr().err) == warned
    warn_of_language("minilm", ["cat", "猫", "dog"])
    warn_of_language("other", ["猫"])
    assert not capsys.readouterr().err


def test_a_question_that_is_no_text_is_refused_before_the_folder_is_embedded(
    notes: Path, model: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["search", "notes", "\udcff", "--model", model])
    error = capsys.readouterr().err
    assert "is half a surrogate pair, not text" in error and "Embedding" not in error


def test_a_cross_encoder_sorts_the_nearest_passages(notes: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(1)
    encoder, tokenizer = checkpoints.load(model)
    judge = bert.build(replace(encoder.config, labels=("relevant",)))
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else None
    checkpoints.save(judge, tokenizer, notes.parent / "judge")
    found = search(capsys, model, "the cat", "--rerank", "judge", "--count", "6")
    passages = [f"{each['heading']}: {each['text']}" if each["heading"] else each["text"] for each in found]
    ranking = rank(judge.eval(), tokenizer, "the cat", passages)
    assert [each["score"] for each in found] == pytest.approx(ranking.scores.tolist(), abs=1e-5)
    assert len(found) == 6 and sorted(ranking.scores.tolist(), reverse=True) == ranking.scores.tolist()
    near = search(capsys, model, "the cat", "--count", "1")
    assert found[0]["text"] != near[0]["text"], "the cross-encoder prefers another passage"
    assert search(capsys, model, "the cat", "--rerank", "judge", "--count", "1")[0] == found[0]
    with pytest.raises(SystemExit):
        cli.main(["search", "notes", "the cat", "--model", model, "--rerank", model])
    assert "gives no score for a query and a document" in capsys.readouterr().err
