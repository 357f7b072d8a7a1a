"""The plan of a run that may be too large for the machine: its time and memory, before anything is read or built."""

from keifu.devices import choose
from keifu.errors import UserError
from keifu.memory import available_memory
from keifu.processes import current
from keifu.training.hardware.flops import peak
from keifu.training.hardware.precision import resolve_dtype
from keifu.training.run.progress import format_bytes, format_count
from keifu.training.settings import Settings

DAY = 86_400
SLOWEST = 1e9  # FLOP/s that every machine reaches
SHARE_OF_PEAK = 0.4  # of the FLOP/s of large matrix products, which a run reaches roughly


def check_plan(size: int, operations: int | float, settings: Settings, yes: bool, detail: str = "") -> None:
    """Raise UserError with the plan of a run if its memory is not there, or if it would take longer than a day and
    `yes` is False.

    size: number of parameters. operations: FLOPs of the whole run. detail: further words of the plan.
    """
    device, processes = choose(), current()
    # float32: weights, gradients, and the optimizer's states: two of each weight, or Muon's one
    needed_bytes = 4 * size * (3 if settings.optimizer == "muon" else 4)
    free = available_memory(device)
    if needed_bytes < free and operations < DAY * SLOWEST:
        return
    speed = SHARE_OF_PEAK * peak(device, resolve_dtype(settings.precision, device)) * processes.world_size
    days = operations / speed / DAY
    plan = (
        f"The plan: {format_count(size)} parameters, {settings.steps:,} steps{detail}; about {days:,.0f} days here, "
        f"and {format_bytes(needed_bytes)} for weights, gradients and optimizer"
    )
    if needed_bytes > free and processes.is_replicated:
        raise UserError(
            f"{plan}, of which {format_bytes(free)} are free. Give smaller sizes, or split the model over several "
            "processes (docs/cluster.md)."
        )
    if days > 1 and not yes and not settings.minutes:
        raise UserError(f"{plan}. Add --yes to start it, or give --minutes, fewer --steps or smaller sizes.")
