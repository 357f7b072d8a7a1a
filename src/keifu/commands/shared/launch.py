"""Starting several processes on one machine, as torchrun does, and running a command in each.

torchrun sets the environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. If they are set, this process is
one of several.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from keifu.distributed.mesh import Mesh
from keifu.errors import UserError

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
ENDING = 120  # seconds for processes to save their state after Ctrl-C
VOLUME = ("-q", "--quiet", "-v", "--verbose")


def is_started() -> bool:
    """Return whether torchrun, or `start`, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_restart() -> bool:
    """Return whether this process replaces one that died."""
    return int(os.environ.get(RESTARTS, 0)) > 0


def silence() -> None:
    """Discard the further output of this process, unless its rank is 0 or KEIFU_DEBUG=1."""
    if os.environ.get("RANK", "0") != "0" and os.environ.get("KEIFU_DEBUG") != "1":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


def together(mesh: Mesh, work: Callable[[], None], explain: Callable[[Exception], str | None]) -> None:
    """Run `work` as one of the processes that torchrun has started."""
    from keifu.distributed.failures import explained
    from keifu.distributed.group import join

    with join(mesh, is_restart()) as group, explained(group, group.store, explain):
        work()


def start(processes: int, restarts: int, words: Sequence[str]) -> None:
    """Run `keifu` with these words in `processes` processes. Restart them at most `restarts` times if one dies. Exit
    with their status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    threads = os.environ["OMP_NUM_THREADS"]
    described = f"{threads} thread{'s' * (threads != '1')} each"
    print(f"Starting {processes} process{'es' * (processes != 1)} of {described}.", file=sys.stderr, flush=True)
    volume = [word for word in sys.argv[1:] if word in VOLUME]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"keifu-{os.getpid()}", max_restarts=restarts, shutdown_timeout=ENDING,
    )  # fmt: skip
    logging.disable(logging.ERROR)  # the processes print their errors themselves
    try:
        # -P: do not import modules of the current folder
        elastic_launch(config, sys.executable)("-P", "-m", "keifu", *words, *volume)
    except SignalException as stop:
        raise SystemExit(128 + int(stop.sigval)) from stop
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise UserError(f"Process {number} of {processes} was ended by {name}; go on with --resume.") from None
        raise SystemExit(failure.exitcode) from None
