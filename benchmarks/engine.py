"""Tokens per second of decoding and of reading a prompt, compared with llama.cpp and transformers on the same weights.

python benchmarks/engine.py [--shape 110m|1.1b|smollm2] [--weights bf16 int8 int4] [--streams 1 8 32] [--rounds 3]
    [--section TEXT] [--json FILE]

The contenders alternate in one process. llama.cpp's bf16 is compared with bf16, q8_0 with int8, q4_0 and q4_k with
int4, and q4_0 with a head of 4 bits also with int4_pure.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _llama_cpp import LlamaCpp, quantised
from _results import typed, write_timing
from _rounds import interleaved, machine

from keifu import checkpoints
from keifu.inference.text.runner import Span
from keifu.models import llama
from keifu.native.model import BLOCK_SIZE, NativeLM, pack

SHAPES = {
    "110m": llama.Config(dim=768, n_layers=12, n_heads=12, hidden_dim=2048, tied=True),
    "1.1b": llama.SIZES["tinyllama-1.1b"],
    "smollm2": llama.SIZES["smollm2-135m"],
}
PEERS = {"bf16": ["bf16"], "int8": ["q8_0"], "int4": ["q4_0", "q4_k"], "int4_pure": ["q4_0_pure"]}
SECTION = "The native step and llama.cpp"
PROMPT = 32  # tokens before the timed ones


class Native:
    """Texts of `length` tokens in parallel, decoded greedily by the native step."""

    def __init__(self, model: NativeLM, streams: int, length: int):
        each = -(-length // BLOCK_SIZE)
        self.runner = model.runner(streams * each)
        self.tables = [list(range(each * n, each * (n + 1))) for n in range(streams)]

    def run(self, texts: list[list[int]], start: int) -> list[int]:
        """Return the likeliest next token of each sequence, after it has read these tokens."""
        pairs = enumerate(zip(texts, self.tables, strict=True))
        logits = self.runner.run([Span(n, text, start, blocks) for n, (text, blocks) in pairs])
        return logits.numpy().argmax(-1).tolist()  # by NumPy as for llama.cpp, since torch's threads would spin


class Peer:
    """The same texts, decoded by llama.cpp."""

    def __init__(self, path: Path, streams: int, length: int):
        self.engine = LlamaCpp(path, streams, length, torch.get_num_threads())

    def run(self, texts: list[list[int]], start: int) -> list[int]:
        """Return the likeliest next token of each sequence, after it has read these tokens."""
        self.engine.rollback(start)
        return self.engine.run(texts, start, 1).argmax(-1).tolist()


class Transformers:
    """The same texts, decoded by transformers in bfloat16."""

    def __init__(self, model: torch.nn.Module, folder: Path):
        import transformers

        checkpoints.save(model, None, folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run(self, texts: list[list[int]], start: int) -> list[int]:
        """Return the likeliest next token of each sequence, after it has read these tokens."""
        past = self.past if start else None
        if past is not None and past.get_seq_length() > start:
            past.crop(start - past.get_seq_length())
        out = self.model(torch.tensor(texts), past_key_values=past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[:, -1].argmax(-1).tolist()


def decoding(contender: Native | Peer | Transformers, prompts: list[list[int]], count: int) -> Callable[[], None]:
    """Prefill the prompts once, and return a function that decodes `count` tokens after each prompt."""
    first = contender.run(prompts, 0)

    def work() -> None:
        tokens = first
        for place in range(len(prompts[0]), len(prompts[0]) + count):
            tokens = contender.run([[token] for token in tokens], place)

    return work


def main() -> None:
    defaults: dict[str, Any] = {
        "shape": "110m", "weights": list(PEERS), "streams": [1, 8, 32], "rounds": 3, "tokens": 32, "prefill": 512,
        "section": SECTION,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default=defaults["shape"])
    parser.add_argument("--weights", nargs="+", choices=PEERS, default=defaults["weights"])
    parser.add_argument("--streams", nargs="+", type=int, default=defaults["streams"])
    parser.add_argument("--rounds", type=int, default=defaults["rounds"])
    parser.add_argument("--tokens", type=int, default=defaults["tokens"])
    parser.add_argument("--prefill", type=int, default=defaults["prefill"])
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--section", default=SECTION, help="The section of the results that has the table.")
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = llama.build(SHAPES[options.shape]).to(torch.bfloat16).eval()
    print(f"{machine()}; {options.shape} shape, {options.rounds} rounds\n", flush=True)
    names = [*(f"{count} stream" + "s" * (count > 1) for count in options.streams), f"a prompt of {options.prefill}"]
    tasks: dict[str, Any] = {name: {"seconds": {}} for name in names}
    against: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for weights in options.weights:
            packed = pack(model, weights)
            paths = {kind: quantised(model, kind, folder) for kind in PEERS[weights]}
            for task, streams in zip(tasks.values(), [*options.streams, 0], strict=True):
                length = PROMPT + options.tokens + 1 if streams else options.prefill
                made = _contenders(packed, paths, streams or 1, length, options.transformers, model, folder)
                draw = np.random.default_rng(0)
                shape = (streams, PROMPT) if streams else (1, options.prefill)
                prompts = draw.integers(0, model.config.vocab_size, shape).tolist()
                if streams:
                    timed = {each: decoding(made[each], prompts, options.tokens) for each in made}
                else:
                    timed = {each: partial(made[each].run, prompts, 0) for each in made}
                task["amount"] = streams * options.tokens or options.prefill
                task["seconds"] |= interleaved(timed, options.rounds)
                own, *others = made
                against[own] = others
    values = {"tasks": tasks, "against": against}
    columns = ["tokens/s; keifu: ratios to the rows below it", *tasks]
    write_timing(options.json, options.section, typed("engine.py", vars(options), defaults), columns, values)


def _contenders(packed, paths, streams, length, with_transformers, model, folder) -> dict:
    made: dict = {f"keifu, {packed.weights}": Native(packed, streams, length)}
    made |= {f"llama.cpp, {kind}": Peer(path, streams, length) for kind, path in paths.items()}
    if with_transformers and packed.weights == "bf16":
        made["transformers, bf16"] = Transformers(model, folder / "hf")
    return made


if __name__ == "__main__":
    main()
