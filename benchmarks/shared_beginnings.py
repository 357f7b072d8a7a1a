"""Time of the second question about a document, for models with recurrent layers or windows.

python benchmarks/shared_beginnings.py [--tokens 3500] [--rounds 3] [--write JSON]

Models of random weights answer two questions about the same document of random tokens, one after the other, with one
engine. The times are those to the first token. A third engine that has not seen the document answers the second
question, and must name the same token.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from _results import print_rows, spanned, typed, usual, write_table
from _rounds import machine
from torch import nn

from keifu.inference.text.engine import Engine
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.models.hybrid import lfm2, qwen3_5

SECTION = "Beginnings of recurrent models and windows"
SIZE: dict[str, Any] = {
    "vocab_size": 8000, "context_length": 4096, "hidden_dim": 768, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "rope_dim": 16, "n_linear_key_heads": 4, "n_linear_value_heads": 4, "linear_key_dim": 32, "linear_value_dim": 32,
    "head_dim": 64, "global_layers": (3,),
}  # fmt: skip
MODELS = {
    "Gated DeltaNet in 3 of 4 layers (Qwen3.5)": lambda: qwen3_5.build(qwen3_5.Config(dim=256, **SIZE, **LINEAR)),
    "convolutions in 3 of 4 layers (LFM2)": lambda: lfm2.build(lfm2.Config(dim=256, **SIZE, global_layers=(3,))),
    "a window of 512 in all layers (LLaMA's block)": lambda: llama.build(
        llama.Config(dim=256, **SIZE, sliding_window=512)
    ),
}


def first_token(engine: Engine, prompt: list[int]) -> tuple[int, float]:
    """Return the likeliest next token of a prompt, and the seconds."""
    start = time.perf_counter()
    engine.add(engine.request(prompt, SamplingParams(temperature=0, max_tokens=1)))
    [piece] = engine.pieces()
    return piece.token, time.perf_counter() - start


def two_questions(model: nn.Module, tokens: int, seed: int) -> tuple[float, float]:
    """Return the seconds of the first and of the second question about a document."""
    chance = random.Random(seed)
    document = [chance.randrange(SIZE["vocab_size"]) for _ in range(tokens)]
    first, second = (document + [chance.randrange(SIZE["vocab_size"]) for _ in range(20)] for _ in range(2))
    engine = Engine(model, None)
    _, before = first_token(engine, first)
    token, after = first_token(engine, second)
    if first_token(Engine(model, None), second)[0] != token:
        raise SystemExit("The shared beginning changes the token.")
    return before, after


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3500, help="of the document")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n", flush=True)
    rows, values = [], {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        two_questions(model, 100, -1)  # compiles and warms up
        rounds = [two_questions(model, options.tokens, seed) for seed in range(options.rounds)]
        values[name] = [[round(seconds, 4) for seconds in each] for each in rounds]
        firsts, seconds = zip(*rounds, strict=True)
        rows.append([name, spanned(firsts), spanned(seconds), spanned([b / a for a, b in rounds], ".3f")])
    columns = ["model", "first question, s", "second question, s", "second by first"]
    print_rows([columns, ["---", *["---:"] * 3], *rows])
    if options.write:
        command = typed("shared_beginnings.py", vars(options), usual(parser))
        write_table(options.write, SECTION, command, columns, rows, {"seconds of both questions": values})


if __name__ == "__main__":
    main()
