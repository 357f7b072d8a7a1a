"""Text that ends before a stop string, however the string is cut into pieces; knows no tokens."""

from collections.abc import Sequence


class StopText:
    """Passes text on as it comes, but holds back whatever may become a stop string.

    `found` tells that one has come. The text then ends where the first stop string to be complete begins; of several
    that are complete at the same character, the one that begins first counts. So the pieces do not change the text.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can no longer belong to a stop string."""
        text = self._held + text
        places = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        self.found = bool(places)
        end = min(places)[1] if places else len(text) - self._beginning(text)
        self._held = "" if self.found else text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back and, since no more text comes, is no stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How many characters at the end of the text begin a stop string."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
