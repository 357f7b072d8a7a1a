"""Soft compared with hard labels: the same student on the same conversations, for equal minutes.

python benchmarks/distillation.py --data FILE.jsonl [--minutes 20] [--seeds 0 1 2] [--ways hard soft] [--out DIR]
    [--teacher smollm2] [--weights int8] [--student MODEL | --layers 7] [--vocabulary 8000]
    [--merges first|used] [--batch-size 8] [--context-length 512] [--learning-rate 3e-4] [--write JSON]

--data: conversations for `keifu train sft`, such as the lines of `benchmarks/teacher_texts.py`. Without --student the
student is a reduced teacher: it keeps some layers and merges. hard: it learns the tokens. soft: all of the teacher's
probabilities (forward KL). mixed: half of each. reverse and jsd: other divergences. own: soft, and half of the steps on
its own answers. All ways have the same minutes of training, which include validations and the teacher's work, and
alternate for each seed.

A figure is of the held-out conversations that fit into the context, in float32: nats per trained token, and bits per
byte of the answers' UTF-8. Only bits per byte compare models with different tokens, and a model with fewer tokens may
leave out more long conversations. The teacher is also measured with the student's tokens. A run that is in DIR is not
repeated.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _results import print_rows, typed, write_table
from _rounds import machine, spread
from _training import validation

from keifu import checkpoints
from keifu.data.chat import conversations
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.recipes.assistant import sft
from keifu.recipes.distilling import DistillAnswers, prune
from keifu.recipes.running import train_job
from keifu.training.run import metrics

SECTION = "Soft and hard labels"
WAYS: dict[str, dict[str, Any] | None] = {  # options of the distillation; None: without a teacher
    "hard": None, "soft": {}, "mixed": {"hard": 0.5}, "reverse": {"divergence": "reverse"},
    "jsd": {"divergence": "jsd"}, "own": {"on_policy": 0.5},
}  # fmt: skip
NAMES = {
    "hard": "hard labels: the tokens", "soft": "soft labels: forward KL", "mixed": "half of both",
    "reverse": "reverse KL", "jsd": "Jensen-Shannon divergence", "own": "forward KL, half on its own answers",
}  # fmt: skip


class Figures(NamedTuple):
    """Losses of the held-out conversations, and the number of training steps."""

    nats: float
    bits_per_byte: float
    steps: int


def recipe(options: argparse.Namespace, model: str, **different: Any) -> sft.Recipe:
    """Return the fine-tuning options that all ways share."""
    shared = {
        "model": model, "data": options.data, "context_length": options.context_length, "too_long": "drop",
        "batch_size": options.batch_size, "learning_rate": options.learning_rate, "held_out": options.held_out,
    }  # fmt: skip
    return sft.Recipe(**shared | different)


def measure(options: argparse.Namespace, model: str, steps: int) -> Figures:
    """Return the figures of a model on the held-out conversations that fit its context."""
    task = sft.prepare(recipe(options, model))
    nats = validation(task.model, task.data)
    learned = [
        [id for id, mine in zip(turns.ids, turns.learned, strict=True) if mine] for turns in task.held_out.fitting
    ]
    size = sum(len(task.tokenizer.decode(ids).encode()) for ids in learned)
    return Figures(nats, nats / math.log(2) * sum(map(len, learned)) / size, steps)


def learn(options: argparse.Namespace, student: Path, way: str, seed: int) -> Figures:
    """Train the student in one way, unless this was done before. Return its figures."""
    out, taught = options.out / f"{way}-{seed}", WAYS[way]
    if not (out / "report.html").exists() or not metrics.read(out):
        distill = DistillAnswers() if taught is None else DistillAnswers(
            teacher=options.teacher, weights=options.weights, **taught
        )  # fmt: skip
        chosen = recipe(options, str(student), distill=distill, seed=seed, steps=100_000, minutes=options.minutes)
        train_job(sft.job_of(chosen, sft.prepare(chosen)), out, resume=out.exists())
    return measure(options, str(out), max(line["step"] for line in metrics.read(out)))


def check_same(options: argparse.Namespace) -> None:
    """Write the options of the runs into the folder. Stop if its runs had others."""
    free = {"seeds", "ways", "threads", "out", "write"}
    now = {name: value for name, value in vars(options).items() if name not in free}
    path = options.out / "options.json"
    if path.exists() and (then := json.loads(path.read_text(encoding="utf-8"))) != now:
        other = ", ".join(f"{name} {then.get(name)}" for name in now if then.get(name) != now[name])
        raise SystemExit(f"The runs in {options.out} have {other}: give the same options or another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now), encoding="utf-8")


def uses(options: argparse.Namespace, tokenizer: Tokenizer) -> Counter[int]:
    """Return the frequency of each token in the data, if it decides the choice of merges."""
    chats = conversations.read(options.data) if options.merges == "used" else []
    return Counter(id for chat in chats for id in tokenizer.render_turns(chat)[0])


def cells(figures: Sequence[Figures]) -> list[str]:
    """Return the mean of each figure, and of several seeds the lowest and the highest."""
    columns = [*zip(*figures, strict=True)]
    return [spread(columns[0]), spread(columns[1]), spread(columns[2], ",.0f") if any(columns[2]) else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="conversations, as keifu train sft reads them")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=["hard", "soft"], choices=[*WAYS])
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--weights", default="int8", help="format of the teacher's packed weights; none: PyTorch")
    parser.add_argument("--student", help="model with the teacher's tokens (see student.py); unset: the teacher is cut")
    parser.add_argument("--layers", type=int, default=7, help="of the student")
    parser.add_argument("--vocabulary", type=int, default=8000, help="merges of the student's tokenizer")
    parser.add_argument("--merges", choices=["first", "used"], default="first", help="see --student-merges")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the runs; unset: a temporary one")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.weights = None if options.weights == "none" else options.weights
    options.out = options.out or Path(tempfile.mkdtemp())
    check_same(options)
    print(machine(), flush=True)
    figures = {"teacher": {0: measure(options, options.teacher, 0)}}
    for name, layers in (("cut-teacher", None), ("student", options.layers)):
        if name == "student" and options.student:
            checkpoints.save(*checkpoints.load(options.student), options.out / name)
        elif not (options.out / name).exists():
            model, tokenizer = checkpoints.load(options.teacher)
            pruned = prune(model, tokenizer, layers, options.vocabulary, uses(options, tokenizer))
            checkpoints.save(*pruned, options.out / name)
        figures[name] = {0: measure(options, str(options.out / name), 0)}
        print(f"{name}: {figures[name][0]}", flush=True)
    for seed in options.seeds:
        for way in options.ways:
            figures.setdefault(way, {})[seed] = learn(options, options.out / "student", way, seed)
            print(f"{NAMES[way]}, seed {seed}: {figures[way][seed]}", flush=True)
    first = {"teacher": "the teacher", "cut-teacher": "the teacher, cut to the student's tokens"}
    names = {**first, "student": "the student before training", **NAMES}
    columns = ["", "nats per token", "bits per byte", "steps"]
    rows = [[names[way], *cells([*by_seed.values()])] for way, by_seed in figures.items()]
    print_rows([columns, *rows])
    if options.write:
        defaults = vars(parser.parse_args(["--data", ""]))
        usual = {name: value for name, value in defaults.items() if name not in ("out", "write", "threads")}
        files = {name: Path(path).name for name in ("data", "student") if (path := vars(options)[name])}
        given = vars(options) | files | {"weights": options.weights or "none"}
        command = typed("distillation.py", given, usual)
        values = {
            names[way]: {f"seed {seed}": each._asdict() for seed, each in by.items()} for way, by in figures.items()
        }
        write_table(options.write, SECTION, command, columns, rows, values)


if __name__ == "__main__":
    main()
