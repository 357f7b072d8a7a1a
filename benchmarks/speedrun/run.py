"""One race of the CPU speedrun: train until the target of a track is reached on held-out data, and write the result.

python benchmarks/speedrun/run.py characters [--entry keifu_entry.py] [--seed 0] [--results FOLDER] [--stop-after STEPS]

Tracks: characters, english, digits. The clock runs while the entry builds its model and trains; it stops while
the held-out data are looked at, and while data are fetched and tokenized. The process is kept on two cores.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tracks import TRACKS, Track

import keifu
from keifu.devices import processor_name

HERE = Path(__file__).parent
CORES = 2


def race(track: Track, steps: Iterator[tuple[int, Any]], task: Any, stop_after: int | None) -> dict[str, Any]:
    """Return the seconds until the target, and the curve of all measurements: step, seconds, value."""
    seconds, curve = 0.0, list[tuple[int, float, float]]()
    while True:
        start = time.perf_counter()
        step, learned = next(steps, (None, None))
        seconds += time.perf_counter() - start
        if step is None:
            break
        curve.append((step, round(seconds, 3), round(track.measure(task, learned), 4)))
        print(f"step {step}  {seconds:.1f} s  {curve[-1][2]:.4f} {track.quantity}", flush=True)
        if curve[-1][2] <= track.target or (stop_after and step >= stop_after):
            break
    if not curve:
        raise SystemExit("The entry ended before anything was measured.")
    last = dict(zip(("steps", "seconds", "value"), curve[-1], strict=True))
    return {"reached": last["value"] <= track.target, **last, "curve": curve}


def on_two_cores() -> None:
    """Keep the process on two cores, with a thread for each."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(CORES)


def machine() -> dict[str, Any]:
    """Return the hardware and versions, and how busy the machine was in the last minute."""
    hardware = {"processor": processor_name(), "cores": CORES, "system": f"{platform.system()} {platform.machine()}"}
    versions = {"keifu": keifu.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"hardware": hardware, "versions": versions, "load": round(os.getloadavg()[0], 2)}


def commit() -> str:
    """Return the checkout's commit, with a + if files differ from it; empty outside of a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=9", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def entry(file: Path) -> Any:
    """Load the module of an entry, which has a function for each track that it enters."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write a result under a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    moment = result["date"].translate(str.maketrans("", "", "-:"))
    path = folder / f"{result['track']}-{result['entry']}-{moment}.json".replace(" ", "-")
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def finish(track: Track, name: str, command: str, seed: int, found: dict[str, Any], folder: Path) -> None:
    """Write the result and say how the race ended."""
    about = {"track": track.name, "entry": name, "target": track.target, "quantity": track.quantity}
    date = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"
    more = {"seed": seed, "command": command, "commit": commit(), "date": date}
    path = write(about | found | more | machine(), folder)
    ended = "reached" if found["reached"] else "not reached"
    print(f"Target {track.target} {ended}: {found['seconds']:.1f} s, {found['steps']} steps. Written: {path}")


def main() -> None:
    """Run one race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=("characters", "english", "digits"))
    parser.add_argument("--entry", type=Path, default=HERE / "keifu_entry.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--stop-after", type=int, help="end at the first measurement after so many steps")
    options = parser.parse_args()
    on_two_cores()
    module, track = entry(options.entry), TRACKS[options.track]
    if not hasattr(module, track.name):
        raise SystemExit(f"{options.entry} has no function {track.name}: it does not enter this track.")
    task = track.prepare()
    found = race(track, getattr(module, track.name)(task, options.seed), task, options.stop_after)
    command = " ".join(["python benchmarks/speedrun/run.py", *sys.argv[1:]])
    finish(track, module.NAME, command, options.seed, found, options.results)


if __name__ == "__main__":
    main()
