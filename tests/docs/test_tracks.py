"""The tracks of the lineage: each page is in one, and they decide the links of pages, the index and the sidebar."""

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("lineage_tracks", ROOT / "docs/_site/tracks.py")
assert SPEC and SPEC.loader
tracks = importlib.util.module_from_spec(SPEC)  # the speedrun has another file of this name
SPEC.loader.exec_module(tracks)

FOLDER = ROOT / "docs/lineage"
TRACKS = json.loads((FOLDER / "tracks.json").read_text(encoding="utf-8"))
ORDER = [name for track in TRACKS for name in track["pages"]]


def test_each_landmark_is_in_one_track() -> None:
    rows = json.loads((FOLDER / "lineage.json").read_text(encoding="utf-8"))
    assert sorted(ORDER) == sorted(row["name"] for row in rows)


@pytest.mark.parametrize("language", tracks.ENDINGS)
def test_pages_and_the_index_have_the_links_of_their_tracks(language: str) -> None:
    for name in [*ORDER, "index"]:
        page = (FOLDER / f"{name}{tracks.ENDINGS[language]}").read_text(encoding="utf-8")
        assert tracks.renewed(page, name, language) == page, "run `python docs/_site/tracks.py`"


@pytest.mark.parametrize("language", tracks.ENDINGS)
def test_a_page_links_its_neighbours(language: str) -> None:
    heads, ending = tracks.heads(language), tracks.ENDINGS[language]
    for before, after in pairwise(ORDER):
        assert f"→]({after}{ending})" in heads[before]
        assert f"]({before}{ending}) · [" in heads[after]
    assert "←" not in heads[ORDER[0]] and "→" not in heads[ORDER[-1]]
    assert heads["bert"].startswith(
        {"en": "**Language** 9/18 · [← GPT-1]", "ja": "**言語** 9/18 · [← GPT-1]"}[language]
    )


def test_the_sidebar_has_the_pages_in_the_order_of_their_tracks() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"- lineage/(\w+)\.md", text) == ["index", *ORDER]
    assert all(f"          - {track['title']}:\n" in text for track in TRACKS)
    assert all(f"            {track['title']}: {track['title_ja']}\n" in text for track in TRACKS)


@pytest.mark.parametrize("track", TRACKS, ids=lambda track: track["name"])
def test_what_a_page_asks_the_reader_to_know_comes_before_it_in_its_track(track: dict) -> None:
    for position, name in enumerate(track["pages"]):
        text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
        first = " ".join(re.findall(r"Read \[[^.]*\. |Read \[.*", text.partition("## The problem")[0])[:1])
        asked = re.findall(r"\((\w+)\.md\)", first)
        assert all(each not in track["pages"][position:] for each in asked), name
