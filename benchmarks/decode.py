"""Tokens per second of greedy decoding at batch 1, compared with transformers on the same weights.

python benchmarks/decode.py [--shape llama|gpt2] [--dtype float32|bfloat16] [--rounds 5] [--tokens 64] [--llama-cpp]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from _rounds import interleaved, machine, table

from keifu import checkpoints
from keifu.generation.text.generate import generate_batch
from keifu.generation.text.sampling_params import SamplingParams
from keifu.memory import read_bandwidth

SHAPES = {
    "llama": transformers.LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32_000
    ),
    "gpt2": transformers.GPT2Config(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(SHAPES[options.shape]).eval().to(dtype)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        plain, ours = (checkpoints.load_model(Path(directory), weights=weights) for weights in (None, "own"))
    prompt = torch.randint(0, theirs.config.vocab_size, (1, 16))
    wanted = {"do_sample": False, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "pad_token_id": 0}
    greedy = SamplingParams(max_tokens=options.tokens, temperature=0)
    contenders = {
        "transformers": lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted),
        "keifu": lambda: generate_batch(ours, None, prompt.tolist(), greedy),
    }
    if dtype == torch.float32:
        contenders["keifu, by PyTorch"] = lambda: generate_batch(plain, None, prompt.tolist(), greedy)
    same = contenders["transformers"]()[0, 16:].tolist() == contenders["keifu"]()[0].tokens
    seconds = interleaved(contenders, options.rounds)
    bandwidth, weights = read_bandwidth(prompt.device), sum(p.nbytes for p in plain.parameters())
    if plain.head is not None:  # then a token only reads one row of the embedding
        weights -= plain.embedding.weight.nbytes
    shares = {n: f"{weights * options.tokens / statistics.median(s) / bandwidth:.0%} of it" for n, s in seconds.items()}
    print(f"{machine()}; {options.shape} shape, {options.dtype}, {options.tokens} tokens, {options.rounds} rounds")
    print(f"Memory is read at {bandwidth / 1e9:.1f} GB/s; a token reads {weights / 1e6:.0f} MB. Same tokens: {same}.\n")
    print(table(seconds, options.tokens, "tokens", "transformers", shares))


if __name__ == "__main__":
    main()
