"""Record of the instructions of keifu that a function executes, by their places in the source."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from keifu.errors import UserError

ROOT = Path(__file__).parents[1]
WATCHED = f"{ROOT}/"


class Place(NamedTuple):
    """Range of a source file: from a line and column to a line and column, as in `ast`."""

    line: int
    column: int
    end_line: int
    end_column: int

    def holds(self, other: "Place") -> bool:
        """Return whether another place lies within this one."""
        begins = (self.line, self.column) <= (other.line, other.column)
        return begins and (other.end_line, other.end_column) <= (self.end_line, self.end_column)


class Executed:
    """The executed instructions of each file, with the number of times."""

    def __init__(self) -> None:
        self.places: dict[str, list[tuple[Place, int, int]]] = defaultdict(list)  # place, offset, times

    def add(self, code: CodeType, offsets: Counter[int]) -> None:
        """Add the executed offsets of a code object."""
        positions = [*code.co_positions()]
        for offset, times in offsets.items():
            line, end_line, column, end_column = positions[offset // 2]
            if line and end_line and column is not None and end_column is not None:
                place = Place(line, column, end_line, end_column)
                self.places[code.co_filename].append((place, offset, times))

    def within(self, file: str, place: Place) -> bool:
        """Return whether anything within the place was executed."""
        return any(place.holds(where) for where, *_ in self.places[file])

    def times(self, file: str, place: Place) -> int:
        """Return how often the place was entered: the times of its first executed instruction."""
        inside = [(offset, times) for where, offset, times in self.places[file] if place.holds(where)]
        return min(inside)[1] if inside else 0


def record(work: Callable[[], object]) -> Executed:
    """Call a function and return the instructions of keifu that were executed. Raises UserError if Python records
    none, because everything would be left out."""
    # by file too: code objects of equal functions are equal, also those of two files
    counts: dict[tuple[str, CodeType], Counter[int]] = defaultdict(Counter)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(WATCHED):
                return None
            frame.f_trace = trace  # from Python 3.13 on before `f_trace_opcodes`, which has no effect without
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            counts[frame.f_code.co_filename, frame.f_code][frame.f_lasti] += 1
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for such a frame when the trace function is set
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    if not counts:
        raise UserError(
            f"Python {sys.version.split()[0]} records no instructions: run keifu eject with another version."
        )
    executed = Executed()
    for (_, code), offsets in counts.items():
        executed.add(code, offsets)
    return executed
