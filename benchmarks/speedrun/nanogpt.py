"""nanoGPT on the track characters: its own train.py, with the command of its README for a CPU.

python benchmarks/speedrun/nanogpt.py FOLDER [--results FOLDER] [--stop-after STEPS]

FOLDER is a clone of https://github.com/karpathy/nanoGPT, which is copied and not changed. Its data are those of the
track. Seconds are its 2,000 steps at the mean of the times that it prints, without the steps in which it evaluates.
Its loss is that of its last checkpoint on the whole held-out text.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from run import HERE, finish, on_two_cores
from tracks import CONTEXT, TRACKS, Predictor, Texts

STEPS, EVALUATED, SEED = 2000, 250, 1337
COMMAND = (
    "python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters={0} --lr_decay_iters={0} "
    "--dropout=0.0"
)
TIME = re.compile(r"iter (\d+): loss [\d.]+, time ([\d.]+)ms")


def train(folder: Path, task: Texts, steps: int) -> float:
    """Run nanoGPT in a folder, and return the mean seconds of a step."""
    data = folder / "data/shakespeare_char"
    (data / "input.txt").write_text(task.training[0] + task.held_out[0], encoding="utf-8")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    command = [sys.executable, *COMMAND.format(steps).split()[1:]]
    printed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return mean(float(time) / 1000 for step, time in TIME.findall(printed) if int(step) % EVALUATED)


def predictor(folder: Path) -> Predictor:
    """Return the model of nanoGPT's last checkpoint, built by its own model.py."""
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks for it there
    spec.loader.exec_module(module)
    saved = torch.load(folder / "out-shakespeare-char/ckpt.pt", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    return Predictor(lambda tokens: model(tokens, tokens)[0], lambda text: [], CONTEXT)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--stop-after", type=int, default=STEPS, help="steps of a shorter trial")
    options = parser.parse_args()
    on_two_cores()
    track = TRACKS["characters"]
    task = track.prepare()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(options.folder, f"{temporary}/nanoGPT", ignore=shutil.ignore_patterns(".git")))
        seconds = options.stop_after * train(folder, task, options.stop_after)
        value = track.measure(task, predictor(folder))
    found = {"reached": value <= track.target, "steps": options.stop_after, "seconds": round(seconds, 3)}
    found |= {"value": round(value, 4), "curve": [(options.stop_after, round(seconds, 3), round(value, 4))]}
    finish(track, "nanoGPT", COMMAND.format(options.stop_after), SEED, found, options.results)


if __name__ == "__main__":
    main()
