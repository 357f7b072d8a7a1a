"""Tokens per second of greedy decoding at batch 1, compared with transformers on the same weights.

python benchmarks/decode.py [--shape llama|gpt2] [--dtype float32 bfloat16] [--rounds 5] [--tokens 64] [--json FILE]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from _results import typed, write_timing
from _rounds import interleaved, machine

from keifu import checkpoints
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.memory import read_bandwidth

SECTION, THEIRS = "Decoding speed", "transformers"
SHAPES = {
    "llama": transformers.LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32_000
    ),
    "gpt2": transformers.GPT2Config(),
}


def timed(shape: str, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the task of a format: its seconds, and its number of tokens."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(SHAPES[shape]).eval().to(dtype)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        plain, ours = (checkpoints.load_model(Path(directory), weights=weights) for weights in (None, "own"))
    prompt = torch.randint(0, theirs.config.vocab_size, (1, 16))
    wanted = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    greedy = SamplingParams(max_tokens=tokens, temperature=0)
    contenders = {THEIRS: lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)}
    if dtype == torch.float32:
        contenders["keifu, by PyTorch"] = lambda: generate_batch(plain, None, prompt.tolist(), greedy)
    contenders["keifu, natively"] = lambda: generate_batch(ours, None, prompt.tolist(), greedy)
    same = contenders[THEIRS]()[0, 16:].tolist() == contenders["keifu, natively"]()[0].tokens
    seconds = interleaved(contenders, rounds)
    bandwidth, weights = read_bandwidth(prompt.device), sum(p.nbytes for p in plain.parameters())
    if plain.head is not None:  # then a token only reads one row of the embedding
        weights -= plain.embedding.weight.nbytes
    print(f"Memory is read at {bandwidth / 1e9:.1f} GB/s; a token reads {weights / 1e6:.0f} MB. Same tokens: {same}.")
    return {"amount": tokens, "seconds": seconds}


def main() -> None:
    defaults = {"shape": "llama", "dtype": ["float32", "bfloat16"], "rounds": 5, "tokens": 64}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default=defaults["shape"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=defaults["dtype"])
    parser.add_argument("--rounds", type=int, default=defaults["rounds"])
    parser.add_argument("--tokens", type=int, default=defaults["tokens"])
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    print(f"{machine()}; {options.shape} shape, {options.tokens} tokens, {options.rounds} rounds")
    tasks = {
        dtype: timed(options.shape, getattr(torch, dtype), options.tokens, options.rounds) for dtype in options.dtype
    }
    values = {"tasks": tasks, "against": dict.fromkeys(["keifu, by PyTorch", "keifu, natively"], [THEIRS])}
    columns = ["tokens/s; ratio to transformers", *tasks]
    write_timing(options.json, SECTION, typed("decode.py", vars(options), defaults), columns, values)


if __name__ == "__main__":
    main()
