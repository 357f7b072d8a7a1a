"""A report of numbers, texts and images as one offline page, report.html."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from keifu.files import write_atomic
from keifu.training.run.report import REPORT, page


def write_page(
    directory: Path, title: str, text: str, facts: Mapping[str, object], pictures: Mapping[str, bytes], table: str = ""
) -> None:
    """Writes report.html in the style of the training loop's, and each picture as PNG beside it under its name."""
    for name, picture in pictures.items():
        write_atomic(directory / f"{name}.png", picture)
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_words(value))}</td></tr>" for name, value in facts.items())
    figures = "".join(_figure(name, picture) for name, picture in pictures.items())
    body = f"<h1>{escape(title)}</h1>\n" + "".join(f"<p>{escape(line)}</p>\n" for line in text.splitlines())
    body += f"<pre>{escape(table)}</pre>\n" * bool(table) + figures
    body += f'<h2>Figures and settings</h2>\n<table class="pairs">{rows}</table>\n'
    write_atomic(directory / REPORT, page(title, body))


def _figure(name: str, picture: bytes) -> str:
    name, content = escape(name), base64.b64encode(picture).decode()
    image = f'<img alt="{name}" src="data:image/png;base64,{content}">'
    return f"<figure><figcaption>{name}</figcaption>{image}</figure>\n"


def _words(value: object) -> str:
    """A figure or a setting as a person writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unset" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
