"""Speculative decoding of SmolLM2: tokens per second by kind of text and number of streams, with and without guesses.

python benchmarks/speculation.py [--weights bf16 int4] [--streams 1 4 8] [--tokens 64] [--rounds 3] [--threads N]
    [--write JSON]

Eight texts of each kind are generated, as many at once as there are streams. Copying: a chat message asks for the
summary of a Wikipedia article word for word. Code: the beginnings of modules of Python's standard library are
continued. Chat: short questions are answered. All are greedy. The contenders generate the same tokens: without guesses;
with four guesses from the text after the last three tokens' earlier occurrence (prompt lookup, `--guesses 4`); as the
engine chooses by measured speed (`--guesses` unset); and, if the weights are not int4, with the same model in int4 as
the draft (`--draft`). The catalogue's file of SmolLM2 has 4 bits per weight, so this draft is nearly always right: it
shows the best possible gain of a draft. All contenders alternate in each round. Only decoding is timed, not the reading
of prompts. Ratios are to the speed without guesses in the same round: the median, and the lowest and highest.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _results import write_table
from _rounds import PAUSE, machine

from keifu import checkpoints
from keifu.data.text.documents import documents
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.inference.text.draft import Draft
from keifu.inference.text.engine import Engine
from keifu.inference.text.sampling_params import SamplingParams
from keifu.native.library import use_threads

SECTION = "Speculative decoding"
TEXTS, BEGINNING = 8, 160  # texts of each kind; tokens of code before the continuation
QUESTIONS = (
    "What is photosynthesis?", "How do I make tea?", "Why is the sky blue?", "Tell me about the city of Paris.",
    "What can I do on a rainy day?", "How does a bicycle stay upright?", "Who was Isaac Newton?",
    "Write a short story about a cat.",
)  # fmt: skip
WAYS = {"none": "no guesses", "4": "4 guesses", "auto": "as the engine chooses", "draft": "int4 draft"}


def prompts(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Return the prompts of each kind, as tokens."""

    def said(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.render_chat([{"role": "user", "content": text}]) for text in texts]

    summaries = islice((each for each in documents("wiki-summaries") if 400 < len(each) < 700), TEXTS)
    modules = islice((each for each in documents("python-code") if len(each) > 4000), TEXTS)
    return {
        "copying": said([f"Repeat this text word for word:\n\n{each.strip()}" for each in summaries]),
        "code": [tokenizer.encode(each)[:BEGINNING] for each in modules],
        "chat": said(QUESTIONS),
    }


class Writer:
    """Contender: an engine that generates the same texts again in each round."""

    def __init__(self, model: Any, tokenizer: Tokenizer, guesses: Any, streams: int, tokens: int):
        self.engine = Engine(model, tokenizer, max_running=streams, step_tokens=max(512, 33 * streams), guesses=guesses)
        self.streams, self.sampling = streams, SamplingParams(temperature=0, max_tokens=tokens, seed=0)
        self.rates: list[float] = []
        self.written: list[list[int]] = []

    def write(self, texts: Sequence[list[int]]) -> None:
        """Generate all texts, `streams` at once, and record the tokens per second of decoding."""
        count, seconds, self.written = 0, 0.0, []
        for first in range(0, len(texts), self.streams):
            own: dict[int, list[int]] = {}
            for text in texts[first : first + self.streams]:
                own[self.engine.add(self.engine.request(text, self.sampling))] = []
            while not all(own.values()):
                self._take(own)
            before, start = sum(map(len, own.values())), time.perf_counter()
            while self.engine.work:
                self._take(own)
            seconds += time.perf_counter() - start
            count += sum(map(len, own.values())) - before
            self.written += own.values()
        self.rates.append(round(count / seconds, 2))

    def _take(self, own: dict[int, list[int]]) -> None:
        for piece in self.engine.step():
            own[piece.index].append(piece.token)

    @property
    def accepted(self) -> float:
        """Share of guesses that were right."""
        return self.engine.accepted / max(1, self.engine.guessed)


def race(contenders: dict[str, Writer], texts: Sequence[list[int]], rounds: int) -> None:
    """Run all contenders in turn in each round, after an uncounted round. Check that they generate the same text."""
    for number in range(rounds + 1):
        for contender in contenders.values():
            time.sleep(PAUSE)
            contender.write(texts)
            if not number:
                contender.rates.clear()
    first, *others = contenders.values()
    if any(each.written != first.written for each in others):
        raise SystemExit("The texts differ with and without guesses.")


def cells(contenders: dict[str, Writer]) -> list[str]:
    """Return the speed without guesses, and for every other way the ratio and the share of right guesses."""
    base = contenders["none"].rates
    found = [f"{statistics.median(base):.0f}"]
    for way in list(WAYS)[1:]:
        if way not in contenders:
            found.append("")
            continue
        ratios = [a / b for a, b in zip(contenders[way].rates, base, strict=True)]
        told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        share = contenders[way].accepted
        found.append(told if way == "auto" else f"{told}, {share:.0%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="unset: as many as there are cores")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        use_threads(options.threads)
    print(f"{machine()}\n", flush=True)
    columns = ["weights, text, streams", "no guesses, tokens/s", "4 guesses: ratio, accepted", "as the engine chooses",
               "int4 draft: ratio, accepted"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}", flush=True)
    small, tokenizer = checkpoints.load("smollm2", weights="int4")
    assert tokenizer
    rows, values, kinds = list[list[str]](), dict[str, Any](), prompts(tokenizer)
    for weights in options.weights:
        model = small if weights == "int4" else checkpoints.load("smollm2", weights=weights)[0]
        for kind, texts in kinds.items():
            for streams in options.streams:
                ways: dict[str, Any] = {"none": 0, "4": 4, "auto": None}
                if weights != "int4":
                    ways["draft"] = Draft(small, tokenizer, 4)
                contenders = {
                    way: Writer(model, tokenizer, guesses, streams, options.tokens) for way, guesses in ways.items()
                }
                race(contenders, texts, options.rounds)
                name = f"{weights}, {kind}, {streams}"
                rows.append([name, *cells(contenders)])
                values[name] = {
                    WAYS[way]: {"tokens a second": each.rates, "accepted": round(each.accepted, 4)}
                    for way, each in contenders.items()
                }
                print(f"| {' | '.join(rows[-1])} |", flush=True)
    if options.write:
        command = f"python benchmarks/speculation.py --rounds {options.rounds} --tokens {options.tokens}"
        command += f" --threads {options.threads}" if options.threads else ""
        write_table(options.write, SECTION, command, columns, rows, values)


if __name__ == "__main__":
    main()
