"""The tracks of the lineage: `python docs/_site/tracks.py` renews the links at the head of its pages and the index.

A track is a way through the pages for one purpose. docs/lineage/tracks.json has the order of its pages.
"""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "lineage"
MARKED = re.compile(r"(?s)(<!-- tracks -->\n).*?(<!-- end of tracks -->)")
ENDINGS = {"en": ".md", "ja": ".ja.md"}
INDEX = {"en": "The lineage", "ja": "系譜"}

Track = dict[str, Any]


def read(language: str) -> tuple[list[Track], dict[str, dict[str, Any]]]:
    """Return the tracks, and the row of each landmark by its name, with their texts in one language."""
    ending = "" if language == "en" else f"_{language}"
    files = [json.loads((FOLDER / name).read_text(encoding="utf-8")) for name in ("tracks.json", "lineage.json")]
    tracks, rows = [
        [row | {key: row[key + ending] for key in ("title", "about", "new") if key in row} for row in file]
        for file in files
    ]
    return tracks, {row["name"]: row for row in rows}


def heads(language: str) -> dict[str, str]:
    """Return the line of links of each page: its track, the page before, the index and the page after.

    The last page of a track leads to the first one of the next track.
    """
    tracks, rows = read(language)
    ending = ENDINGS[language]
    ordered = [(track, number, name) for track in tracks for number, name in enumerate(track["pages"], 1)]
    lines = {}
    for position, (track, number, name) in enumerate(ordered):
        track_name = f"**{track['title']}** {number}/{len(track['pages'])}"
        parts = [track_name, f"[{INDEX[language]}](index{ending})"]
        if position:
            before = ordered[position - 1][2]
            parts.insert(1, f"[← {rows[before]['title']}]({before}{ending})")
        if position + 1 < len(ordered):
            after = ordered[position + 1][2]
            parts.append(f"[{rows[after]['title']} →]({after}{ending})")
        lines[name] = " · ".join(parts)
    return lines


def overview(language: str) -> str:
    """Return the part of the index that lists the pages of each track."""
    tracks, rows = read(language)
    ending, stop = ENDINGS[language], {"en": ": ", "ja": "："}[language]
    parts = []
    for track in tracks:
        pages = " → ".join(f"[{rows[name]['title']}]({name}{ending})" for name in track["pages"])
        parts.append(f"**{track['title']}**{stop}{track['about']}\n\n{pages}\n")
    return "\n".join(parts)


def renewed(page: str, name: str, language: str) -> str:
    """Return a page of the lineage with the links of its track; name: of the landmark, or "index"."""
    if name == "index":
        return MARKED.sub(lambda found: f"{found[1]}\n{overview(language)}\n{found[2]}", page)
    lines = page.split("\n")
    lines[2] = heads(language)[name]
    return "\n".join(lines)


def main() -> None:
    """Write the pages that change, and print their names."""
    for language, ending in ENDINGS.items():
        for name in [*heads(language), "index"]:
            path = FOLDER / f"{name}{ending}"
            page = path.read_text(encoding="utf-8")
            if renewed(page, name, language) != page:
                path.write_text(renewed(page, name, language), encoding="utf-8")
                print(path.name)


if __name__ == "__main__":
    main()
