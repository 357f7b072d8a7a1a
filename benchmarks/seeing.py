"""How well a small model sees: right answers on easy-VQA, next to the same model without the picture and to counting.

python benchmarks/seeing.py [--steps 1600] [--learning-rate 1e-3] [--questions 2000] [--seeds 0] [--tower emoji-clip]
    [--folder FOLDER] [--write docs/results/data/text_and_pictures.json]

A decoder of 0.5 M parameters from nothing, with a tokenizer learned from the questions, and the tower of the packaged
emoji-clip (1 M) read the questions of easy-VQA's training part. --tower "" makes a new tower instead. Pictures that may
show a teal triangle are left out. Then the questions of the test part are asked, with the picture and without it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _results import write_table
from _rounds import machine

from keifu import checkpoints
from keifu.data.images.questions import read_questions
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation.images.questions import evaluate
from keifu.evaluation.registry import EvalRequest
from keifu.models import llama
from keifu.recipes.assistant import see

DATA, PAIR = "easy-vqa", ("teal", "triangle")


def small_decoder(folder: Path, seed: int, data: str = DATA) -> str:
    """Write a decoder with random weights and a tokenizer of the questions, and return its folder."""
    texts = [f"User: {each.question}\nAssistant: {each.answer}\n" for each in read_questions(data).learned]
    tokenizer = train_tokenizer("bpe", texts, 400)
    torch.manual_seed(seed)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=128, dim=128, hidden_dim=352, n_layers=2, n_heads=4, tied=True
    )
    checkpoints.save(llama.build(config), tokenizer, folder / "decoder")
    return str(folder / "decoder")


def train(folder: Path, steps: int, seed: int, **changes: Any) -> Path:
    """Train a model and return its run."""
    recipe = see.Recipe(
        small_decoder(folder, seed, changes.get("data", DATA)), left_out=PAIR, steps=steps, batch_size=64,
        learning_rate=1e-3, seed=seed,
    )  # fmt: skip
    see.run(type(recipe)(**{**vars(recipe), **changes}), folder / "run", False)
    return folder / "run"


def measure(run: Path, questions: int | None, data: str = DATA) -> dict[str, Any]:
    """Return the figures of a run on the test part, and on the pictures of what was left out."""
    model, tokenizer = checkpoints.load(run)
    request = EvalRequest(on=data, limit=questions, held_out={"left_out": list(PAIR)})
    return evaluate(model, tokenizer, request).figures


def cell(figures: dict[str, Any], name: str) -> str:
    """Return a share, with its interval if it has one."""
    interval = figures.get(f"{name}, 95% interval")
    if interval is None:
        return f"{figures[name]:.1%}"
    low, high = (100 * float(end) for end in interval.split(" to "))
    return f"{figures[name]:.1%} ({low:.1f} to {high:.1f})"


def main() -> None:
    """Train for each seed, ask, print and write the shares of right answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's highest rate")
    parser.add_argument("--questions", type=int, default=None, help="most questions of the test part, spread over all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tower", default="emoji-clip", help="the CLIP whose tower is taken; empty: a new tower")
    parser.add_argument("--folder", type=Path, help="the folder of the runs")
    parser.add_argument("--write", type=Path, help="the data file that gets the table")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    found: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        run = train(
            folder / str(seed), options.steps, seed, learning_rate=options.learning_rate, tower=options.tower or None
        )
        found[seed] = measure(run, options.questions)
        print(machine(), f"seed {seed}", *(f"{name}: {value}" for name, value in found[seed].items()), sep="\n")
    if options.write:
        names = [name for name in found[options.seeds[0]] if "interval" not in name and name != "questions"]
        rows = [[name, *(cell(found[seed], name) for seed in options.seeds)] for name in names]
        seeds = " ".join(map(str, options.seeds))
        command = f"python benchmarks/seeing.py --steps {options.steps} --seeds {seeds}"
        command += f" --learning-rate {options.learning_rate}" * (options.learning_rate != 1e-3)
        command += f" --tower {options.tower!r}" * (options.tower != "emoji-clip")
        command += f" --questions {options.questions}" * bool(options.questions)
        columns = ["right answers", *(f"seed {seed}" for seed in options.seeds)]
        write_table(options.write, "A model that sees", command, columns, rows, {str(s): found[s] for s in found})


if __name__ == "__main__":
    main()
