"""Every link of a page leads to a file; the site (slow) is built without a warning, and nothing is fetched."""

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("mkdocs_static_i18n")

ROOT = Path(__file__).parents[2]
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src")}  # what a browser fetches by itself


class Links(HTMLParser):
    """The links of a page, those that are fetched with it, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the anchors, links and loaded files of a tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src"):
            if name in given:
                self.links.append(given[name])
                self.loaded += [given[name]] if (tag, name) in LOADED and given.get("rel") != "canonical" else []


def outside(link: str) -> bool:
    return bool(re.match(r"[a-z]+:|//", link))


def dead_links(site: Path) -> Iterator[str]:
    """Yield links between files of a folder whose file or anchor is not there."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if outside(link) or path.name == "404.html":
                continue
            found = path if not target else Path(os.path.normpath(path.parent / unquote(target)))
            if not found.exists() or (anchor and found in pages and unquote(anchor) not in pages[found].anchors):
                yield f"{path.relative_to(site)}: {link}"


def fetched(site: Path) -> list[str]:
    """Return the links of other sites that pages would load."""
    pages = [Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")]
    return [link for page in pages for link in page.loaded if outside(link) and not link.startswith("data:")]


built = pytest.mark.slow  # the site is built, as by `make docs`, which also refuses dead links and anchors


@built
def test_every_link_leads_to_a_file_and_an_anchor(site: Path) -> None:
    assert [*dead_links(site)] == []


@built
def test_nothing_is_fetched_from_another_machine(site: Path) -> None:
    assert fetched(site) == []


@built
def test_formulas_are_set_without_a_script(site: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert not any('class="arithmatex"' in text for text in texts)


@built
def test_each_page_is_there_in_both_languages(site: Path) -> None:
    pages = {path.relative_to(site) for path in site.rglob("*.html")} - {Path("404.html")}
    japanese = {path for path in pages if path.parts[0] == "ja"}
    assert {Path("ja") / path for path in pages - japanese} == japanese
    assert 'lang="ja"' in (site / "ja/index.html").read_text(encoding="utf-8")


@built
@pytest.mark.parametrize("folder", ["", "ja"])
def test_search_finds_pages_of_one_language(site: Path, folder: str) -> None:
    text = (site / folder / "search/search_index.json").read_text(encoding="utf-8")
    assert (site / folder / "search/search_index.js").read_text(encoding="utf-8") == f"var __index = {text}"
    docs = json.loads(text)["docs"]
    pages = {path.relative_to(site / folder).as_posix() for path in (site / folder).rglob("*.html")}
    assert {doc["location"].partition("#")[0] for doc in docs} <= pages - {"404.html"}
    assert not any(doc["location"].startswith("ja/") for doc in docs)
    titles = "".join(doc["title"] for doc in docs)
    assert bool(re.search("[ぁ-ヿ]", titles)) == bool(folder)
    helps = [doc["text"] for doc in docs if doc["location"].startswith("reference/recipes.html#")]
    assert bool(helps) != bool(folder)  # help texts are English
    assert max(map(len, helps), default=0) < 6000


@built
@pytest.mark.parametrize("folder", ["", "ja"])
def test_the_words_that_people_type_lead_to_their_page(site: Path, folder: str) -> None:
    docs = json.loads((site / folder / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    tagged = {doc["location"]: doc["tags"] for doc in docs if "tags" in doc}
    assert "resume" in tagged["resuming.html"]
    weights = {doc["location"]: doc["boost"] for doc in docs if "boost" in doc}
    assert weights["resuming.html"] > weights["results/assistants.html"]


@built
@pytest.mark.parametrize("name", ["index.html", "lineage/index.html", "ja/index.html", "ja/lineage/index.html"])
def test_each_box_of_the_lineage_is_a_link_to_its_page(site: Path, name: str) -> None:
    rows = json.loads((ROOT / "docs/lineage/lineage.json").read_text(encoding="utf-8"))
    page = site / name
    found = re.findall(r'<a href="([^"]*)"><rect', page.read_text(encoding="utf-8"))
    assert [Path(link).stem for link in found] == [row["name"] for row in rows]
    assert all((page.parent / link).is_file() for link in found)
    assert ("ja" in name) == all("/ja/" in (page.parent / link).resolve().as_posix() for link in found)


STYLE = (Path(__file__).parents[2] / "docs/assets/style.css").read_text(encoding="utf-8")


def contrast(one: str, other: str) -> float:
    """Return the ratio of contrast of two colours (#rrggbb), as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("scheme", "page"), [("default", "#ffffff"), ("slate", "#1e2129")])
def test_links_can_be_read_and_are_underlined(scheme: str, page: str) -> None:
    (rule,) = re.findall(rf'data-md-color-scheme="{scheme}"\] {{ (--md-primary[^}}]*)}}', STYLE)
    colours = dict(re.findall(r"--md-([\w-]+)-color: (#\w{6})", rule))
    assert contrast(colours["typeset-a"], page) >= 4.5
    assert contrast(colours["primary-fg"], "#ffffff") >= 4.5
    assert "text-decoration: underline" in STYLE
    assert contrast("#009485", "#ffffff") < 4.5


@built
@pytest.mark.parametrize("name", ["index.html", "lineage/gpt2.html"])
def test_a_japanese_page_searches_from_its_folder(site: Path, name: str) -> None:
    for folder in ("", "ja"):
        page = site / folder / name
        (base,) = re.findall(r'"base": "([^"]*)"', page.read_text(encoding="utf-8"))
        assert (page.parent / base).resolve() == (site / folder).resolve()


@built
def test_titles_in_the_sidebar_are_short(site: Path) -> None:
    for folder, most in (("", 34), ("ja", 26)):
        for section in ("guides", "lineage", "parts", "extending", "reference"):
            page = next(iter(sorted((site / folder / section).glob("*.html")))).read_text(encoding="utf-8")
            navigation = page.partition("md-nav--primary")[2].partition("md-nav--secondary")[0]
            titles = [" ".join(text.split()) for text in re.findall(r"md-ellipsis.>([^<]*)<", navigation)]
            assert len(titles) > 5
            assert [title for title in titles if len(title) > most] == []


@built
def test_the_list_of_recipes_is_aligned(site: Path) -> None:
    page = (site / "reference/verbs.html").read_text(encoding="utf-8")
    block = re.sub(r"<[^>]+>", "", page.partition('id="train"')[2].partition("</code>")[0])
    assert "\t" not in block
    assert max(map(len, block.splitlines())) <= 101
    starts = {line.index("  ") for line in block.splitlines() if re.match(r"latent-diffusion  ", line)}
    assert starts == {len("latent-diffusion")}


@built
@pytest.mark.parametrize("folder", ["", "ja"])
def test_the_catalogue_is_in_the_site(site: Path, folder: str) -> None:
    page = (site / folder / "reference/catalogue.html").read_text(encoding="utf-8")
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    assert {"smollm2", "mnist", "fashion-mnist", "openmoji"} <= {row[0] for row in rows if row}
    assert all(len(row) == 5 for row in rows if row)


CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def files_missing(pages: Iterable[Path]) -> Iterator[str]:
    """Yield links of pages, before the site is built, whose file is not there."""
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
            if not outside(link) and not (page.parent / unquote(urldefrag(link).url)).exists():
                yield f"{page.name}: {link}"


def test_every_link_of_a_page_leads_to_a_file() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    assert len(pages) > 100 and [*files_missing(pages)] == []


def test_a_link_to_no_file_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("[x](b.md) [y](a.md#z) `[z](c.md)` [w](https://example.org/d.md)\n")
    assert [*files_missing([tmp_path / "a.md"])] == ["a.md: b.md"]


@pytest.mark.parametrize(
    ("page", "dead"),
    [
        ('<a href="b.html">', ["a.html: b.html"]),
        ('<a href="#there">', ["a.html: #there"]),
        ('<a href="#there"><p id="there">', []),
        ('<a href="https://example.org/x">', []),
        ('<img src="x.png">', ["a.html: x.png"]),
    ],
)
def test_a_dead_link_would_be_seen(tmp_path: Path, page: str, dead: list[str]) -> None:
    (tmp_path / "a.html").write_text(page)
    assert [*dead_links(tmp_path)] == dead


def test_a_script_from_elsewhere_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<script src="https://example.org/x.js"></script><a href="https://example.org">')
    assert fetched(tmp_path) == ["https://example.org/x.js"]


@pytest.mark.parametrize("address", ["", "https://example.org/o/keifu"])
def test_pages_link_the_repository_once_it_has_an_address(address: str, tmp_path: Path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/_site/hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    (tmp_path / "pyproject.toml").write_text(f'[tool.keifu]\nrepository = "{address}"\n', encoding="utf-8")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    config = hooks.MkDocsConfig()
    hooks.on_config(config)
    assert config.copyright == (f'<a href="{address}">{address}</a>' if address else None)
