"""`keifu train perceptron` and `keifu train mlp`: what they learn, say, draw and refuse."""

import re

import pytest
import torch

import keifu
from keifu.cli import main
from keifu.errors import UserError
from keifu.evaluation import boundaries
from keifu.recipes import perceptron

PNG = b"\x89PNG\r\n\x1a\n"


def train(*words):
    main(["train", *map(str, words)])


def csv(path, rows, header="length,weight,species"):
    path.write_text("\n".join([header, *rows] if header else rows) + "\n")
    return path


@pytest.mark.parametrize("name", ["and", "or"])
def test_the_perceptron_learns_logic_and_prints_the_bound(name, tmp_path, capsys):
    train("perceptron", "--data", name, "--out", tmp_path)
    updates, bound = re.search(
        r"after (\d+) corrections; Novikoff's bound is \(R/γ\)² = ([\d.]+)\.\n", capsys.readouterr().out
    ).groups()
    assert 0 < int(updates) <= float(bound)
    assert (tmp_path / "boundary.png").read_bytes().startswith(PNG)
    neuron, _ = keifu.load(tmp_path)
    table = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    assert neuron(table).tolist() == {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1]}[name]


def test_xor_is_refused_with_a_proof_and_the_recipe_to_use(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train("perceptron", "--data", "xor", "--out", tmp_path)
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "not linearly separable" in said and "(0.5, 0.5)" in said and "keifu train mlp --data xor" in said
    assert (tmp_path / "boundary.png").read_bytes().startswith(PNG)


def test_a_csv_file_is_learned_whatever_the_size_of_its_columns(tmp_path, capsys):
    rows = [f"{1e-6 * n},{1e5 * (n + 30 * (n % 2))},{['cat', 'dog'][n % 2]}" for n in range(20)]
    train("perceptron", "--data", csv(tmp_path / "pets.csv", rows), "--out", tmp_path / "run")
    assert "The output is dog where" in capsys.readouterr().out
    neuron, _ = keifu.load(tmp_path / "run")
    table = torch.tensor([[float(cell) for cell in row.split(",")[:2]] for row in rows], dtype=torch.float64)
    assert neuron(table).tolist() == [n % 2 for n in range(20)]


def test_a_csv_file_without_a_header_and_with_three_columns(tmp_path, capsys):
    rows = [f"{n % 3};{n};{n * n};{int(n > 5)}" for n in range(12)]
    train("perceptron", "--data", csv(tmp_path / "plain.csv", rows, header=""), "--out", tmp_path / "run")
    assert "12 rows" in capsys.readouterr().out
    assert not (tmp_path / "run" / "boundary.png").exists()


@pytest.mark.parametrize(
    ("rows", "header", "options", "sentence"),
    [
        (["1,2,cat", "1,x,dog"], "a,b,kind", (), r"line 3, column 'b': 'x' is no finite number"),
        (["1,2,cat", "1,nan,dog"], "a,b,kind", (), r"line 3, column 'b': 'nan' is no finite number"),
        (["1,2,cat", "1,2"], "a,b,kind", (), "line 3, has 2 cells where the first line has 3"),
        (["1,2,cat", "1,2,"], "a,b,kind", (), "line 3, column 'kind': the label is missing"),
        (["1,2,cat", "3,4,dog"], "a,b,kind", ("--label", "knd"), "Did you mean 'kind'"),
        (["1,2,cat", "3,4,cat"], "a,b,kind", (), r"parts two classes, and .* has 1 \(cat\)"),
        (["1,2,a", "3,4,b", "5,6,c"], "a,b,kind", (), "has 3 .*keifu train mlp"),
        ([], "", (), "is empty"),
        ([], "a,b,kind", (), "one row below any header"),
        (["1,2,cat", "1,2,dog"], "a,b,kind", (), "not linearly separable"),
    ],
)
def test_bad_tables_are_answered_with_a_sentence(rows, header, options, sentence, tmp_path, capsys):
    path = csv(tmp_path / "table.csv", rows, header)
    with pytest.raises(SystemExit):
        train("perceptron", "--data", path, "--out", tmp_path / "run", *options)
    said = capsys.readouterr().err
    assert re.search(sentence, said) and said.count("\n") == 1


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,b,kind\n1,2,x\n1,\xff,y\n")
    for data, sentence in (
        (path, r"no text in UTF-8 \(line 3\)"),
        (tmp_path / "no.csv", "There is no file"),
        ("xr", "mean 'xor'"),
    ):
        with pytest.raises(SystemExit):
            train("perceptron", "--data", data, "--out", tmp_path / "run")
        assert re.search(sentence, capsys.readouterr().err)


def test_too_few_corrections_say_how_many_the_bound_allows(tmp_path):
    with pytest.raises(UserError, match=r"After 3 corrections .* \(R/γ\)² = 51: allow more with --max-updates"):
        perceptron.run(perceptron.Recipe(max_updates=3), tmp_path, resume=False)


def test_the_stages_drawn_are_few_and_hold_both_ends():
    assert boundaries.spread(range(5)) == [0, 1, 2, 3, 4]
    assert boundaries.spread(range(12)) == [0, 1, 2, 3, 6, 11]
    for count in (7, 8, 100, 5000):
        chosen = boundaries.spread(range(count))
        assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == len(set(chosen)) <= 6
