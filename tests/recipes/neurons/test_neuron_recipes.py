"""`keifu train perceptron` and `keifu train mlp`: what they learn, say, draw and refuse."""

import json
import re

import pytest
import torch

import keifu
from keifu.cli import main
from keifu.errors import UserError
from keifu.evaluation.plots import decision_boundary
from keifu.recipes.neurons import mlp, mlp_compare, perceptron
from keifu.recipes.running import run_jobs, train_job

PNG = b"\x89PNG\r\n\x1a\n"


def train(*words):
    main(["train", *map(str, words)])


def compared(pair, directory):
    """Train one network of the comparison. Return its figures."""
    subject = mlp.check_learnable(pair)
    job = mlp_compare.job_of(pair, subject, directory)
    return mlp_compare.result_of(pair, subject, job, train_job(job, directory))


def csv(path, rows, header="length,weight,species"):
    path.write_text("\n".join([header, *rows] if header else rows) + "\n")
    return path


@pytest.mark.usefixtures("drawn_boundaries")
@pytest.mark.parametrize("name", ["and", pytest.param("or", marks=pytest.mark.slow)])
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
    assert (tmp_path / "proof.png").read_bytes().startswith(PNG)


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
        (path, r"line 3: 0xFF at byte 3 of the line is not UTF-8"),
        (tmp_path / "no.csv", "There is no file"),
        ("xr", "mean 'xor'"),
    ):
        with pytest.raises(SystemExit):
            train("perceptron", "--data", data, "--out", tmp_path / "run")
        assert re.search(sentence, capsys.readouterr().err)


def test_too_few_corrections_say_how_many_the_bound_allows(tmp_path):
    with pytest.raises(UserError, match=r"After 3 corrections .* \(R/γ\)² = 51: allow more with --max-updates"):
        run_jobs(perceptron.jobs(perceptron.Recipe(max_updates=3)), tmp_path)


def test_the_stages_drawn_are_few_and_hold_both_ends():
    assert decision_boundary.spread(range(5)) == [0, 1, 2, 3, 4]
    assert decision_boundary.spread(range(12)) == [0, 1, 2, 3, 6, 11]
    for count in (7, 8, 100, 5000):
        chosen = decision_boundary.spread(range(count))
        assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == len(set(chosen)) <= 6


MORE_SEEDS = [pytest.param("relu", seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4)]


@pytest.mark.parametrize(("activation", "seed"), [("relu", 0), ("tanh", 5), ("sigmoid", 6), *MORE_SEEDS])
def test_a_hidden_layer_solves_xor_from_every_seed(activation, seed, tmp_path):
    pair = mlp.Recipe("xor", activation=activation, steps=100, seed=seed)
    assert compared(pair, tmp_path).accuracy == 1.0


@pytest.mark.parametrize("loss", sorted(mlp.LOSSES))
def test_every_loss_learns_the_moons(loss, tmp_path):
    pair = mlp.Recipe("moons", loss=loss, steps=100)
    found = compared(pair, tmp_path)
    assert found.accuracy >= 0.9
    assert found.losses[-1][1] < 0.6 * found.losses[0][1]


@pytest.mark.usefixtures("drawn_boundaries")
def test_a_run_is_a_model_a_report_and_pictures(tmp_path, capsys, monkeypatch):
    """Draw the first of the thirteen pictures of one stage, which takes a sixth of a second; the others are copies."""
    draw, drawn = decision_boundary.strip, list[bytes]()

    def strip(points, stages):
        if len(stages) > 1 or not drawn:
            drawn.append(draw(points, stages))
        return drawn[-1] if len(stages) > 1 else drawn[0]

    monkeypatch.setattr(decision_boundary, "strip", strip)
    train("mlp", "--data", "moons", "--steps", 48, "--out", tmp_path)
    assert float(re.search(r"Right: ([\d.]+)% of 80 held-out rows", capsys.readouterr().out)[1]) > 80
    assert (tmp_path / "boundary.png").read_bytes().startswith(PNG)
    assert len(list((tmp_path / "samples").glob("step-*.png"))) == 13
    page = (tmp_path / "report.html").read_text()
    assert "A multi-layer network learns “moons”" in page and page.count("data:image/png") == 14
    assert "keifu train mlp --data moons --steps 48" in page


def test_a_trained_network_keeps_its_scaling_and_the_names_of_its_classes(tmp_path):
    rows = [f"{1000 + n % 7},{-5e-3 * n},{n % 2},{('low', 'mid', 'high')[n // 20]}" for n in range(60)]
    path = csv(tmp_path / "levels.csv", rows, "a,b,c,level")
    train("mlp", "--data", path, "--label", "level", "--hidden", 8, "--steps", 150, "--out", tmp_path / "run")
    model, _ = keifu.load(tmp_path / "run")
    assert model.config.classes == ("high", "low", "mid")
    inputs = torch.tensor([[float(cell) for cell in row.split(",")[:3]] for row in rows])
    names = [model.config.classes[place] for place in model.predict(inputs).tolist()]
    assert sum(name == row.split(",")[3] for name, row in zip(names, rows, strict=True)) >= 50


def test_a_comparison_goes_on_for_longer(tmp_path, capsys):
    words = ("--activations", "relu", "--losses", "cross_entropy")
    train("mlp-compare", "--data", "xor", "--steps", 40, *words, "--out", tmp_path)
    train("mlp-compare", "--resume", tmp_path, "--steps", 60)
    last = (tmp_path / "relu-cross_entropy/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 60


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--activation", "step"), "step's derivative is zero everywhere"),
        (("--activation", "rellu"), "Did you mean 'relu'"),
        (("--loss", "mean_square"), "Did you mean 'mean_squared_error'"),
        (("--data", "mnst"), "Did you mean 'mnist'"),
        (("--augment",), "--augment distorts pictures, and 'xor' has none"),
        (("--data", "mnist", "--label", "digit"), "the data are 'mnist': leave it out"),
        (("--hidden", "4", "0"), "--hidden must be a whole number from 1"),
        (("--dropout", "1.5"), "--dropout must be a number from 0 and below 1"),
        (("--data", "moons", "--hiden", "4"), "--hidden"),
    ],
)
def test_options_that_make_no_sense_are_answered_with_a_sentence(words, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("mlp", "--out", tmp_path, *words)
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "recipe.json").exists()


def test_the_comparison_gives_a_table_curves_and_boundaries(tmp_path, capsys):
    words = ("--activations", "tanh", "relu", "--losses", "cross_entropy", "mean_absolute_error", "--steps", "60")
    train("mlp-compare", "--data", "moons", *words, "--out", tmp_path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert rows[0][2:] == ["cross_entropy", "mean_absolute_error"] and [row[0] for row in rows[1:]] == ["tanh", "relu"]
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [f"{100 * entry['accuracy']:.1f}%" for entry in found] == [rows[1][1], rows[2][1], rows[1][2], rows[2][2]]
    assert min(entry["accuracy"] for entry in found) > 0.8
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("curves", "boundaries"))


@pytest.mark.slow
def test_the_digits_reach_95_percent(tmp_path, capsys):
    train("mlp", "--data", "mnist", "--out", tmp_path)
    assert float(re.search(r"Right: ([\d.]+)% of 1,000 held-out", capsys.readouterr().out)[1]) >= 95


def test_digits_are_learned_drawn_and_distorted(tmp_path, capsys):
    """A short run on the real digits: far from done, and far beyond chance."""
    train("mlp", "--data", "mnist", "--hidden", 64, "--steps", 48, "--augment", "--out", tmp_path)
    assert float(re.search(r"Right: ([\d.]+)% of 1,000 held-out", capsys.readouterr().out)[1]) >= 75
    assert (tmp_path / "samples" / "step-00000048.png").read_bytes().startswith(PNG)
