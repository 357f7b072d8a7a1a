"""Hooks of the site's build: mathematics as MathML, links to the sources, and help texts of the program itself."""

import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from latex2mathml.converter import convert
from markdown.extensions.toc import slugify, unique
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import live  # noqa: E402 (a file of this folder)
import page_notebooks  # noqa: E402
import reference  # noqa: E402
import search  # noqa: E402
from landmarks import overview  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
SOURCES = "source"  # the folder of the site that files outside docs/ are copied to
LINK = re.compile(r"(?<!!)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(((?:\.\./)+[^)#\s]*|[A-Z]+\.md)(#[^)]*)?\)")
MATHEMATICS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
WIDE = "[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"  # Japanese characters and punctuation
BROKEN = re.compile(rf"(?<={WIDE})\n *(?={WIDE})")  # a line break within a Japanese sentence, which would be a space
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
ASIDE = re.compile(r"\s*(?:\([^)]*\)|（[^）]*）)|(?::\s|：).*")  # authors and years, and what follows a colon
copied: set[Path] = set()


def on_config(config: MkDocsConfig) -> None:
    """Link the repository at the foot of each page, once pyproject.toml has its address.

    The theme's own link (repo_url) would ask the host for numbers of stars, and the site fetches nothing.
    """
    address = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["keifu"]["repository"].rstrip("/")
    if address:
        config.copyright = f'<a href="{address}">{address}</a>'


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Insert help texts at their marks, and lead links to files outside docs/ to copies inside the site."""
    here = Path(page.file.abs_src_path).parent if page.file.abs_src_path else ROOT / "docs"

    def link(found: re.Match[str]) -> str:
        target = (here / found[2]).resolve()
        if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs") or not target.exists():
            return found[0]  # within docs/, or a mistake that the strict build reports
        if target.is_dir():
            target = target / "README.md"
        if not target.is_file():
            return found[1]
        copied.add(target)
        up = os.path.relpath(f"{SOURCES}/{target.relative_to(ROOT).as_posix()}.txt", Path(page.file.dest_uri).parent)
        return f'<a href="{Path(up).as_posix()}">{found[1]}</a>'

    page.meta.setdefault("title", short_title(markdown))
    page.meta.setdefault("search", {"boost": search.boost(page.file.src_uri)})
    english = ROOT / "docs" / f"{page.file.src_uri.removesuffix('.ja.md')}.md"
    if page.file.src_uri.endswith(".ja.md") and english.exists():
        markdown = with_anchors(markdown, english.read_text(encoding="utf-8"))
    if page.file.abs_src_path:
        markdown = page_notebooks.linked(markdown, Path(page.file.abs_src_path))
    parts = FENCE.split(reference.fill(markdown))
    return "".join(part if part.startswith("```") else LINK.sub(link, BROKEN.sub("", part)) for part in parts)


def short_title(markdown: str) -> str:
    """Return the title for the sidebar: the page's heading without authors, years and the part after a colon."""
    heading = HEADING.search(markdown)
    return ASIDE.sub("", heading[1]).replace("`", "").strip() if heading else ""


def with_anchors(page: str, english: str) -> str:
    """Return the Japanese page with the anchors of the English headings, so that links serve both."""
    seen: set[str] = set()
    titles = [re.sub(r"[*`]|\]\([^)]*\)", "", title) for title in HEADING.findall(FENCE.sub("", english))]
    anchors = iter([unique(slugify(title, "-"), seen) for title in titles])
    parts = FENCE.split(page)
    named = [HEADING.sub(lambda found: f"{found[0]} {{ #{next(anchors, '')} }}", part) for part in parts[::2]]
    parts[::2] = named
    return "".join(parts)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Return the page with its formulas as MathML, which browsers set without a script, and with the drawing of the
    lineage as a part of the page, whose boxes are links."""
    html = overview.linked(html, page.file.dest_uri)
    return MATHEMATICS.sub(lambda found: mathml(found[2], "block" if found[1] == "div" else "inline"), html)


def mathml(latex: str, display: str) -> str:
    """Return a formula as MathML; `latex` has the entities of HTML. Formulas with \\qquad between them may wrap."""
    for entity, character in ENTITIES.items():
        latex = latex.replace(entity, character)
    parts = [convert(part.strip(), display=display) for part in latex.split(r"\qquad")]
    if display == "block":
        parts = [f'<div class="formula">{part}</div>' for part in parts]
    return parts[0] if len(parts) == 1 else f'<div class="formulas">{"".join(parts)}</div>'


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Return a page with its live elements, which searches the pages of its language."""
    output = live.fill(output, page.file.dest_uri)
    return search.own_base(output) if page.file.dest_uri.startswith("ja/") else output


@event_priority(-200)  # after the plugins that write the index
def on_post_build(config: MkDocsConfig) -> None:
    """Copy what pages link to and what live elements need into the site, and split the search index by language."""
    search.split(Path(config.site_dir))
    live.copy(Path(config.site_dir))
    page_notebooks.write(Path(config.site_dir))
    for file in copied:
        target = Path(config.site_dir) / SOURCES / f"{file.relative_to(ROOT).as_posix()}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
