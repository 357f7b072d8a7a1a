"""The report of a run: a sentence about what was learned, its words in Japanese, and several runs in one page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keifu import cli
from keifu.errors import UserError
from keifu.training.run import outcome, report
from keifu.training.run.report_words import JAPANESE, SENTENCES, language

COST = {"parameters": 1000, "parameter_bytes": 4000, "optimizer_bytes": 8000, "fixed_bytes": 0, "row_bytes": 10,
        "micro_batch": 2, "available": 10**9}  # fmt: skip
LINES = [
    {"step": 0, "validation_loss": 8.0, "bits_per_byte": 3.0},
    {"step": 10, "loss": 5.0, "tokens_per_second": 100.0},
    {"step": 20, "loss": 4.0, "tokens_per_second": 100.0},
    {"step": 20, "validation_loss": 4.5, "bits_per_byte": 1.5},
]


def write_run(folder: Path, lines: list[dict[str, Any]] = LINES, **settings: Any) -> Path:
    """Write the files of a finished run."""
    folder.mkdir(parents=True)
    figures = {name: value for line in lines for name, value in line.items() if name != "step"}
    recipe = {
        "title": folder.name, "finished": True, "steps": 20, "unit": "tokens", "cost": COST, "options": {"depth": 1},
        "settings": {"seed": 0, **settings}, "figures": {**figures, "seconds": 90.0, "flops_utilisation": 0.004},
        "resolved": {"device": "cpu", "flops_per_second": 1e9, "precision": "float32", "micro_batch": 2},
        "versions": {"keifu": "0"}, "hashes": {}, "data_fingerprint": "abc",
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEIFU_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)


def validations(first: float, last: float, **more: tuple[float, float]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the lines and the figures of a run with two validations. more: further figures, before and after."""
    before, after = ({f"validation_{name}": pair[n] for name, pair in more.items()} for n in (0, 1))
    lines = [{"step": 0, "validation_loss": first, **before}, {"step": 9, "validation_loss": last, **after}]
    return lines, {"validation_loss": last, **after}


def test_the_losses_of_two_opponents_are_not_judged() -> None:
    """DCGAN's digits are good after its validation loss rose from 2.07 to 2.77 while the training loss fell."""
    lines, figures = validations(2.07, 2.77, discriminator_loss=(1.38, 0.89))
    assert "Two networks learn against each other" in outcome.learned(lines, figures)
    lines += [{"step": 1, "loss": 3.0}, {"step": 9, "loss": 2.5}]
    assert outcome.rising(lines) == []
    assert outcome.rising([{name: line[name] for name in line if "discr" not in name} for line in lines])


def test_what_was_learned_is_one_sentence() -> None:
    told = outcome.learned(*validations(2.3, 0.2, accuracy=(0.1, 0.96)))
    assert told == "Learned: 96.0% of the held-out data are right, 10.0% before the training."
    told = outcome.learned(*validations(9.0, 5.0, pair_accuracy=(0.5, 0.9), word_accuracy=(0.0, 0.25)))
    assert told == "Learned: 25.0% of the held-out words are right, 0.0% before the training."
    told = outcome.learned(LINES, LINES[-1])
    assert told == (
        "Learned: the model gives a held-out token a probability of 0.011 (geometric mean), 0.00034 before the "
        "training."
    )
    assert outcome.learned(*validations(1.0, 0.25)) == "Learned: the loss on held-out data fell from 1 to 0.25."
    told = outcome.learned(*validations(1.0, 0.995, accuracy=(0.1, 0.2)))
    assert told.startswith("Nothing was learned that helps with held-out data: their loss was 1 before")
    assert outcome.learned([], {}) == outcome.learned([{"step": 5, "validation_loss": 1.0}], LINES[-1]) == ""


def test_the_report_is_japanese_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_curves
) -> None:
    folder = write_run(tmp_path / "run")
    with drawn_curves():
        report.write_report(folder)
    english = (folder / "report.html").read_text()
    assert '<html lang="en">' in english and "<b>Learned: the model gives" in english and ">step</text>" in english
    assert "of the matmul peak" not in english  # 0.4%: nothing that a reader could use
    monkeypatch.setenv("LANG", "ja_JP.UTF-8")
    with drawn_curves():
        cli.main(["report", str(folder)])
    japanese = (folder / "report.html").read_text()
    assert '<html lang="ja">' in japanese
    for text in ("検証用トークンに与える確率（幾何平均）は、学習前の 0.00034 から 0.011", "<h2>学習の設定</h2>",
                 ">ステップ</text>", "検証の損失", "トークン/秒", "<h2>曲線</h2>"):  # fmt: skip
        assert text in japanese, text
    for text in ("Curves", "Samples", ">loss</text>", "validation loss", "Fingerprint"):
        assert text not in japanese, text
    monkeypatch.setenv("KEIFU_LANG", "en")
    assert language() == "en"


def test_a_translation_has_the_fields_of_its_text() -> None:
    for english, japanese in [*JAPANESE.items(), *SENTENCES.values()]:
        assert sorted(re.findall(r"{[^}]*}", english)) == sorted(re.findall(r"{[^}]*}", japanese)), english


def test_two_runs_are_laid_over_each_other(tmp_path: Path, drawn_curves) -> None:
    better = [{**line, **({"validation_loss": 3.25} if line.get("validation_loss") == 4.5 else {})} for line in LINES]
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", better, seed=2)]
    page = tmp_path / "new/page.html"
    with drawn_curves():
        cli.main(["report", *map(str, runs), "-o", str(page)])
    text = page.read_text()
    figure = re.findall(r"<figure><figcaption>Validation loss of the runs.*?</figure>", text, re.DOTALL)[0]
    assert 'c0">a</span>' in figure and 'c1">b</span>' in figure
    assert figure.count("stroke: var(--c0)") and figure.count("stroke: var(--c1)")
    assert text.count("<figure>") == 3
    assert re.search(r"<tr><td>a</td><td>20</td>.*<td>4.5</td>", text) and "<td>3.25</td>" in text
    assert re.search(r"<tr><td>seed</td><td>1</td><td>2</td></tr>", text) and "depth" not in text
    assert "compare their bits per byte" not in text
    recipe = json.loads((runs[0] / "recipe.json").read_text())
    (runs[0] / "recipe.json").write_text(json.dumps(recipe | {"data_fingerprint": "other"}))
    cli.main(["report", *map(str, runs), "-o", str(page)])
    assert "compare their bits per byte" in page.read_text()


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "a"))
    with pytest.raises(UserError, match=r"There is no file .*b/recipe\.json"):
        cli.parse(["report", run, str(tmp_path / "b")])()
    with pytest.raises(UserError, match="Name 1 to 5 folders of runs, not 6"):
        cli.parse(["report", *[run] * 6])()
