"""Tokens per second of training GPT-2 124M (batch 4, length 256), compared with transformers and nanoGPT.

python benchmarks/train.py [--dtype float32|bfloat16] [--nanogpt FOLDER] [--compile [--alone]] [--rounds 5]

One contender on each line: each makes the same AdamW steps (clipping at 1.0) on the same tokens from the same weights,
and the losses of all are printed. `--nanogpt` names a clone of nanoGPT; it is run unchanged, and with fused AdamW. Each
has a separate process, which waits while the others compute. Only keifu's loop tells the C library to keep freed
memory. `--alone` times keifu and nanoGPT compiled, and also nanoGPT compiled that keeps freed memory.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection

import torch
import transformers
from _rounds import interleaved, machine, table
from _training import CPU, ours, peer

from keifu import checkpoints
from keifu.memory import keep_freed
from keifu.models import gpt2
from keifu.training.hardware.flops import count_flops, matmul_peak
from keifu.training.objectives.language_modeling import causal_language_modeling

BATCH, LENGTH = 4, 256


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


def nanogpt(folder: str, dtype: torch.dtype, compile: bool, fused: bool, losses: list[float]) -> Callable[[], None]:
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

    return peer(run, loss, tokens, dtype, fused, losses)


def work(connection: Connection, keep: bool, make: Callable[..., Callable[[], None]], arguments: tuple) -> None:
    """Run a contender's process: train a step at each request, and send its loss."""
    losses: list[float] = []
    with suppress(EOFError), keep_freed(CPU) if keep else nullcontext():
        step = make(*arguments, losses)
        while True:
            connection.recv()
            step()
            connection.send(losses[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--nanogpt")
    parser.add_argument("--compile", action="store_true", help="compiled contenders too: minutes to start")
    parser.add_argument("--alone", action="store_true", help="the compiled ones alone")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtype, folder = getattr(torch, options.dtype), options.nanogpt
    losses: dict[str, list[float]] = {}
    contenders: dict[str, Callable[[], None]] = {}

    def contender(name: str, make: Callable[..., Callable[[], None]], *arguments: object, keep: bool = False) -> None:
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        spawn.Process(target=work, args=(there, keep or make is keifu, make, arguments), daemon=True).start()
        losses[name] = []

        def step() -> None:
            here.send(None)
            losses[name].append(here.recv())

        step()  # finishes setup and compilation before the next contender begins
        contenders[name] = step

    if not options.alone:
        contender("transformers", theirs, dtype)
        contender("keifu", keifu, dtype, False)
    if folder and not options.alone:
        contender("nanoGPT, float32 as shipped", nanogpt, folder, torch.float32, False, False)
        contender(f"nanoGPT, {options.dtype}", nanogpt, folder, dtype, False, True)
    if options.compile:
        contender("keifu compiled", keifu, dtype, True)
    if folder and options.compile:
        contender(f"nanoGPT compiled, {options.dtype}", nanogpt, folder, dtype, True, True)
    if folder and options.compile and options.alone:
        contender("nanoGPT compiled, keeping freed memory", nanogpt, folder, dtype, True, True, keep=True)
    seconds = interleaved(contenders, options.rounds, warm=True)
    model = gpt2.build(gpt2.Config(dropout=0.0))
    flops = count_flops(lambda: causal_language_modeling(model, {"tokens": tokens(0)}).total.backward())
    peak = matmul_peak(CPU, dtype)
    notes = {
        name: f"{flops / statistics.median(own) / peak:.0%} of the peak, loss of step 5 {losses[name][4]:.3f}"
        for name, own in seconds.items()
    }
    print(f"{machine()}; GPT-2 124M, batch {BATCH}, length {LENGTH}, {options.dtype}, {options.rounds} rounds")
    print(f"A step needs {flops / 1e12:.2f} TFLOP; the matmul peak measured here is {peak / 1e9:.0f} GFLOP/s.\n")
    print(table(seconds, BATCH * LENGTH, "tokens", [*contenders][0], notes))


if __name__ == "__main__":
    main()
