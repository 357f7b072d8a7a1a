"""Each figure of README, of the index and of the lineage has one source: a value in docs/results/data."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs/results/data"
FIGURES = json.loads((DATA / "figures.json").read_text(encoding="utf-8"))
LANDMARKS = json.loads((ROOT / "docs/lineage/lineage.json").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
NAMES = re.compile(  # numbers that are parts of names, years, versions, or what the reader types
    r"`[^`]*`|\]\([^)]*\)|SmolLM2-135M|Python 3\.11|CC BY(?:-SA)? \d\.0|Apache-2\.0|(?<=\| )\d{4}(?= \|)|GPT-2 124M"
    r"|v1-5|Stable Diffusion 1|llama\.cpp|float32|bfloat16|(?<![\d.])(?:8|4) bits"
)
INDEXES = ["docs/lineage/index.md", "docs/lineage/index.ja.md"]
PAGES = ["README.md", "README.ja.md", "docs/index.md", "docs/index.ja.md", *INDEXES]


def numbers(text: str) -> list[str]:
    """Return the numbers with two or more digits or with a point, outside of code, links and names."""
    found = NUMBER.findall(NAMES.sub(" ", FENCE.sub("", text)))
    return [number for number in found if len(number) > 1]


def cell(source: list[str]) -> str:
    """Return the cell that a source names by file, section, start of the row and name of the column."""
    file, section, row, column = source
    for table in json.loads((DATA / file).read_text(encoding="utf-8")):
        places = [i for i, name in enumerate(table["columns"]) if name == column]
        places = [i for i in places if i] or places  # the first column has the rows' names
        rows = [each for each in table["rows"] if each[0].startswith(row)]
        if table["section"] == section and places and rows:
            return rows[0][places[0]]
    raise AssertionError(f"{source} names no cell")


def difference(source: list[str]) -> str:
    """Return one cell minus the one of the next column, as a source names them."""
    file, section, row, column, _ = source
    for table in json.loads((DATA / file).read_text(encoding="utf-8")):
        if table["section"] == section and column in table["columns"]:
            at = table["columns"].index(column)
            (cells,) = [each for each in table["rows"] if each[0].startswith(row)]
            return f"{float(cells[at]) - float(cells[at + 1]):.2f}"
    raise AssertionError(f"{source} names no cells")


def is_of(value: str, source: list[str] | str) -> bool:
    """Return whether a value is in the cell, is the mean of the cell's values, or is in the text of a results
    page."""
    if isinstance(source, str):
        return value in NUMBER.findall((ROOT / source).read_text(encoding="utf-8"))
    if len(source) == 2:  # a value of a file that is no list of tables
        return value == str(json.loads((DATA / source[0]).read_text(encoding="utf-8"))[source[1]])
    if source[0] == "percent":  # of a share that an evaluation wrote
        share = json.loads((DATA / source[1]).read_text(encoding="utf-8"))["figures"][source[2]]
        return abs(100 * share - float(value)) < 0.0501  # the file rounds the share to four digits
    if source[0] == "minus":  # of two cells of a row; columns may share a name, so the second follows the first
        return value == difference(source[1:])
    found = NUMBER.findall(cell(source[-4:]))
    if source[0] == "mean":
        return f"{mean(map(float, found)):.1f}" == value
    if source[0] == "rounded":
        return f"{float(found[0]):.1f}" == value
    return value in found


def text_of(page: str) -> str:
    """Return the text of a page or file of the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda each: f"{each['value']}-{each['what']}")
def test_a_figure_is_that_of_its_source_and_of_every_page_that_gives_it(figure: dict) -> None:
    assert is_of(figure["value"], figure["source"])
    without = [page for page in figure["pages"] if figure["value"] not in NUMBER.findall(text_of(page))]
    assert without == []


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_page_has_its_source(page: str) -> None:
    known = {figure["value"] for figure in FIGURES if page in figure["pages"]}
    assert [number for number in numbers((ROOT / page).read_text(encoding="utf-8")) if number not in known] == []


RESULTS = [path for path in sorted((ROOT / "docs/results").glob("*.md")) if not path.name.endswith(".ja.md")]
MEASURED = {number for path in RESULTS for number in NUMBER.findall(path.read_text(encoding="utf-8"))}
LINEAGE = [path for path in sorted((ROOT / "docs/lineage").glob("*.md")) if not path.name.startswith("index")]


@pytest.mark.parametrize("path", LINEAGE, ids=lambda path: path.name)
def test_every_number_of_a_landmarks_results_has_its_source(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    (section,) = re.findall(r"(?ms)^## (?:Results in keifu|keifu での結果)\n(.*?)(?=^## )", page)
    text = re.sub(r"\$[^$]*\$|[(（][A-Z]\w+[,、] ?\d{4}[)）]", " ", section)  # formulas, and years of papers
    known = {figure["value"] for figure in FIGURES if path.relative_to(ROOT).as_posix() in figure["pages"]}
    assert [number for number in numbers(text) if number not in known | MEASURED] == []
    (row,) = [each for each in LANDMARKS if each["name"] == path.name.partition(".")[0]]
    own = known | own_numbers(section, row["section"]) | {*NUMBER.findall(row["published"])}
    assert [number for number in numbers(text) if "." in number and number not in own] == []


def own_numbers(text: str, title: str) -> set[str]:
    """Return the numbers of the sections that a text links to, or of a whole page, and of the section with a title."""
    links = re.findall(r"\]\(\.\./results/(\w+)(?:\.ja)?\.md(?:#([^)]*))?\)", text)
    found = set()
    for path in RESULTS:
        for part in re.split(r"(?m)^## ", path.read_text(encoding="utf-8")):
            heading = part.partition("\n")[0]
            if heading == title or {(path.stem, ""), (path.stem, slugify(heading, "-"))} & {*links}:
                found |= {*NUMBER.findall(part)}
    return found


def test_a_number_of_another_table_would_be_seen() -> None:
    text = "19.54 ([results](../results/translation.md#translation-with-attention))"
    assert "19.54" in own_numbers(text, "")
    assert "19.54" not in own_numbers("19.54 ([results](../results/speed.md))", "Reversed relations")


@pytest.mark.parametrize("row", LANDMARKS, ids=lambda row: row["name"])
def test_readme_and_the_index_give_the_texts_of_the_lineage(row: dict) -> None:
    for ending, suffix in (("", ""), (".ja", "_ja")):
        readme = (ROOT / f"README{ending}.md").read_text(encoding="utf-8")
        index = (ROOT / f"docs/lineage/index{ending}.md").read_text(encoding="utf-8")
        page = f"]({row['name']}{ending}.md)"
        (line,) = [each for each in readme.splitlines() if f"](docs/lineage/{row['name']}{ending}.md) |" in each]
        assert line.split(" | ")[2] == row["new" + suffix]
        (line,) = [each for each in index.splitlines() if each.startswith("| ") and page in each]
        result = [row[name + suffix] for name in ("new", "result", "baseline")]
        assert line.removesuffix(" |").split(" | ")[2:] == result


def test_raw_values_give_the_cells() -> None:
    table, tuned = json.loads((DATA / "neurons.json").read_text(encoding="utf-8"))
    shares = [value / 1000 for value in tuned["values"]["of 1,000, by seed"]]
    assert tuned["rows"][0][2:] == [", ".join(f"{share:.1%}" for share in shares), f"{mean(shares):.1%}"]
    for name, right, *_ in table["rows"]:
        values = table["values"][f"{name}, right of 1,000"]
        assert right == ", ".join(f"{value / 1000:.1%}" for value in values)


def test_every_table_has_its_raw_values() -> None:
    for page in (ROOT / "docs/results").glob("*.md"):
        if (file := DATA / f"{page.stem}.json").is_file():
            tables = json.loads(file.read_text(encoding="utf-8"))
            assert all(isinstance(each["values"], dict) and each["values"] for each in tables)


def test_a_changed_value_would_be_seen() -> None:
    figure = next(each for each in FIGURES if each["value"] == "19.54")
    assert not is_of("19.55", figure["source"])
    assert numbers("BLEU 19.55 of `x 12` [y](z34.md) from SmolLM2-135M, 7 times") == ["19.55"]
