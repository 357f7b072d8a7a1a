"""Hooks of the site's build: mathematics as MathML, links to the sources, and help texts of the program itself."""

import os
import re
import shutil
import sys
from pathlib import Path

from latex2mathml.converter import convert
from markdown.extensions.toc import slugify, unique
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402 (it stands beside this file)

ROOT = Path(__file__).parent.parent.parent
SOURCES = "source"  # the folder of the site that files outside docs/ are copied to
LINK = re.compile(r"(?<!!)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(((?:\.\./)+[^)#\s]*|[A-Z]+\.md)(#[^)]*)?\)")
MATHEMATICS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
WIDE = "[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"  # Japanese characters and punctuation
BROKEN = re.compile(rf"(?<={WIDE})\n *(?={WIDE})")  # a line break within a Japanese sentence, which would be a space
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
copied: set[Path] = set()


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Help texts stand where a page marks their place; links to files outside docs/ lead to copies inside the site."""
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

    english = ROOT / "docs" / f"{page.file.src_uri.removesuffix('.ja.md')}.md"
    if page.file.src_uri.endswith(".ja.md") and english.exists():
        markdown = with_anchors(markdown, english.read_text(encoding="utf-8"))
    parts = FENCE.split(reference.fill(markdown))
    return "".join(part if part.startswith("```") else LINK.sub(link, BROKEN.sub("", part)) for part in parts)


def with_anchors(page: str, english: str) -> str:
    """The Japanese page, each heading with the anchor of the English heading in its place, so that links serve both."""
    seen: set[str] = set()
    titles = [re.sub(r"[*`]|\]\([^)]*\)", "", title) for title in HEADING.findall(FENCE.sub("", english))]
    anchors = iter([unique(slugify(title, "-"), seen) for title in titles])
    parts = FENCE.split(page)
    named = [HEADING.sub(lambda found: f"{found[0]} {{ #{next(anchors, '')} }}", part) for part in parts[::2]]
    parts[::2] = named
    return "".join(parts)


def on_page_content(html: str, **_: object) -> str:
    """Formulas in LaTeX become MathML, which browsers set without a script."""
    return MATHEMATICS.sub(lambda found: mathml(found[2], "block" if found[1] == "div" else "inline"), html)


def mathml(latex: str, display: str) -> str:
    """One formula; `latex` as it stands in HTML."""
    for entity, character in ENTITIES.items():
        latex = latex.replace(entity, character)
    return convert(latex.strip(), display=display)


def on_post_build(config: MkDocsConfig) -> None:
    """Puts copies of the files that pages link to into the site."""
    for file in copied:
        target = Path(config.site_dir) / SOURCES / f"{file.relative_to(ROOT).as_posix()}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
