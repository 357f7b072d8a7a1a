"""The pages of results: a whole index, sections that recipes can name, commands that the benchmarks take."""

import argparse
import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from keifu.evaluation.intervals import bootstrap

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not path.name.endswith(".ja.md"))
RESULTS = sorted(path for path in (ROOT / "docs/results").glob("*.md") if not path.name.endswith(".ja.md"))
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
KEPT = ("action", "nargs", "required", "choices")  # of an option, what decides whether a command line is one


def sections(page: Path) -> list[str]:
    return re.findall(r"(?m)^## (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")))


def test_the_index_names_every_section() -> None:
    index = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    missing = [f"{page.name}: {title}" for page in RESULTS for title in sections(page) if f"[{title}](" not in index]
    assert missing == []


@pytest.mark.parametrize(("ending", "mark"), [("", " (one run: a copy)"), (".ja", "（1回の実行：写し）")])
def test_the_index_says_which_tables_are_only_a_copy(ending: str, mark: str) -> None:
    index = (ROOT / f"docs/results{ending}.md").read_text(encoding="utf-8")
    links = [line.partition("](results/")[2] for line in index.splitlines() if line.endswith(mark)]
    copies = set()
    for page in RESULTS:
        file = ROOT / f"docs/results/data/{page.stem}.json"
        tables = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        copies |= {(page.stem, t["section"]) for t in tables if isinstance(t["values"], dict) and "runs" in t["values"]}
    anchor = {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-"): title for _, title in copies}
    named = [re.match(r"(\w+)(?:\.ja)?\.md#([^)]*)", link) for link in links]
    assert {(found[1], anchor.get(found[2], found[2])) for found in named if found} == copies


def test_recipes_name_sections_that_there_are() -> None:
    there = {title for page in RESULTS for title in sections(page)}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src/keifu").rglob("*.py")]
    named = [title for text in texts for title in re.findall(r'docs/results\.md, "([^"]+)"', text)]
    assert named
    assert set(named) <= there


def option_parser(file: Path) -> argparse.ArgumentParser:
    """Return a benchmark's option parser, read from its source. A run would import the compared libraries."""
    parser = argparse.ArgumentParser(exit_on_error=False, conflict_handler="resolve")
    nodes = nodes_of(file)
    keys = {key.value for node in nodes if isinstance(node, ast.Dict) for key in node.keys if is_text(key)}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if ast.unparse(call.func) != "parser.add_argument":
            continue
        if isinstance(call.args[0], ast.JoinedStr):  # in a loop over a dictionary of names and defaults
            several = [[f"--{key}"] for key in sorted(keys) if re.fullmatch(r"[a-z-]+", key)]
        else:
            several = [[ast.literal_eval(each) for each in call.args]]
        for names in several:
            parser.add_argument(*names, **literal_keywords(call))
    return parser


def nodes_of(file: Path) -> list[ast.AST]:
    """Return the nodes of a benchmark, and of the functions `..._options` that it imports from another one."""
    nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    for imported in [node for node in nodes if isinstance(node, ast.ImportFrom)]:
        wanted = {alias.name for alias in imported.names if alias.name.endswith("_options")}
        if wanted:
            there = nodes_of(file.with_name(f"{imported.module}.py"))
            functions = [node for node in there if isinstance(node, ast.FunctionDef) and node.name in wanted]
            nodes += [node for function in functions for node in ast.walk(function)]
    return nodes


def is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def literal_keywords(call: ast.Call) -> dict:
    """Return the literal keywords of an option that decide which words it accepts."""
    given = {each.arg: each.value for each in call.keywords if each.arg in KEPT}
    return {name: ast.literal_eval(node) for name, node in given.items() if isinstance(node, ast.Constant | ast.Tuple)}


def commands(page: str) -> list[str]:
    """Return the commands of a page that run a benchmark, in blocks and in backquotes, also over the end of a line."""
    blocks = [line for block in FENCE.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    inline = [re.sub(r"\s+", " ", text) for text in re.findall(r"`([^`]*)`", FENCE.sub("", page))]
    shown = [text.removeprefix("$ ") for text in [*blocks, *inline]]
    return [text for text in shown if re.match(r"python benchmarks/\S+\.py", text)]


def check(command: str) -> None:
    _, file, *given = shlex.split(command, comments=True)
    assert (ROOT / file).is_file(), f"{file} is not there"
    option_parser(ROOT / file).parse_args(given)


FOUND = [(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_a_benchmark_takes_the_command(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize("command", ["python benchmarks/mlp.py --nonsense", "python benchmarks/unet.py --rounds"])
def test_a_wrong_command_would_be_seen(command: str) -> None:
    assert commands(f"Made by `{command}`.") == commands(f"```\n$ {command}\n```\n") == [command]
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        check(command)


DATA = ROOT / "docs/results/data"
LANGUAGE = ROOT / "docs/results/language.md"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
TABLES = [page for page in RESULTS if page.name != "peers.md" and "\n|---" in page.read_text(encoding="utf-8")]


def tables(page: str) -> list[tuple[str, list[list[str]]]]:
    """Return the tables of a page: the section of each, and the cells of its lines without the rule."""
    found, section, lines = list[tuple[str, list[list[str]]]](), "", list[list[str]]()
    for line in [*FENCE.sub("", page).splitlines(), ""]:
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line[1:-1].split("|")])
        elif lines:
            found.append((section, [lines[0], *lines[2:]]))
            lines = []
    return found


def of_data(page: Path) -> list[dict[str, Any]]:
    return json.loads((DATA / page.name.replace(".md", ".json")).read_text(encoding="utf-8"))


def figures(cells: list[str]) -> list[list[str]]:
    """Return the sorted numbers in each cell, except in a first cell that is a label in words."""
    given = cells if re.fullmatch(r"[\d,.-]*", cells[0]) else cells[1:]
    return [sorted(number.replace(",", "") for number in NUMBER.findall(text)) for text in given]


def check_tables(page: str, data: list[dict[str, Any]]) -> None:
    told = [(each["section"], [each["columns"], *each["rows"]]) for each in data]
    assert tables(page) == told


@pytest.mark.parametrize("page", TABLES, ids=lambda path: path.name)
def test_tables_are_those_of_the_data_files(page: Path) -> None:
    check_tables(page.read_text(encoding="utf-8"), of_data(page))


@pytest.mark.parametrize("page", TABLES, ids=lambda path: path.name)
def test_tables_in_japanese_have_the_same_figures(page: Path) -> None:
    japanese = tables(page.with_suffix(".ja.md").read_text(encoding="utf-8"))
    data = of_data(page)
    assert len(japanese) == len(data)
    for (_, lines), each in zip(japanese, data, strict=True):
        assert [figures(line) for line in lines[1:]] == [figures(line) for line in each["rows"]]


@pytest.mark.parametrize("page", TABLES, ids=lambda path: path.name)
def test_data_name_a_command_that_is_one_and_the_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for each in of_data(page):
        assert re.search("Xeon|EPYC", each["machine"])
        section = text.split(f"## {each['section']}\n")[1].split("\n## ")[0]
        start = " ".join(each["command"].split()[:2])
        assert start in re.sub(r"\s+", " ", section)
        if each["command"].startswith("python benchmarks"):
            check(each["command"])


def test_another_figure_in_a_table_would_be_seen() -> None:
    page = TABLES[0].read_text(encoding="utf-8")
    figure = of_data(TABLES[0])[0]["rows"][0][1]
    with pytest.raises(AssertionError):
        check_tables(page.replace(f"| {figure} |", f"| {figure}1 |", 1), of_data(TABLES[0]))


def is_quotient(ratio: str, ours: str, theirs: str) -> bool:
    """Return whether a ratio is that of the two speeds, as it is rounded."""
    first, second = (float(NUMBER.findall(each)[-1].replace(",", "")) for each in (ours, theirs))
    return f"{first / second:.{len(ratio.partition('.')[2])}f}" == ratio


def test_figures_beside_peers_stand_in_the_sections_that_are_linked() -> None:
    page = (ROOT / "docs/results/peers.md").read_text(encoding="utf-8")
    ((_, lines),) = [each for each in tables(page) if each[0] == "Speed"]
    linked = ""
    for _, ours, theirs, ratio, link in lines[1:]:
        linked = found[1] if (found := re.search(r"\(([^)#]*)", link)) else linked
        there = NUMBER.findall((ROOT / "docs/results" / linked).read_text(encoding="utf-8"))
        missing = [number for cell in (ours, theirs, ratio) for number in NUMBER.findall(cell) if number not in there]
        assert missing in ([], [ratio]), f"{missing} not in {linked}"
        assert not missing or is_quotient(ratio, ours, theirs)


def test_the_meshes_table_is_what_the_benchmark_wrote() -> None:
    wrote = json.loads((DATA / "scaling_out.json").read_text(encoding="utf-8"))
    (table,) = [each for each in of_data(ROOT / "docs/results/speed.md") if each["section"].startswith("Two pods")]
    runs = [run for run in wrote.values() if isinstance(run, dict)]
    forms = {"tokens_per_second": ",.0f", "ratio": ".2f", "megabytes_a_step": ".2f", "formula_megabytes": ".2f",
             "last_loss": ".10f"}  # fmt: skip
    told = [[format(run.get(name, 0.0), form) for name, form in forms.items()] for run in runs]
    split = [run for run in runs if "formula_megabytes" in run]
    assert len(split) == 3
    assert table["values"] == {"runs": 1, "in": "scaling_out.json"}
    assert all(run["megabytes_a_step"] == pytest.approx(run["formula_megabytes"], rel=0.05) for run in split)
    assert [row[1:] for row in table["rows"]] == [["0" if cell == "0.00" else cell for cell in row] for row in told]


def test_perplexities_are_those_of_the_windows() -> None:
    (table,) = [each for each in of_data(ROOT / "docs/results/speed.md") if "quantisation.py" in each["command"]]
    values = table["values"]
    assert [name for name, *_ in table["rows"]] == [*values["nats"]]
    for name, bits, perplexity in table["rows"]:
        assert f"{8 * values['bytes'][name] / values['parameters']:.2f}" == bits
        assert f"{np.exp(sum(values['nats'][name]) / values['tokens']):.3f}" == perplexity


def timed() -> list[dict[str, Any]]:
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(DATA.glob("*.json"))]
    tables = [table for file in files if isinstance(file, list) for table in file]
    return [table for table in tables if isinstance(values := table.get("values"), dict) and "tasks" in values]


@pytest.mark.parametrize("table", timed(), ids=lambda table: table["section"])
def test_timed_tables_are_those_of_the_rounds(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = import_module("_results")
    values = table["values"]
    assert table["rows"] == results.timing_rows(values)
    for task in values["tasks"].values():
        (rounds,) = {len(seconds) for seconds in task["seconds"].values()}
        assert rounds > 1
        task["amount"] *= 2
    assert table["rows"] != results.timing_rows(values)


def test_rows_of_timed_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = import_module("_results").timing_rows
    one = {"amount": 100, "seconds": {"theirs": [2, 4, 5], "ours": [1, 1, 2]}, "work": 6, "peak": 4}
    two = {"amount": 3, "seconds": {"ours": [0.1, 0.2]}, "more": {"ours": ["9 MB"]}}
    values = {"tasks": {"a": one}, "against": dict.fromkeys(["theirs", "ours"], ["theirs"])}
    ratio = "2.50 (2.00 to 4.00)"
    assert rows(values) == [["theirs", "25.0", "1.00", "38%"], ["ours", "100", ratio, "150%"]]
    values["tasks"]["b"] = two
    assert rows(values) == [["theirs", "25.0; 1.00; 38%", ""], ["ours", f"100; {ratio}; 150%", "22.5; 9 MB"]]
    assert rows(values | {"a row": "task", "shown": ["ours"], "in": "ms", "against": {}}) == [
        ["a", "10.0", "150%"], ["b", "50.0", "9 MB"],
    ]  # fmt: skip


def test_the_memory_of_a_context_is_that_of_the_bytes() -> None:
    (table,) = [each for each in of_data(LANGUAGE) if each["section"].startswith("Memory")]
    assert [name for name, *_ in table["rows"]] == [*table["values"]]
    for name, *cells in table["rows"]:
        assert cells == [f"{size / 2**20:,.1f}" for size in table["values"][name].values()]


def test_recall_is_that_of_the_seeds() -> None:
    found = [each for each in of_data(LANGUAGE) if each["section"].startswith("Recall ")]
    assert found
    for table in found:
        for name, *cells in table["rows"]:
            percent = [[100 * share for share in shares] for shares in table["values"][name].values()]
            assert cells == [f"{np.mean(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in percent]


def spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def test_sinks_are_those_of_the_seeds() -> None:
    (table,) = [each for each in of_data(LANGUAGE) if each["section"] == "Attention sinks"]
    for name, *cells in table["rows"]:
        seeds = table["values"][name]
        assert len(seeds) == 3
        found = [[each[key] for each in seeds] for key in seeds[0]]
        percent = [[100 * share for share in each] for each in found[3:]]
        assert cells == [*(spread(each, ".3f") for each in found[:3]), *(spread(each, ".1f") for each in percent)]


def test_long_contexts_are_those_of_the_seeds() -> None:
    (table,) = [each for each in of_data(LANGUAGE) if each["section"].startswith("Positions beyond")]
    for name, *cells in table["rows"]:
        seeds = table["values"][name]
        assert len(seeds) == 3 and {len(each["loss"]) for each in seeds} == {32}  # of 16 positions each
        losses = [[mean(each["loss"][a:b]) for each in seeds] for a, b in ((4, 8), (8, 16), (16, 32))]
        shares = [[100 * share for share in each] for each in zip(*(each["passkeys"] for each in seeds), strict=True)]
        assert cells == [*(spread(each, ".3f") for each in losses), *(spread(each, ".1f") for each in shares)]


def test_bounds_of_masked_diffusion_are_those_of_the_windows() -> None:
    (table,) = [each for each in of_data(LANGUAGE) if each["section"] == "Masked diffusion"]
    minutes = re.findall(r"--minutes ([\d.]+)", table["command"])
    for name, *cells in table["rows"]:
        bits = mean(table["values"][name]) / np.log(2) / table["values"]["bytes per token"]
        low, high = map(float, cells[4].split(" to "))
        assert cells[0] in minutes and abs(bits - float(cells[3])) < 0.001 and low < bits < high


def test_shares_of_new_names_are_those_of_the_emoji() -> None:
    tables = of_data(ROOT / "docs/results/text_and_pictures.md")
    (table,) = [table for table in tables if "locked_text.py" in table["command"]]
    families = table["values"].pop("families")
    for (_, *cells), ways in zip(table["rows"], table["values"].values(), strict=True):
        for cell, hits in zip(cells, ways.values(), strict=True):
            right = np.array([*map(int, hits)])
            low, high = bootstrap(right, clusters=families)
            assert cell == f"{right.mean():.1%} ({low:.1%} to {high:.1%})"


@pytest.mark.parametrize(
    "page", [p for path in TABLES for p in (path, path.with_suffix(".ja.md"))], ids=lambda p: p.name
)
def test_marked_tables_take_the_cells_of_the_data(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = import_module("_results")
    data, text = of_data(page.with_name(page.name.replace(".ja.", "."))), page.read_text(encoding="utf-8")
    marked = re.findall(r"<!-- table: (.*) -->", text)
    assert results.renewed(text, data) == text
    for each in data:
        each["rows"] = [[label, *(f"9{cell}" for cell in cells)] for label, *cells in each["rows"]]
    changed = results.renewed(text, data)
    assert (changed != text) == bool(marked)
    assert [section for section, _ in tables(changed)] == [section for section, _ in tables(text)]


def test_a_benchmark_replaces_its_own_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = import_module("_results")
    file = tmp_path / "speed.json"
    before = of_data(ROOT / "docs/results/speed.md")
    file.write_text(results.as_text(before), encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == before
    place = 3
    rows, values = [["int8", "8.50", "1.234"]], {"runs": 1}
    given = before[place]["section"], f"{before[place]['command']} --length 9", before[place]["columns"], rows, values
    results.write_table(file, *given)
    after = json.loads(file.read_text(encoding="utf-8"))
    assert (after[place]["command"], after[place]["rows"]) == (given[1], rows)
    assert after[:place] + after[place + 1 :] == before[:place] + before[place + 1 :]
