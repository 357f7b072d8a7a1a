"""The lineage's pages: in order, linked both ways, with code that runs beside keifu's, and figures of the results."""

import ast
import contextlib
import io
import json
import re
import unicodedata
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from matplotlib import get_data_path
from PIL import ImageFont

from keifu import cli, lineage
from keifu.cli import parse
from keifu.errors import UserError
from keifu.folders import packaged

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROWS = json.loads((DOCS / "lineage/lineage.json").read_text(encoding="utf-8"))
LANDMARKS = lineage.landmarks()
NAMES = [each.name for each in LANDMARKS]
HEADINGS = [
    "Prerequisites", "The problem", "What was new", "In code", "Run it", "Results in keifu", "Exercises",
    "Common misconceptions", "Differences from the paper", "Sources",
]  # fmt: skip
ADOPTED = "What it adopted"  # after what was new, where a page has it: parts that are others', with their sources
TEACHING = ["By hand", "Derivation", "Outputs"]  # numbers, proofs of claims, what models write
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# in English: those in Japanese have the same code, which test_translations.py holds
PAGES = [path for folder in ("lineage", "parts") for path in sorted((DOCS / folder).glob("*.md"))]
PAGES = [path for path in PAGES if not path.name.endswith(".ja.md")]
WITH_CODE = [path for path in PAGES if PYTHON.search(path.read_text(encoding="utf-8"))]


BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)  # and its output


def code_in(page: str) -> str:
    """Return the code of a page or a part of it, all of its blocks in order."""
    return "\n".join(PYTHON.findall(page))


def code(path: Path) -> str:
    """Return the code of a page."""
    return code_in(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: f"{path.parent.name}-{path.name}")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_code_of_a_page_runs_and_agrees_with_the_library(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    text, space = code(path), {"__name__": "page"}
    for block, output in BLOCK.findall(path.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(path), "exec"), space)  # the pages are files of this repository
        assert printed.getvalue() == output
    assert "from keifu" in text
    assert "assert" in text
    assert max(map(len, text.splitlines())) <= 120
    assert re.findall(r"(?m)^ *[^\s#].* # .*$", text) == []  # comments are above their line


def test_a_page_whose_code_says_something_else_would_be_seen() -> None:
    text = code(DOCS / "lineage/llama.md")
    wrong = text.replace("a * angles.cos() - b", "a * angles.cos() + b")
    assert wrong != text
    with pytest.raises(AssertionError):
        exec(wrong, {})


def test_every_landmark_has_its_page_with_code() -> None:
    there = {path.stem for path in (DOCS / "lineage").glob("*.md") if not path.name.endswith(".ja.md")}
    assert set(NAMES) <= there
    assert {f"{name}.md" for name in NAMES} <= {path.name for path in WITH_CODE if path.parent.name == "lineage"}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_all_its_parts(name: str) -> None:
    page = (DOCS / f"lineage/{name}.md").read_text(encoding="utf-8")
    found = [title for title in re.findall(r"(?m)^## (.*)$", page) if title not in (ADOPTED, *TEACHING)]
    assert found == HEADINGS
    assert ADOPTED not in page or page.index(f"## {ADOPTED}") < page.index("## In code")
    assert "](../pictures/" in page
    assert page.count("$$") >= 2
    exercises = page.partition("## Exercises")[2].partition("\n## ")[0]
    solutions = re.findall(r"(?s)<details[^>]*>\n<summary>Solution.*?</details>", exercises)
    assert len(solutions) >= 2
    assert all(re.search("assert|torch.testing", code_in(text)) for text in solutions)
    assert len(page.partition("## Differences from the paper")[2]) > 200
    assert next(row for row in ROWS if row["name"] == name)["command"].split(" --")[0] in page


TAUGHT = [
    "perceptron", "mlp", "ngram", "word2vec", "lstm", "seq2seq", "transformer", "bert", "gpt1", "gpt2", "gpt3", "llama",
    "lora", "clip", "vit", "instructgpt", "dpo", "deepseek_r1", "vae", "ddpm", "latent_diffusion", "dalle", "unclip",
    "dit",
]  # fmt: skip
JAPANESE = dict(zip(TEACHING, ["手で計算する", "導出", "実際の出力"], strict=True))


@pytest.mark.parametrize("ending", [".md", ".ja.md"])
@pytest.mark.parametrize("name", TAUGHT)
def test_a_page_has_an_example_by_hand_a_derivation_outputs_and_four_exercises(name: str, ending: str) -> None:
    page = (DOCS / f"lineage/{name}{ending}").read_text(encoding="utf-8")
    hand, derived, outputs = (part(page, JAPANESE[title] if ending == ".ja.md" else title) for title in TEACHING)
    assert PYTHON.findall(hand)
    assert all(len(block.splitlines()) <= 20 for block in PYTHON.findall(hand))
    assert re.search(r'(?s)<details markdown="1">\n<summary markdown="span">.*\$\$.*</details>', derived)
    assert re.search(r"(?m)^(?:keifu|python) ", outputs)
    exercises = page[page.index("**1.** *") :]
    assert len(re.findall(r"(?m)^\*\*\d\.\*\* \*", exercises)) >= 4


def part(page: str, title: str) -> str:
    """Return the text of a page below a heading."""
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_part_of_a_page_has_what_a_learner_needs(name: str) -> None:
    page = (DOCS / f"lineage/{name}.md").read_text(encoding="utf-8")
    assert name in ("ngram", "perceptron") or re.search(r"Read \[.*?\]\(\w+\.md\)", part(page, "Prerequisites"))
    new = part(page, "What was new")
    assert re.search(r"\n(?:Here|With) \$", new)  # the symbols of the formula
    assert re.search(r"!\[Block diagram[^\]]*\]\(\.\./pictures/diagrams/\w+\.svg\)", new)
    assert re.search(r"print\(.*?```\n\n```text\n.*\d", part(page, "In code"), re.DOTALL)  # shapes or numbers
    assert "```\nkeifu " in page or "```\n#" in part(page, "Run it")
    assert len(re.findall(r"(?m)^- ", part(page, "Common misconceptions"))) >= 2
    assert re.search(r"\]\(https://", part(page, "Sources"))


def test_the_landmarks_are_in_order_of_years_and_come_from_earlier_ones() -> None:
    assert all(a.year <= b.year for a, b in pairwise(LANDMARKS))
    assert all(NAMES.index(parent) < NAMES.index(each.name) for each in LANDMARKS for parent in each.parents)


@pytest.mark.parametrize("ending", [".md", ".ja.md"])
def test_pages_are_linked_to_those_they_came_from_and_back(ending: str) -> None:
    links = {}
    for name in NAMES:
        head = (DOCS / f"lineage/{name}{ending}").read_text(encoding="utf-8").partition("\n## ")[0]
        links[name] = set(re.findall(r"\]\((\w+)(?:\.ja)?\.md\)", head))
    for each in LANDMARKS:
        assert {*each.parents, "index"} <= links[each.name]
        assert all(each.name in links[parent] for parent in each.parents)


@pytest.mark.parametrize("ending", [".md", ".ja.md"])
def test_the_index_has_all_in_order(ending: str) -> None:
    page = (DOCS / f"lineage/index{ending}").read_text(encoding="utf-8")
    title = "title_ja" if ending == ".ja.md" else "title"
    assert re.findall(r"(?m)^\| (\d+) \| \[(.*?)\]\((\w+)(?:\.ja)?\.md\)", page) == [
        (str(row["year"]), row[title], row["name"]) for row in ROWS
    ]
    assert ending == ".ja.md" or all(f"| {each.new} |" in page for each in LANDMARKS)


def section(title: str) -> str:
    """Return the text of a section of the results, from any page, or an empty string if no page has it."""
    for path in (DOCS / "results").glob("*.md"):
        found = re.search(
            rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", path.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
        if found and not path.name.endswith(".ja.md"):
            return found[1]
    return ""


def figures(text: str) -> set[str]:
    """Return the numbers of a text that have a point or at least two digits."""
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)
    return {number.replace(",", "") for number in found if len(number) > 1}


@pytest.mark.parametrize("each", LANDMARKS, ids=lambda each: each.name)
def test_the_figures_are_those_of_the_results(each: lineage.Landmark) -> None:
    found = section(each.section)
    assert bool(figures(each.result)) == bool(each.section)
    assert figures(f"{each.result} {each.baseline}") <= figures(found)
    assert each.section or each.result.startswith("No ")
    assert each.baseline


def test_another_figure_would_be_seen() -> None:
    assert not figures("BLEU 19.55") <= figures(section("Translation with attention"))
    assert section("No such section") == ""


@pytest.mark.parametrize("each", LANDMARKS, ids=lambda each: each.name)
def test_the_command_is_one(each: lineage.Landmark) -> None:
    """Its length is the recipe's default, of at most ten minutes; GRPO's steps are few."""
    words = each.command.split()
    parse(words[1:])
    assert "--minutes" not in words and ("--steps" not in words or int(words[words.index("--steps") + 1]) <= 10)


@pytest.mark.parametrize("language", lineage.LANGUAGES)
def test_the_page_needs_no_other_file_and_shows_all(language: str) -> None:
    page = lineage.page(language)
    assert f'<html lang="{language}">' in page
    assert page.count("data:image/") == page.count("<img") == page.count("<section") == len(LANDMARKS)
    assert page.count("marker-end") == sum(len(each.parents) for each in LANDMARKS)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_the_page_in_japanese_says_all_in_japanese() -> None:
    kana = re.compile("[ぁ-ヿ一-鿿]")
    for english, japanese in zip(LANDMARKS, lineage.landmarks("ja"), strict=True):
        assert all(kana.search(text) for text in (japanese.new, japanese.result, japanese.baseline))
        assert not english.section or kana.search(japanese.section)
        assert english.published != japanese.published or not kana.search(english.published)
        assert figures(english.published) <= figures(japanese.published) | {"one"}
    with pytest.raises(UserError, match="Did you mean 'ja'"):
        lineage.page("jp")


Segment = tuple[tuple[int, int], tuple[int, int]]


def segments(arrows: list[list[tuple[int, int]]]) -> list[tuple[int, Segment]]:
    """Return the straight parts of all arrows, without parts of no length, each with the number of its arrow."""
    parts = [(number, part) for number, arrow in enumerate(arrows) for part in pairwise(arrow)]
    return [(number, (min(part), max(part))) for number, part in parts if part[0] != part[1]]


def test_no_arrow_runs_behind_a_box_or_along_one_from_elsewhere_and_all_are_inside() -> None:
    arrows = lineage.routes(LANDMARKS)
    edges = [(parent, each.name) for each in LANDMARKS for parent in sorted(
        each.parents, key=lambda name: LANDMARKS[NAMES.index(name)].lane
    )]  # fmt: skip
    corners = {each.name: lineage.corner(row, each.lane) for row, each in enumerate(LANDMARKS)}
    across, down = (int(size) for size in re.findall(r'viewBox="0 0 (\d+) (\d+)"', lineage.page())[0])
    assert all(x + lineage.WIDTH < across and y + lineage.HEIGHT < down for x, y in corners.values())
    for (parent, child), arrow in zip(edges, arrows, strict=True):
        (x1, y1), (x2, y2) = corners[parent], corners[child]
        assert arrow[0][1] == y1 + lineage.HEIGHT and x1 < arrow[0][0] < x1 + lineage.WIDTH
        assert arrow[-1][1] == y2 - 1 and x2 < arrow[-1][0] < x2 + lineage.WIDTH
        assert all(0 < x < across and 0 < y < down for x, y in arrow)
    found = segments(arrows)
    for number, ((left, top), (right, bottom)) in found:
        assert left == right or top == bottom
        for x, y in corners.values():
            beside = 5 * (left == right)  # a line along the side of a box looks like a part of it
            apart = right <= x - beside or left >= x + lineage.WIDTH + beside
            assert apart or bottom <= y or top >= y + lineage.HEIGHT, f"{edges[number]} runs behind a box"
    for (a, ((l1, t1), (r1, b1))), (b, ((l2, t2), (r2, b2))) in combinations(found, 2):
        level = t1 == b1 == t2 == b2 and min(r1, r2) > max(l1, l2)
        upright = l1 == r1 == l2 == r2 and min(b1, b2) > max(t1, t2)
        assert not (level or upright) or edges[a][0] == edges[b][0], f"{edges[a]} and {edges[b]} share a line"


@pytest.mark.parametrize("language", lineage.LANGUAGES)
def test_each_title_fits_its_box(language: str) -> None:
    font = ImageFont.truetype(get_data_path() + "/fonts/ttf/DejaVuSans.ttf", 13)
    for each in lineage.landmarks(language):
        text = f"{each.year} {each.title}"
        wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
        narrow = "".join(letter for letter in text if unicodedata.east_asian_width(letter) not in "WF")
        assert 9 + 13 * wide + font.getlength(narrow) <= lineage.WIDTH - 5, text


def test_the_verb_prints_the_table_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["lineage"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == NAMES
    cli.main(["lineage", "mixture"])
    assert re.search(r"^time of it\s+-$", capsys.readouterr().out, re.MULTILINE)  # its command trains nothing
    cli.main(["lineage", "palm"])
    (palm,) = [each for each in lineage.landmarks() if each.name == "palm"]
    assert palm.result in capsys.readouterr().out
    cli.main(["lineage", "-o", str(tmp_path / "all.html")])
    assert (tmp_path / "all.html").read_text(encoding="utf-8") == lineage.page()


def test_an_unknown_landmark_is_answered_with_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["lineage", "gpt22"])
    assert "gpt2" in capsys.readouterr().err


def test_an_installation_without_a_folder_of_the_checkout_says_so() -> None:
    with pytest.raises(UserError, match="The folder docs/nothing is not installed: install keifu from a wheel"):
        packaged("docs/nothing")


PARTS = [path for path in sorted((DOCS / "parts").glob("*.md")) if path.stem.partition(".")[0] != "index"]


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_a_part_has_formulas_code_and_the_picture_that_its_command_makes(path: Path) -> None:
    name, page = path.name.partition(".")[0], path.read_text(encoding="utf-8")
    picture = f"part-{name.replace('_', '-')}.png"
    makes = ast.parse((ROOT / "benchmarks/parts.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in makes.body if isinstance(node, ast.FunctionDef)}
    assert f"](../pictures/{picture})" in page
    assert (DOCS / "pictures" / picture).is_file()
    assert f"`python benchmarks/parts.py --only {name}`" in page
    assert page.count("$$") >= 2
    assert PYTHON.search(page)
