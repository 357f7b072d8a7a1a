"""Cost of packed weights: perplexity of a model on held-out text in each format, compared with llama.cpp at the same
bits.

python benchmarks/quantisation.py [--model smollm2] [--on sotu] [--windows 16] [--length 512] [--json FILE]
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from _llama_cpp import LlamaCpp, quantised
from _results import write_table
from _rounds import machine

from keifu import checkpoints
from keifu.data.text.token_shards import prepare
from keifu.native.model import pack

SECTION, COLUMNS = "The native step and llama.cpp", ("", "bits per weight", "perplexity")
PEERS = {"bf16": ("bf16",), "int8": ("q8_0",), "int4": ("q4_0", "q4_k"), "int4_pure": ("q4_0_pure",)}


def windows(name: str, tokenizer, count: int, length: int) -> torch.Tensor:
    """Return windows of the held-out part of a text, each after the token that begins texts."""
    held_out = np.asarray(prepare(name, tokenizer).validation, dtype=np.int64)
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    rows = held_out[: count * (length - 1)].reshape(-1, length - 1)
    return torch.from_numpy(np.concatenate([np.full((len(rows), 1), begin), rows], 1))


def losses(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Return the summed nats of the window's tokens after its first."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:], reduction="sum"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--on", default="sotu")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    model, tokenizer = checkpoints.load(options.model)
    texts = windows(options.on, tokenizer, options.windows, options.length)
    count, parameters = texts[:, 1:].numel(), sum(each.numel() for each in model.parameters())
    print(f"{machine()}; {options.model} on {options.on}, {count} tokens in windows of {options.length}\n")
    print("| | bits per weight | perplexity |\n|---|---:|---:|")
    rows, values = list[list[str]](), {"parameters": parameters, "tokens": count, "bytes": {}, "nats": {}}

    def report(name: str, nbytes: int, nats: list[float]) -> None:
        values["bytes"][name], values["nats"][name] = nbytes, [round(each, 4) for each in nats]
        rows.append([name, f"{8 * nbytes / parameters:.2f}", f"{math.exp(sum(nats) / count):.3f}"])
        print(f"| {' | '.join(rows[-1])} |", flush=True)

    with torch.no_grad():
        report("PyTorch, float32", 4 * parameters, [losses(model(each[None])[0], each) for each in texts])
    with tempfile.TemporaryDirectory() as folder:
        for weights in PEERS:
            packed = pack(model, weights)
            report(f"keifu, {weights}", packed.nbytes, [losses(packed(each[None])[0], each) for each in texts])
            for kind in PEERS[weights]:
                path = quantised(model, kind, Path(folder))
                peer = LlamaCpp(path, 1, options.length, torch.get_num_threads())
                nats = []
                for each in texts:
                    peer.rollback(0)
                    nats.append(losses(torch.from_numpy(peer.run([each.tolist()], 0, len(each))), each))
                peer.close()
                report(f"llama.cpp, {kind}", path.stat().st_size, nats)
    if options.json:
        given = f"--windows {options.windows}"
        write_table(options.json, SECTION, f"python benchmarks/quantisation.py {given}", COLUMNS, rows, values)


if __name__ == "__main__":
    main()
