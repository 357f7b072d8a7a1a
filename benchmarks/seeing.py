"""Vision of a small model: right answers on easy-VQA, compared with the same model without the picture and with
counting.

python benchmarks/seeing.py [--model gpt-en] [--rank 0] [--template plain] [--tower emoji-clip] [--patch 8]
    [--tower-rate 0] [--mixed] [--steps 3000] [--batch 64] [--learning-rate 1e-3] [--questions 2000] [--seeds 0]
    [--folder FOLDER] [--title TITLE] [--write FILE]

A decoder is trained on the questions of easy-VQA's training part: an untrained one of 0.5 M parameters, with a
tokenizer trained on the questions, or --model, whole or with adapters of --rank. Its vision tower is that of --tower, a
CLIP or a vision-language model. By default, as in LLaVA, it is that of a CLIP (0.8 M parameters, patches of 8 or 16
pixels) trained for 600 or 1,500 steps on the same pictures with captions such as "blue circle", made from the answers.
Pictures that may show a teal triangle are left out of both trainings. Then the questions of the test part are asked,
with the picture and without it.
"""

import argparse
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _results import typed, write_table
from _rounds import machine

from keifu import checkpoints
from keifu.data.images.augmentation import Augmentation
from keifu.data.images.questions import CLOSED, read_questions
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation.images.questions import evaluate
from keifu.evaluation.registry import EvalRequest
from keifu.models import llama
from keifu.recipes.assistant import see
from keifu.recipes.images import clip
from keifu.recipes.running import run_jobs

DATA, PAIR = "easy-vqa", ("teal", "triangle")
TOWERS: dict[int, dict[str, Any]] = {8: {"steps": 600}, 16: {"steps": 1500, "optimizer": "muon"}}  # by patch size


def captioned(folder: Path, data: str = DATA) -> Path:
    """Write the training pictures with captions such as "a blue circle", made from the answers to open questions."""
    questions, captions = read_questions(data), dict[str, list[str]]()
    for row in questions.without(PAIR):
        if row.answer not in CLOSED:
            named = re.findall(r"the (\w+)(?= shape\b)|color is the (\w+)", row.question)
            words = {row.answer, *(word for pair in named for word in pair if word)} - {"shape"}
            captions.setdefault(row.image, []).extend(words)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with (folder / "pictures" / "metadata.jsonl").open("w") as lines:
        for image, words in captions.items():
            name = image.replace("/", "-")
            questions.picture(image).save(folder / "pictures" / name)
            lines.write(json.dumps({"file_name": name, "text": " ".join(sorted({*words}))}) + "\n")
    return folder / "pictures"


def train_tower(folder: Path, patch: int, seed: int) -> str:
    """Train a CLIP on the captioned pictures, unless the folder has one. Return its run."""
    if (folder / "clip" / "config.json").exists():
        return str(folder / "clip")
    image = replace(see.Recipe.image, projected=True, embedding_dim=128, patch_size=patch)
    settings = replace(clip.LEARNING, batch_size=128, seed=seed, weight_decay=0.05, **TOWERS[patch])
    pictures = str(captioned(folder))
    recipe = clip.Recipe(pictures, ("und",), image=image, augmentation=Augmentation(shift=4), training=settings)
    run_jobs(clip.jobs(recipe), folder / "clip")
    return str(folder / "clip")


def small_decoder(folder: Path, seed: int, data: str = DATA) -> str:
    """Write a decoder with random weights and a tokenizer of the questions. Return its folder."""
    texts = [f"User: {each.question}\nAssistant: {each.answer}\n" for each in read_questions(data).learned]
    tokenizer = train_tokenizer("bpe", texts, 400)
    torch.manual_seed(seed)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=128, dim=128, hidden_dim=352, n_layers=2, n_heads=4, tied=True
    )
    checkpoints.save(llama.build(config), tokenizer, folder / "decoder")
    return str(folder / "decoder")


def train(folder: Path, steps: int, seed: int, decoder: str | None = None, **changes: Any) -> Path:
    """Train a model, unless the folder has it. Return its run."""
    if (folder / "run" / "config.json").exists():
        return folder / "run"
    recipe = see.Recipe(
        decoder or small_decoder(folder, seed, changes.get("data", DATA)), left_out=PAIR, steps=steps, batch_size=64,
        learning_rate=1e-3, seed=seed,
    )  # fmt: skip
    run_jobs(see.jobs(type(recipe)(**{**vars(recipe), **changes})), folder / "run")
    return folder / "run"


def measure(run: Path, questions: int | None, data: str = DATA) -> dict[str, Any]:
    """Return the figures of a run on the test part, and on pictures of the left-out combination."""
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


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the decoder; unset: a small one from nothing")
    parser.add_argument("--rank", type=int, default=0, help="rank of the decoder's adapters; 0 trains it whole")
    parser.add_argument("--tower", help="the CLIP or model that sees whose tower is taken; unset: a CLIP is trained")
    parser.add_argument("--patch", type=int, choices=TOWERS, default=8, help="pixels of the trained CLIP's patches")
    parser.add_argument("--tower-rate", type=float, default=0.0, help="the tower's share of the learning rate")
    parser.add_argument("--mixed", action="store_true", help="begin with all questions, not with those about names")
    parser.add_argument("--template", choices=("own", "plain"), default="own", help="the form of conversations")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="questions in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's highest rate")
    parser.add_argument("--questions", type=int, default=None, help="most questions of the test part, spread over all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, help="the folder of the runs")
    parser.add_argument("--title", default="A model that sees", help="the title of the table")
    parser.add_argument("--write", type=Path, help="the data file that gets the table")
    options = parser.parse_args()
    options.defaults = vars(parser.parse_args([]))
    return options


def command(options: argparse.Namespace) -> str:
    """Return the command with the options that affect the figures and differ from the defaults."""
    defaults = {name: usual for name, usual in options.defaults.items() if name not in ("folder", "write", "title")}
    return typed("seeing.py", vars(options), defaults, ("seeds",))


def main() -> None:
    """Train for each seed and test; print and write the shares of right answers."""
    options = read_options()
    folder = options.folder or Path(tempfile.mkdtemp())
    measured: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        tower = options.tower or train_tower(folder / str(seed), options.patch, seed)
        run = train(
            folder / str(seed), options.steps, seed, options.model, batch_size=options.batch, tower=tower,
            learning_rate=options.learning_rate, tower_rate=options.tower_rate, names_first=not options.mixed,
            template=options.template, lora=see.finetuning.Lora(rank=options.rank),
        )  # fmt: skip
        measured[seed] = measure(run, options.questions)
        print(machine(), f"seed {seed}", *(f"{name}: {value}" for name, value in measured[seed].items()), sep="\n")
    if options.write:
        names = [name for name in measured[options.seeds[0]] if "interval" not in name and name != "questions"]
        rows = [[name, *(cell(measured[seed], name) for seed in options.seeds)] for name in names]
        columns = ["right answers", *(f"seed {seed}" for seed in options.seeds)]
        values = {str(seed): measured[seed] for seed in measured}
        write_table(options.write, options.title, command(options), columns, rows, values)


if __name__ == "__main__":
    main()
