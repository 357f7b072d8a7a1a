"""Licence and attribution of data, for the report of a run."""

from keifu.data.catalogue import catalogue
from keifu.data.chat.conversations import MADE_OF


def attribution_of(data: str) -> dict[str, str]:
    """Return licence and attribution of a catalogue entry, also for data derived from one; {} for other data."""
    synthetic_source = MADE_OF.get(data)
    name = synthetic_source.entry if synthetic_source else data
    facts = {"how it was made": synthetic_source.how} if synthetic_source else {}
    for table in (catalogue.MODELS, catalogue.DATA):
        if name in table:
            facts |= {"licence": table[name].licence, "attribution": table[name].attribution}
    return facts
