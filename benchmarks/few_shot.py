"""Requests per second of few-shot scoring, compared with lm-evaluation-harness with transformers on the same model.

python benchmarks/few_shot.py [--model smollm2] [--on topics] [--shots 0 4] [--items 4] [--rounds 3] [--batch-size 8]
    [--json FILE]

A request is a prompt with one of its choices. Both sides get the same requests as texts, through the harness's
interface. Its backend has default settings with batches of `--batch-size` sorted by length, and scores one-token
answers to the same prompt with one row. keifu computes common beginnings of prompts once, so its advantage grows with
the examples, the choices and the items that share them: without examples only the choices of an item share its
prompt.
"""

import argparse
import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _results import typed, usual, write_timing
from _rounds import interleaved, machine
from lm_eval.models.huggingface import HFLM

from keifu import checkpoints
from keifu.evaluation.text.tasks import TASKS
from keifu.lm_eval import KeifuLM

SECTION, BASE = "Few-shot scoring", "lm-evaluation-harness, transformers"


def requests(name: str, shots: int, items: int) -> list[Any]:
    """Return the harness's requests to a model: pairs of context and continuation."""
    drawn = TASKS[name]().sample(shots, limit=items)
    pairs = [(p, f" {c}") for p, i in zip(drawn.prompts(shots), drawn.items, strict=True) for c in i.choices]
    return [SimpleNamespace(args=pair, task_name=name) for pair in pairs]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--on", choices=[name for name in TASKS if name in ("topics", "titles")], default="topics")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4])
    for name, value in {"items": 4, "rounds": 3, "batch-size": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    dtype = getattr(torch, options.dtype)
    model, tokenizer = checkpoints.load(options.model, dtype)
    with tempfile.TemporaryDirectory() as directory:
        checkpoints.save(model, tokenizer, Path(directory))
        theirs = HFLM(pretrained=directory, batch_size=options.batch_size, device="cpu", dtype=options.dtype)
    ours = KeifuLM(model, tokenizer)
    print(f"{machine()}; {options.model}, {options.on}, {options.dtype}, batches of {options.batch_size}")
    tasks = dict[str, dict[str, Any]]()
    for shots in options.shots:
        asked = requests(options.on, shots, options.items)
        contenders = {
            BASE: partial(theirs.loglikelihood, asked, disable_tqdm=True),
            "keifu": partial(ours.loglikelihood, asked),
        }
        found = {name: work() for name, work in contenders.items()}
        pairs = list(zip(*found.values(), strict=True))
        apart = max(abs(a[0] - b[0]) / max(1.0, abs(a[0])) for a, b in pairs)
        greedy = sum(a[1] == b[1] for a, b in pairs)
        print(f"{shots} shots, {options.items} items, {len(asked)} requests, {options.rounds} rounds; largest relative")
        print(f"difference of ln P {apart:.1e}, the same greedy choice in {greedy} of {len(asked)}.", flush=True)
        tasks[f"{shots} examples"] = {"amount": len(asked), "seconds": interleaved(contenders, options.rounds)}
    values = {"tasks": tasks, "a row": "task", "against": {"keifu": [BASE]}}
    columns = [f"requests/s; keifu: ratio to {BASE}", BASE, "keifu"]
    write_timing(options.json, SECTION, typed("few_shot.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
