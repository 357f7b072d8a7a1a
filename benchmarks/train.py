"""Tokens per second of training GPT-2 124M (batch 4, length 256), compared with transformers and nanoGPT.

python benchmarks/train.py [--dtype float32|bfloat16] [--nanogpt FOLDER] [--compile] [--rounds 5] [--json FILE]

One contender on each line: each makes the same AdamW steps (clipping at 1.0) on the same tokens from the same weights,
and the losses of all are printed. `--nanogpt` names a clone of nanoGPT; its model is run unchanged, with fused AdamW.
Each has a separate process, which waits while the others compute. keifu's loop tells the C library to keep freed
memory; the others run both with and without that.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from _results import typed, write_timing
from _rounds import interleaved, machine
from _training import CPU, ours, peer

from keifu import checkpoints
from keifu.memory import keep_freed
from keifu.models import gpt2
from keifu.training.hardware.flops import count_flops, matmul_peak
from keifu.training.objectives.language_modeling import causal_language_modeling

SECTION, BATCH, LENGTH = "Training speed", 4, 256
KEPT = ", freed memory kept"


def tokens(step: int) -> torch.Tensor:
    """Return the token rows of a step, the same for every contender."""
    return torch.randint(0, 50_257, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def theirs_model() -> transformers.GPT2LMHeadModel:
    """Return transformers' GPT-2, with the initial weights of all contenders."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config).train()


def batch(step: int) -> dict[str, torch.Tensor]:
    return {"tokens": tokens(step)}


def keifu(dtype: torch.dtype, compile: bool, losses: list[float]) -> Callable[[], None]:
    with tempfile.TemporaryDirectory() as directory:
        theirs_model().save_pretrained(directory)
        model = checkpoints.load_model(directory).train()
    return ours(model, causal_language_modeling, batch, dtype, compile, losses)


def theirs(dtype: torch.dtype, losses: list[float]) -> Callable[[], None]:
    return peer(theirs_model(), lambda m, rows: m(rows, labels=rows).loss, tokens, dtype, True, losses)


def nanogpt(folder: str, dtype: torch.dtype, compile: bool, losses: list[float]) -> Callable[[], None]:
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig  # nanoGPT's model.py

    model = GPT(GPTConfig(block_size=1024, vocab_size=50_257, dropout=0.0, bias=True)).train()
    given = theirs_model().state_dict()
    for name, own in model.state_dict().items():  # equal names; Hugging Face's matrices are transposed
        own.copy_(
            given[name] if own.shape == given[name].shape and "h." not in name or own.dim() == 1 else given[name].T
        )
    run = torch.compile(model) if compile else model

    def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1]

    return peer(run, loss, tokens, dtype, True, losses)


def work(connection: Connection, keep: bool, make: Callable[..., Callable[[], None]], arguments: tuple) -> None:
    """Run a contender's process: train a step at each request, and send its loss."""
    losses: list[float] = []
    with suppress(EOFError), keep_freed(CPU) if keep else nullcontext():
        step = make(*arguments, losses)
        while True:
            connection.recv()
            step()
            connection.send(losses[-1])


def timed(makers: dict[str, tuple], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run each maker in a process, in turn. Return the seconds by round, and the loss of the fifth step."""
    spawn = multiprocessing.get_context("spawn")
    losses: dict[str, list[float]] = {name: [] for name in makers}
    contenders: dict[str, Callable[[], None]] = {}
    processes = []
    for name, (make, *arguments) in makers.items():
        here, there = spawn.Pipe()
        keep = make is keifu or name.endswith(KEPT)
        processes.append(spawn.Process(target=work, args=(there, keep, make, tuple(arguments)), daemon=True))
        processes[-1].start()

        def step(here: Connection = here, own: list[float] = losses[name]) -> None:
            here.send(None)
            own.append(here.recv())

        step()  # finishes setup and compilation before the next contender begins
        contenders[name] = step
    seconds = interleaved(contenders, rounds, warm=True)
    for process in processes:
        process.kill()
        process.join()
    return seconds, {name: round(each[4], 4) for name, each in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--nanogpt")
    parser.add_argument("--compile", action="store_true", help="compiled contenders too: minutes to start")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    dtype, folder = getattr(torch, options.dtype), options.nanogpt
    print(f"{machine()}; GPT-2 124M, batch {BATCH}, length {LENGTH}, {options.dtype}, {options.rounds} rounds")
    model = gpt2.build(gpt2.Config(dropout=0.0))
    flops = count_flops(lambda: causal_language_modeling(model, {"tokens": tokens(0)}).total.backward())
    values: dict[str, Any] = {"tasks": {}, "loss of step 5": {}}
    for compile in (False, True) if options.compile else (False,):
        makers: dict[str, tuple] = {"keifu": (keifu, dtype, compile)}
        for kept in ("", KEPT):
            if not compile:
                makers[f"transformers{kept}"] = (theirs, dtype)
            if folder:
                makers[f"nanoGPT{kept}"] = (nanogpt, folder, dtype, compile)
        seconds, losses = timed(makers, options.rounds)
        name, peak = "compiled" if compile else "not compiled", round(matmul_peak(CPU, dtype))
        values["tasks"][name] = {"amount": BATCH * LENGTH, "seconds": seconds, "work": flops, "peak": peak}
        values["loss of step 5"][name] = losses
        print(f"{name}: a step needs {flops / 1e12:.2f} TFLOP, the peak is {peak / 1e9:.0f} GFLOP/s; losses {losses}")
    values["against"] = {"keifu": [name for name in values["tasks"]["not compiled"]["seconds"] if name != "keifu"]}
    columns = ["tokens/s; keifu: ratios to the rows below; share of the matmul peak", *values["tasks"]]
    defaults = {"dtype": "bfloat16", "nanogpt": None, "compile": False, "rounds": 0}
    command = typed("train.py", vars(options) | {"nanogpt": folder and "FOLDER"}, defaults)
    write_timing(options.json, SECTION, command, columns, values)


if __name__ == "__main__":
    main()
