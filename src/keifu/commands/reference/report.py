"""`keifu report`: write the report of a run again, or one page with the curves of several runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from keifu.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write one page with the curves of several runs, laid over each other, and the settings that differ.

    With one run, its report.html is written again, for example in another language (KEIFU_LANG=ja).
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help="Folders of runs.")]
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Page of several runs; unset: runs/compared.html."""


def run(options: Options) -> None:
    """Write the page, and print its path."""
    from keifu.training.run.compared import MOST_RUNS, write_compared
    from keifu.training.run.report import REPORT, write_report

    if not 1 <= len(options.runs) <= MOST_RUNS:
        raise UserError(f"Name 1 to {MOST_RUNS} folders of runs, not {len(options.runs)}.")
    if len(options.runs) == 1:
        write_report(options.runs[0])
        print(f"Wrote {options.runs[0] / REPORT}.")
        return
    page = options.output or Path("runs/compared.html")
    write_compared(page, options.runs)
    print(f"Wrote {page}: open it in a browser.")
