"""The report of a run: report.html, one offline page with SVG charts, from the files of the run's directory."""

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from keifu.errors import UserError
from keifu.files import write_atomic
from keifu.training.run import metrics, outcome
from keifu.training.run.progress import format_bytes, format_count, format_seconds
from keifu.training.run.report_words import language, say, sentence
from keifu.training.run.run_directory import RECIPE, SAMPLES
from keifu.training.settings import flat
from keifu.untrusted import read_json, read_json_object, reading

WIDTH, HEIGHT = 480, 260
COLOURS = {  # matplotlib's colours → the page's
    "#2f6fb4": "var(--c0)", "#c8501e": "var(--c1)", "#2b8a4b": "var(--c2)", "#8a4fb0": "var(--c3)",
    "#a07800": "var(--c4)",
}  # fmt: skip
INK, RULE = "#5b6675", "#dfe3e8"
ON_THE_PAGE = {**COLOURS, INK: "var(--soft)", RULE: "var(--rule)"}  # CSS variables follow the colour scheme
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 13, "font.sans-serif": ["DejaVu Sans"], "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
POINTS = 400  # the most points of a curve; longer ones are averaged

Point = Sequence[float | int]  # two numbers; a list if read from JSON


class Curve(NamedTuple):
    """A named line through points (x, y). marked: draw each point."""

    name: str
    points: Sequence[Point]
    marked: bool = False


def chart(title: str, y_label: str, curves: Iterable[Curve], x_label: str = "step", from_zero: bool = False) -> str:
    """Return an HTML figure with the curves on common axes; "" if no point is finite."""
    shown = [Curve(c.name, _averaged(c.points), c.marked) for c in curves]
    shown = [curve for curve in shown if curve.points]
    if not shown:
        return ""
    names = "".join(f'<span class="key c{n}">{escape(say(c.name))}</span>' for n, c in enumerate(shown))
    legend = f'<span class="legend">{names if len(shown) > 1 else ""}</span>'
    caption = escape(say(title))
    picture = f'<svg role="img" aria-label="{caption}"{draw_curves(shown, y_label, x_label, from_zero, title)}'
    for label in (x_label, y_label):  # matplotlib measures them in English, since its font has no other letters
        picture = picture.replace(f">{escape(label)}</text>", f">{escape(say(label))}</text>")
    return f"<figure><figcaption>{caption} {legend}</figcaption>{picture}</figure>"


def draw_curves(curves: Sequence[Curve], y_label: str, x_label: str, from_zero: bool, salt: str) -> str:
    """Draw curves with matplotlib. Return the SVG text after `<svg`, without XML namespaces and size."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((0.15, 0.17, 0.82, 0.77), frameon=False)
        for colour, curve in zip(cycle(COLOURS), curves):  # noqa: B905 (the colours have no end)
            marker = "o" if curve.marked or len(curve.points) == 1 else ""
            axes.plot(*zip(*curve.points, strict=True), color=colour, marker=marker, markersize=5, clip_on=False)
        axes.grid(axis="y", color=RULE, clip_on=False)
        axes.tick_params(length=0)
        axes.set(xlabel=x_label, ylabel=y_label, **({"ylim": (0, None)} if from_zero else {}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: format_count(value) if abs(value) >= 1e4 else f"{value:.4g}")
        file = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", file.getvalue().partition("<svg")[2])
    for colour, name in ON_THE_PAGE.items():
        svg = svg.replace(colour, name)
    return svg


def _averaged(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the finite points; if there are more than `POINTS`, the means of equal numbers of them."""
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(finite) // POINTS) or 1
    parts = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


REPORT = "report.html"
CURVES = "curves.json"  # additional charts of a run, in its folder: a list of arguments of `chart`
SECTIONED = frozenset(  # fields of recipe.json that the page shows in a section; others go to the head
    ["title", "paper", "command", "expected", "data", "options", "settings", "versions", "hashes", "figures", "cost"]
    + ["resolved", "unit", "finished", "steps", "data_fingerprint", "recipe", "length"]
)
NARROW = 240  # the least width of a column of pictures in pixels; smaller pictures are enlarged


def write_report(directory: Path) -> None:
    """Write report.html from recipe.json, metrics.jsonl, samples/ and the pictures in a run's folder."""
    _write(directory, runs=[_content(directory)])


def write_joined(directory: Path, title: str, text: str, runs: Sequence[Path]) -> Path:
    """Write one report.html of several runs, one after the other, under a common title and text. Return its path."""
    return _write(directory, title=title, heading=title, summary=text, runs=map(_content, runs))


def write_page(
    directory: Path, title: str, text: str, facts: Mapping[str, Any], pictures: Mapping[str, bytes], table: str = ""
) -> None:
    """Write report.html of a run without the training loop. Write each picture as PNG next to it."""
    for name, picture in pictures.items():
        write_atomic(directory / f"{name}.png", picture)
    short = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in facts.items()}
    shown = [_picture(directory / f"{name}.png") for name in pictures]
    content = {"paragraphs": text.splitlines(), "text_table": table, "pictures": shown, "facts": short}
    _write(directory, title=title, heading=title, **content)


def _write(directory: Path, **content: Any) -> Path:
    """Write report.html of a folder, and return its path. content: the template's variables."""
    return write_html(directory / REPORT, **content)


def write_html(path: Path, **content: Any) -> Path:
    """Write a page from the template report.html, and return its path. content: the template's variables."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("keifu.training.run", ".")
    templates = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"words": _words, "say": say}
    page = templates.get_template(REPORT).render(content, language=language())
    write_atomic(path, page + "\n")
    return path


def _content(directory: Path) -> dict[str, Any]:
    """Return the content of a run's report."""
    recipe, samples = read_json_object(directory / RECIPE), directory / SAMPLES
    with reading(directory / RECIPE):
        machine = _machine(recipe)
    lines = metrics.read(directory)
    texts = sorted(samples.glob("*.txt"))
    pictures = [*sorted(samples.glob("*.png")), *sorted(directory.glob("*.png"))]
    return {
        "recipe": recipe,
        "learned": outcome.learned(lines, recipe.get("figures", {})) if recipe.get("finished") else "",
        "notes": [*_notes(recipe), *outcome.rising(lines)],
        "figures": _key_figures(recipe),
        "charts": "".join(_charts(lines, recipe["unit"])) + _extras(directory),
        "by_source": _by_source(recipe.get("figures", {})),
        "texts": [(_when(path), path.read_text(encoding="utf-8", errors="replace")) for path in texts],
        "pictures": [_picture(path) for path in pictures],
        "options": flat(recipe["options"]),
        "data": _data(recipe.get("data") or []),
        "machine": machine,
    }


def _notes(recipe: Mapping[str, Any]) -> list[str]:
    """Return the sentences below the title: the paper, the expected result, further entries, and changed lengths."""
    texts = [str(recipe[name]) for name in ("paper", "expected") if recipe.get(name)]
    extra = [f"{name.replace('_', ' ')}: {_words(value)}" for name, value in recipe.items() if name not in SECTIONED]
    return [*texts, *extra, *(sentence("changed length", **line) for line in recipe.get("length", ()))]


def _key_figures(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures as pairs of a value and its label."""
    figures, unit = recipe.get("figures", {}), recipe["unit"]
    words = {
        "validation_loss": ("validation loss", "{:.4g}".format),
        "bits_per_byte": ("bits per byte", "{:.4g}".format),
        "loss": ("training loss", "{:.4g}".format),
        "seconds": ("of training", format_seconds),
        f"{unit}_per_second": (f"{unit} per second", "{:,.0f}".format),
        "flops_utilisation": ("of the matmul peak", "{:.0%}".format),
    }
    others = {n: (n.replace("_", " "), "{:.4g}".format) for n in figures if _is_plain(n)}
    words |= {name: entry for name, entry in others.items() if name not in words}
    if figures.get("flops_utilisation", 1.0) < 0.01:  # a model so small that the share says nothing
        del words["flops_utilisation"]
    shown = [(text(figures[name]), say(label)) for name, (label, text) in words.items() if name in figures]
    parameters = format_count(recipe["cost"]["parameters"])
    return [*shown, (parameters, say("parameters")), (f"{recipe.get('steps', 0):,}", say("steps"))]


def _charts(lines: Sequence[Mapping[str, float | int]], unit: str) -> list[str]:
    valid = metrics.last_metrics(lines)
    kept = {id(line) for line in valid}

    def curve(field: str, name: str = "", marked: bool = False) -> Curve:
        return Curve(name or field, [(line["step"], line[field]) for line in valid if field in line], marked)

    def both(name: str) -> list[Curve]:
        return [curve(name, "training"), curve(f"validation_{name}", "validation", True)]

    undone = [(line["step"], line["loss"]) for line in lines if "loss" in line and id(line) not in kept]
    names = sorted({name for line in lines for name in line if _is_plain(name)} - {"validation_loss"})
    rates = [curve("learning_rate", "AdamW"), curve("matrix_rate", "Muon")]
    return [
        chart("Loss", "loss", [*both("loss"), Curve("undone", undone)]),
        *(chart(a.capitalize(), a, both(a)) for a in (name.removeprefix("validation_") for name in names)),
        chart("Bits per byte of the validation text", "bits per byte", [curve("bits_per_byte", marked=True)]),
        chart("Learning rate", "rate", rates, from_zero=True),
        chart("Norm of the gradient, before clipping", "norm", [curve("gradient_norm")], from_zero=True),
        chart("Speed", f"{unit} per second", [curve(f"{unit}_per_second")], from_zero=True),
    ]


def _extras(directory: Path) -> str:
    """Return the charts of a run's curves.json, or a note if this file is invalid."""
    path = directory / CURVES
    if not path.exists():
        return ""
    try:
        charts = read_json(path)
        if not all(isinstance(plot[name], str) for plot in charts for name in ("title", "y_label")):
            raise TypeError("a title or a y_label is no string")
        return "".join(chart(**{**plot, "curves": [Curve(**curve) for curve in plot["curves"]]}) for plot in charts)
    except (UserError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        return f'<p class="soft">{CURVES} is not a list of charts, and is left out: {escape(str(error))}.</p>'


def _is_plain(name: str) -> bool:
    """Return whether a figure is about the whole validation set; figures of a part of it are named `part/figure`."""
    return name.startswith("validation_") and "/" not in name


def _by_source(figures: Mapping[str, float | int]) -> list[list[str]]:
    """Return the columns and rows of a table of the figures named `validation_part/figure`, with a row for each part;
    [] without such figures."""
    texts = {name.removeprefix("validation_"): f"{value:.4g}" for name, value in figures.items() if "/" in name}
    parts, columns = (list(dict.fromkeys(name.split("/")[level] for name in texts)) for level in (0, 1))
    rows = [[part, *(texts.get(f"{part}/{column}", "") for column in columns)] for part in parts]
    return [["source", *(name.replace("_", " ") for name in columns)], *rows] if rows else []


def _picture(path: Path) -> dict[str, Any]:
    """Return a PNG file's name, content and size for the template."""
    content = path.read_bytes()
    shape = {"wide": path.parent.name != SAMPLES, "small": int.from_bytes(content[16:20]) < NARROW}  # PNG's width
    return {"name": _when(path), "base64": base64.b64encode(content).decode(), **shape}


def _when(path: Path) -> str:
    """Return "step 100" for `step-00000100`; other names with spaces for underscores."""
    prefix, _, number = path.stem.partition("-")
    is_step = prefix == "step" and number.isdigit()
    return say("step {:,}").format(int(number)) if is_step else path.stem.replace("_", " ")


def _data(parts: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the columns of the table of data, and its rows; [] without data."""
    columns = list(dict.fromkeys(name for part in parts for name in part))
    return [columns, *([part.get(name, "") for name in columns] for part in parts)] if parts else []


def _machine(recipe: Mapping[str, Any]) -> dict[str, Any]:
    cost, resolved = recipe["cost"], recipe["resolved"]
    memory = 2 * cost["parameter_bytes"] + cost["optimizer_bytes"] + cost["fixed_bytes"]
    memory += cost["row_bytes"] * cost["micro_batch"]
    measured = {
        "matmul peak": f"{format_count(resolved['flops_per_second'])}FLOP/s in {resolved['precision']}",
        "memory, estimated": f"{format_bytes(memory)} of {format_bytes(cost['available'])}",
        "rows at a time": resolved["micro_batch"],
    }
    facts = {"device": resolved["device"], **measured, **recipe["versions"]}
    return {say(name): value for name, value in facts.items()}


def _words(value: Any) -> str:
    """Return a setting as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    names = {None: "unset", True: "yes", False: "no"}
    return say(names[value]) if value is None or isinstance(value, bool) else str(value)
