"""`keifu inspect`: the load report of a model."""

import json
from dataclasses import dataclass

from keifu.commands.shared import flags
from keifu.errors import printable


@dataclass(frozen=True)
class Options:
    """Print the steps of loading a model: every tensor, its source, and the settings. No weight is read."""

    model: flags.Model
    json: bool = False
    """Print it as JSON."""


def run(options: Options) -> None:
    """Print the report."""
    from keifu.checkpoints import inspect

    report = inspect(options.model)
    print(json.dumps(report.as_dict(), indent=2, default=str) if options.json else printable(str(report)))
