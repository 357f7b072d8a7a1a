"""Prints the executed part of a class, by the interpreter that runs this file. It needs no package."""

import sys
from pathlib import Path

from keifu.eject import executed
from keifu.eject.pruning import ModuleText, Pruner


class Toy:
    """Class with é in a remark, branches of which one is taken, and a method that is never called."""

    def __init__(self, wide: int, deep: list[int] | None = None):
        self.wide = wide or 3  # é
        self.deep = deep if deep is not None else [2 * n for n in range(wide)]
        if wide > 100:
            self.more = 1
        elif wide > 2:
            self.more = 2
        else:
            self.more = 3

    def run(self, values: list[int | None]) -> int:
        total = 0
        for value in values:
            if value is None:
                continue
            total += value and self.more
        return total if total else -1

    def never(self) -> str:
        return f"{self.more}"


if __name__ == "__main__":
    executed.WATCHED = __file__
    found = executed.record(lambda: Toy(5).run([1, 2]))
    text = ModuleText(__file__, Path(__file__).read_text(encoding="utf-8"))
    (toy,) = (node for node in text.tree.body if getattr(node, "name", "") == "Toy")
    sys.stdout.buffer.write(Pruner(text, found).text(toy).encode())
