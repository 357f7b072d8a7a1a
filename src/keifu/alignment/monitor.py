"""Monitoring of training figures (reward, KL, entropy, ...): a warning if one leaves its normal range."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Healthy(NamedTuple):
    """Normal range of a figure, with the possible meaning of a value outside it and a remedy.

    relative: `least` and `largest` are multiples of the figure's first value.
    """

    least: float
    largest: float
    meaning: str
    relative: bool = False

    def bounds(self, first: float) -> tuple[float, float]:
        """Return the smallest and the largest normal value of a figure with this first value."""
        return (self.least * first, self.largest * first) if self.relative else (self.least, self.largest)


@dataclass
class DivergenceMonitor:
    """Monitor that warns when a figure leaves its normal range, and not again until the figure has come back.

    first: first values of figures; a missing one is set to the first value that is seen.
    """

    normal: Mapping[str, Healthy]
    first: dict[str, float] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)

    def __call__(self, figures: Mapping[str, float]) -> Iterator[str]:
        """Yield the warnings for the figures of a step."""
        for name, value in figures.items():
            if name not in self.normal:
                continue
            least, largest = self.normal[name].bounds(self.first.setdefault(name, value))
            inside = least - 1e-6 <= value <= largest + 1e-6
            if not inside and name not in self.outside:
                text = f"{name.replace('_', ' ')} is {value:.3g}, normal is {least:.2g} to {largest:.2g}"
                yield f"{text}: {self.normal[name].meaning}."
            self.outside = self.outside - {name} if inside else self.outside | {name}

    def table(self, figures: Mapping[str, float]) -> str:
        """Return a line for each figure that has a normal range: its value and the range."""
        lines = []
        for name, normal in self.normal.items():
            if name in figures:
                least, largest = normal.bounds(self.first.get(name, figures[name]))
                inside = least - 1e-6 <= figures[name] <= largest + 1e-6
                mark = "" if inside else f"  <- {normal.meaning}"
                span = f"normal {least:.3g} to {largest:.3g}"
                lines.append(f"  {name.replace('_', ' '):19} {figures[name]:>8.3g}   {span}{mark}")
        return "\n".join(lines)


def describe(normal: Mapping[str, Healthy]) -> str:
    """Return the ranges as text, for a report."""
    spans = {name: (r.least, r.largest, " times the first" if r.relative else "") for name, r in normal.items()}
    return "; ".join(f"{n.replace('_', ' ')} {low:.3g} to {high:.3g}{note}" for n, (low, high, note) in spans.items())
