"""Load report: what loading a model does, tensor by tensor, and the settings in use. No weight is read for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from keifu.checkpoints.hf.weight_names import Link
from keifu.checkpoints.plan import Plan, name_of, settings

PLAIN = ("F64", "F32", "F16", "BF16", "I64")  # types whose numbers stand in the file as they are
FIRST = ("activation", "norm_eps", "rope_theta", "rope_scaling", "context_length", "sliding_window", "tied")


@dataclass(frozen=True)
class Row:
    """One tensor of the model: its name, shape and type here, those of the file that make it, and what is done."""

    ours: str
    shape: tuple[int, ...]
    dtype: str
    theirs: tuple[str, ...]
    stored: str
    done: str


@dataclass(frozen=True)
class Report:
    """All that loading would do. `str()` is a table for people, `as_dict()` plain values for programs."""

    path: str
    format: str
    family: str
    parameters: int
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    skipped: Sequence[str]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        head = [f"{self.path}: {self.format}, family {self.family}, {self.parameters:,} parameters"]
        settings = [f"  {key:16} {'none' if value is None else value}" for key, value in self.settings.items()]
        skipped = [f"Not weights, or there twice, and left out: {', '.join(self.skipped)}."] if self.skipped else []
        return "\n".join([*head, *settings, "", *_aligned(self.rows), "", *self.notes, *skipped])


def report(plan: Plan) -> Report:
    """The report of a plan."""
    source, config = plan.source, settings(plan.source.config)
    ordered = {key: config[key] for key in sorted(config, key=lambda key: key not in FIRST)}
    rows = [_row(link, plan) for link in plan.links]
    family, path = source.family.model_type, str(source.path)
    return Report(path, source.format, family, plan.parameters, ordered, rows, plan.skipped, plan.notes)


def _row(link: Link, plan: Plan) -> Row:
    stored = plan.source.stored
    kinds = ", ".join(dict.fromkeys(stored[one].kind for one in link.theirs))
    dtype = torch.int64 if kinds == "I64" else plan.dtype
    steps = {
        "dequantised": any(stored[one].kind not in PLAIN for one in link.theirs),
        "joined": len(link.theirs) > 1,
        "transposed": link.transposed,
        f"{link.offset:g} subtracted": bool(link.offset),
        "rotary pairs moved to halves": any(link.turned),
        f"cast to {name_of(dtype)}": any(stored[one].dtype != dtype for one in link.theirs),
    }
    done = ", ".join(step for step, yes in steps.items() if yes)
    return Row(link.ours, link.shape, name_of(dtype), link.theirs, kinds, done)


def _aligned(rows: Sequence[Row]) -> list[str]:
    lines = [("ours", "shape", "theirs", "stored", "done")]
    lines += [(r.ours, " x ".join(map(str, r.shape)), " + ".join(r.theirs), r.stored, r.done) for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
