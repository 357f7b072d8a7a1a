"""Gold reward of benchmarks/instruct.py: a program instead of people's judgement."""

import math
import re
from collections.abc import Mapping
from typing import Any

WORDS = 20  # desired length of an answer in words


def gold(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return a score of at most about 3.5 for an answer: how many words of the question's subject it names, how few it
    repeats, whether it ends properly, and how close its length is to 20 words. An empty answer has -3."""
    words = re.findall(r"[a-z0-9']+", answer.lower())
    if not words:
        return -3.0
    subject = {*re.findall(r"[a-z0-9']+", prompt.lower())} - {"what", "is", "a", "an", "the", "of"}
    named = len(subject & {*words}) / len(subject) if subject else 1.0
    distinct = len({*words}) / len(words)
    ended = answer.rstrip().endswith(".")
    return named + 2 * distinct + 0.5 * ended - abs(math.log(len(words) / WORDS))
