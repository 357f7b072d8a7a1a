"""How well a small model sees: right answers on easy-VQA, next to the same model without the picture and to counting.

python benchmarks/seeing.py [--steps 1200] [--questions 2000] [--seed 0] [--folder FOLDER] [--out FILE.json]

A decoder of 0.5 M parameters from nothing, with a tokenizer learned from the questions, and a tower of 1 M read the
questions of easy-VQA's training part. Pictures that may show a teal triangle are left out. Then the questions of the
test part are asked, with the picture and without it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--questions", type=int, default=None, help="most questions of the test part, spread over all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="the folder of the run")
    parser.add_argument("--out", type=Path, help="the file of the figures")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    run = train(folder, options.steps, options.seed)
    figures = measure(run, options.questions)
    about = {"machine": machine(), "steps": options.steps, "batch": 64, "seed": options.seed, "left out": PAIR}
    text = json.dumps({**about, "figures": figures}, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
