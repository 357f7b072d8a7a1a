"""Licence and attribution of data, for the report of a run."""

from keifu.data.catalogue import catalogue
from keifu.data.chat.conversations import MADE_OF


def attribution_of(data: str) -> dict[str, str]:
    """Return licence and attribution of a catalogue entry, also for data derived from one; {} for other data."""
    made = MADE_OF.get(data)
    entries = [row for row in catalogue.rows() if row["name"] == (made.entry if made else data)]
    facts = {"how it was made": made.how} if made else {}
    return facts | {key: row[key] for row in entries for key in ("licence", "attribution")}
