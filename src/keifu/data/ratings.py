"""Preferences made of the catalogue's ratings by a fixed rule; knows no model and no template.

chitchat's people rated the talk that they had had as witty, upbeat and interesting, from 1 to 10. So a preference here
is between two whole talks that had the same question to begin with, and what is asked for is such a talk; nobody saw
the two beside each other, and it is no preference between two single answers.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from keifu.data import catalogue, readers

UNTOUCHED = 5  # where the form's sliders stood: a talk of which all three are this was perhaps not rated
APART = 3.0  # how much a pair's mean ratings differ at least


def talks() -> Iterator[dict[str, Any]]:
    """Pairs of talks on one question, as preferences are written; of each question the best with the worst, the second
    best with the second worst, and so on, each talk once."""
    content = json.loads(catalogue.fetch("chitchat").read_text(encoding="utf-8"))
    rated: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for talk in content.values():
        marks, question = (talk.get("ratings") or {}).values(), (talk.get("prompt") or "").strip()
        spoken = readers.spoken(talk)
        if question and len(spoken) > 1 and any(mark != UNTOUCHED for mark in marks):
            rated[question].append((mean(marks), readers.as_document(spoken)))
    for question, found in sorted(rated.items()):
        order = sorted(found, key=lambda each: (each[0], hashlib.sha256(each[1].encode()).digest()))
        for worse, better in zip(order, reversed(order), strict=True):
            if better[0] - worse[0] < APART:
                break
            asked = f"Write a talk between two people, A and B, that begins with this question: {question}"
            yield {"prompt": asked, "chosen": better[1], "rejected": worse[1]}


PREFERENCES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"chitchat-preferences": talks}
