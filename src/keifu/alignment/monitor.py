"""Figures of a run beside their normal range, and a warning where one leaves it; knows no method and no loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Range(NamedTuple):
    """A figure's least and largest value, and what it may mean that it is outside.

    relative: both are multiples of what the figure was at first.
    """

    least: float
    largest: float
    meaning: str
    relative: bool = False

    def bounds(self, first: float) -> tuple[float, float]:
        """The least and the largest value where the figure was that at first."""
        return (self.least * first, self.largest * first) if self.relative else (self.least, self.largest)


@dataclass
class DivergenceMonitor:
    """Warnings where a figure leaves its normal range: one each time that it does, not one a step.

    first: what the figures were at first; of those that are not there, what is seen first counts.
    """

    normal: Mapping[str, Range]
    first: dict[str, float] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)

    def __call__(self, figures: Mapping[str, float]) -> Iterator[str]:
        """The warnings that these figures of a step give."""
        for name, value in figures.items():
            if name not in self.normal:
                continue
            least, largest = self.normal[name].bounds(self.first.setdefault(name, value))
            inside = least - 1e-6 <= value <= largest + 1e-6
            if not inside and name not in self.outside:
                told = f"{name.replace('_', ' ')} is {value:.3g}, normal is {least:.2g} to {largest:.2g}"
                yield f"{told}: {self.normal[name].meaning}."
            self.outside = self.outside - {name} if inside else self.outside | {name}

    def table(self, figures: Mapping[str, float]) -> str:
        """The figures that have a normal range, each beside it, a line each."""
        lines = []
        for name, normal in self.normal.items():
            if name in figures:
                least, largest = normal.bounds(self.first.get(name, figures[name]))
                inside = least - 1e-6 <= figures[name] <= largest + 1e-6
                mark = "" if inside else f"  <- {normal.meaning}"
                span = f"normal {least:.3g} to {largest:.3g}"
                lines.append(f"  {name.replace('_', ' '):19} {figures[name]:>8.3g}   {span}{mark}")
        return "\n".join(lines)


def describe(normal: Mapping[str, Range]) -> str:
    """The ranges, for a report."""
    spans = {name: (r.least, r.largest, " times the first" if r.relative else "") for name, r in normal.items()}
    return "; ".join(f"{n.replace('_', ' ')} {low:.3g} to {high:.3g}{more}" for n, (low, high, more) in spans.items())
