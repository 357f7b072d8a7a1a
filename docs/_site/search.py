"""The search index of each language: an English page searches English pages only, a Japanese page Japanese ones."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

JAPANESE = "ja/"
HELP = re.compile(r"(?:ja/)?reference/(?:recipes|verbs)\.html#")
OPTION = re.compile(r"--(?:\[no-\])?[a-z][\w.-]*")
BASE = re.compile(r'("base": ")((?:\.\./)*)\.\.(")')

BOOSTS = {"results/": 0.4, "reference/recipes": 0.4, "reference/": 0.7, "extending/": 0.7}  # other pages: 2
# The theme searches beginnings of words, so "resume" does not find "Resuming": other words that people type for a page.
KEYWORDS = {"resuming.html": ["resume", "continue"], "lineage/deepseek_r1.html": ["GRPO", "reasoning"]}

Index = dict[str, Any]


def boost(page: str) -> float:
    """Return the weight of a page in a search: a page that explains counts more than a list or a table of figures."""
    return next((weight for start, weight in BOOSTS.items() if page.startswith(start)), 2.0)


def of_language(index: Index, japanese: bool) -> Index:
    """Return the part of an index whose pages are in one language, with addresses from the folder of the language."""
    found = [doc for doc in index["docs"] if doc["location"].startswith(JAPANESE) == japanese]
    docs = [short_help(doc) | {"location": doc["location"].removeprefix(JAPANESE)} for doc in found]
    docs = [doc | {"tags": KEYWORDS[doc["location"]]} if doc["location"] in KEYWORDS else doc for doc in docs]
    languages = ["ja", "en"] if japanese else ["en"]
    return index | {"config": index["config"] | {"lang": languages}, "docs": docs}


def short_help(doc: Index) -> Index:
    """Return an entry; of a help text of many lines it keeps the first sentences and the names of the options."""
    if not HELP.match(doc["location"]):
        return doc
    text = re.sub(r"<[^>]+>", " ", doc["text"])
    about = re.sub(r"\s+", " ", text.partition("Arguments:")[0].partition("Options:")[0])[:400]
    options = " ".join(dict.fromkeys(OPTION.findall(text)))
    return doc | {"text": f"<p>{about.strip()}</p> <p>{options}</p>"}


def split(site: Path) -> None:
    """Write the index of each language into the folder of its pages, for servers (JSON) and opened files (a script)."""
    index: Index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    for folder, japanese in ((site / "search", False), (site / "ja/search", True)):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(of_language(index, japanese), ensure_ascii=False, separators=(",", ":"))
        (folder / "search_index.json").write_text(text, encoding="utf-8")
        (folder / "search_index.js").write_text(f"var __index = {text}", encoding="utf-8")


def own_base(html: str) -> str:
    """Return a Japanese page whose scripts look for the index and its addresses in the folder of Japanese pages."""
    changed, count = BASE.subn(lambda found: f"{found[1]}{found[2].removesuffix('/') or '.'}{found[3]}", html, count=1)
    if not count:
        raise PluginError("A Japanese page names no base for its search: the theme has changed.")
    return changed
