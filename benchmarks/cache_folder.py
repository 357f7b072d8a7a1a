"""Time of a first and a second question about one long document, with and without a cache folder, over restarts.

python benchmarks/cache_folder.py [--model smollm2] [--weights own] [--tokens 4000] [--answer 8] [--rounds 3]
    [--threads N] [--write JSON]

Each question is asked by a process of its own, which loads the model first: the first question without a folder, the
first question with an empty one, and the second question without and with it. They alternate in each round, and each
round has a new folder. The text of the second answer is the same with and without the folder, which is checked. Times
are from the request to the first token and to the last one, without loading; the processor's seconds are those of all
threads until the first token. Ratios are to the first question without a folder in the same round: the median, and the
lowest and highest.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _results import print_rows, spanned, typed, usual, write_table
from _rounds import machine

from keifu import checkpoints
from keifu.data.text.documents import documents
from keifu.inference.text.engine import Engine
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.sampling_params import SamplingParams
from keifu.native.library import use_threads

SECTION = "A long prompt is read once"
QUESTIONS = "Which problems does the speaker name?", "What does the speaker ask Congress to do?"
CONTENDERS = {  # the number of the question, and whether there is a folder
    "first question, no folder": (0, False),
    "first question, empty folder": (0, True),
    "second question, no folder": (1, False),
    "second question after a restart": (1, True),
}
FIGURES = {"first token": "s to the first token", "answer": "s to the last token", "processor": "processor's s"}


def ask(options: argparse.Namespace) -> None:
    """Load the model, ask a question about the document, and print the times and the answer as JSON."""
    model, tokenizer = checkpoints.load(options.model, weights=options.weights)
    assert tokenizer
    began = time.perf_counter()
    folder = CacheFolder(options.folder, 2**32) if options.folder else None
    engine = Engine(model, tokenizer, folder=folder)
    start = time.perf_counter() - began
    text = "\n".join(documents("sotu"))[: 10 * options.tokens]
    document = tokenizer.decode(tokenizer.encode(text)[: options.tokens])
    prompt = tokenizer.render_chat([{"role": "user", "content": f"{document}\n\n{QUESTIONS[options.question]}"}])
    request = engine.request(prompt, SamplingParams(temperature=0, max_tokens=options.answer, seed=0))
    began, processor = time.perf_counter(), time.process_time()
    engine.add(request)
    while not request.tokens:
        engine.step()
    figures = {"first token": time.perf_counter() - began, "processor": time.process_time() - processor}
    while engine.work:
        engine.step()
    figures |= {"answer": time.perf_counter() - began, "start": start}
    if folder:
        folder.flush()
        figures["written"] = time.perf_counter() - began
    rounded = {name: round(seconds, 4) for name, seconds in figures.items()}
    print(json.dumps({**rounded, "prompt": len(prompt), "cached": request.cached, "tokens": request.tokens}))


def asked(options: argparse.Namespace, question: int, folder: Path | None) -> dict[str, Any]:
    """Ask a question in another process. Return its figures."""
    words = [sys.executable, __file__, "--question", str(question), *(["--folder", str(folder)] if folder else [])]
    for name in ("model", "weights", "tokens", "answer", "threads"):
        words += [f"--{name}", str(vars(options)[name])] if vars(options)[name] else []
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return the rows of the table: the median of each figure, and its ratio to that of the first question."""
    base = found[next(iter(CONTENDERS))]
    rows = []
    for name, rounds in found.items():
        cells = []
        for figure in FIGURES:
            ratios = [own[figure] / first[figure] for own, first in zip(rounds, base, strict=True)]
            ratio = "" if rounds is base else f"; {spanned(ratios, '.3f')}"
            cells.append(f"{statistics.median(own[figure] for own in rounds):.2f}{ratio}")
        rows.append([name, f"{rounds[0]['cached']:,} of {rounds[0]['prompt']:,}", *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default="own", help="format of the weights, as that of keifu serve")
    parser.add_argument("--tokens", type=int, default=4000, help="of the document")
    parser.add_argument("--answer", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="unset: as many as there are cores")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--question", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        use_threads(options.threads)
    if options.question is not None:
        ask(options)
        return
    print(f"{machine()}\n", flush=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        with TemporaryDirectory() as folder:
            for name, (question, stores) in CONTENDERS.items():
                found[name].append(asked(options, question, Path(folder) if stores else None))
                print(name, {each: x for each, x in found[name][-1].items() if each != "tokens"}, flush=True)
        first, stored, second, restarted = (found[name][-1]["tokens"] for name in CONTENDERS)
        if first != stored or second != restarted:
            raise SystemExit("The answers differ with and without the folder.")
    rows = rows_of(found)
    columns = ["question; ratios to the first row", "tokens from the folder", *FIGURES.values()]
    print_rows([columns, ["---", *["---:"] * (len(columns) - 1)], *rows])
    if options.write:
        command = typed("cache_folder.py", vars(options), usual(parser))
        write_table(options.write, SECTION, command, columns, rows, {"rounds": found})


if __name__ == "__main__":
    main()
