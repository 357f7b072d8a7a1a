"""GRPO on arithmetic: how many more held-out sums a small model gets right than after its fine-tuning.

python benchmarks/chain_sum.py [--sft-steps 2000] [--grpo-steps 300] [--shown 6000] [--hasty 0.6] [--prompts 32]
    [--group 8] [--rate 1e-4] [--beta 0.0] [--terms 3 4] [--plain] [--digits 1] [--dim 128] [--layers 2] [--seeds 0]
    [--threads 2] [--variant grpo] [--built-in] [--beside] [--drawn 64] [--picture PNG] [--out DIR]

The problems are reasoning-gym's chain_sum if it is installed (otherwise, and with --built-in, sums of the same form
made here). Each occurs once. 500 are held out. --shown problems are used for fine-tuning. Of all others GRPO uses only
the prompts, and the last number of each answer is checked. The answers shown in fine-tuning are of mixed quality, like
texts by people: a share of --hasty stops after the first sum, the others continue to the answer ("7 5 14" for 4 + 3 - 2
+ 9; with --plain all are only the answer). Fine-tuning imitates both kinds; the reward separates them, and right sums
from wrong ones. The model is a LLaMA of half a million weights without pretraining, so GRPO begins at the level of
fine-tuning. Accuracy is that of the likeliest answer; answers are sampled at temperature 1. With --beside the model is
also fine-tuned for as many further seconds as GRPO took, which is the fair comparison for GRPO's gain. With --hasty 0
no answer stops early. --drawn answers for each problem give pass@k, the chance that one of k answers is right (Chen et
al., 2021, section 2.1). --variant is that of keifu train grpo; the mean lengths of right and of wrong answers are
printed for the first and the last tenth of the steps.
"""

import argparse
import contextlib
import io
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb
from pathlib import Path
from statistics import mean

import torch
from _charts import chart
from _rounds import machine, spread

from keifu import checkpoints
from keifu.alignment.rewards import last_number
from keifu.data.chat.prompts import gym_problems
from keifu.data.text.synthetic_math import chain_sums
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.recipes.assistant import grpo, sft
from keifu.recipes.running import run_jobs
from keifu.training.run import metrics

HELD_OUT = 500
NAMES = {"sft": "fine-tuned", "grpo": "then GRPO", "more": "or fine-tuned for as long"}
POOL = 20_000  # problems to draw; repetitions are dropped
LONGEST = 12  # maximal tokens of an answer
Problem = dict[str, str]


@dataclass(frozen=True)
class Row:
    """Results of a model: share of right likeliest answers, pass@k, and seconds of training."""

    right: float
    passed: dict[int, float]
    seconds: float


def made(options: argparse.Namespace) -> tuple[list[Problem], str]:
    """Return different problems with answers, shuffled by the seed; and the name of their source."""
    least, most = options.terms
    settings = f"min_terms={least},max_terms={most},min_digits=1,max_digits={options.digits}"
    found, whose = None, "sums made here"
    if not options.built_in:
        try:
            found, whose = [*gym_problems(f"gym:chain_sum,{settings}", POOL, options.seed)], "reasoning-gym's chain_sum"
        except UserError as error:
            print(f"{error} Sums made here are used.")
    found = found or [*chain_sums(POOL, (least, most), options.digits, options.seed)]
    unlike = {each["prompt"]: {"prompt": each["prompt"], "answer": each["answer"]} for each in found}
    found = [*unlike.values()]
    random.Random(options.seed).shuffle(found)  # the short ones are few, and were drawn first
    return found, whose


def worked(problem: Problem) -> str:
    """Return the partial sums from left to right, the answer last: "7 5 14" for 4 + 3 - 2 + 9."""
    signs = re.findall(r"([+-]?)\s*(\d+)", problem["prompt"])
    sums = [*accumulate(int(sign + number) for sign, number in signs)]
    assert str(sums[-1]) == problem["answer"]
    return " ".join(map(str, sums[1:]))


def written(shown: Sequence[Problem], options: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """Yield each problem for fine-tuning with its answer."""
    chance = random.Random(options.seed)
    for each in shown:
        whole = each["answer"] if options.plain else worked(each)
        yield each, whole.split()[0] if chance.random() < options.hasty else whole


def begun(folder: Path, texts: Sequence[Problem], options: argparse.Namespace) -> None:
    """Save an untrained model, and a tokenizer for these problems, in a directory."""
    said = [f"User: {each['prompt']}\nAssistant: {worked(each)}\n" for each in texts]
    tokenizer = train_tokenizer("bpe", said, 400)
    torch.manual_seed(options.seed)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=64, dim=options.dim, hidden_dim=3 * options.dim,
        n_layers=options.layers, n_heads=4,
    )  # fmt: skip
    checkpoints.save(llama.build(config), tokenizer, folder)


def accuracy(run: Path, held: Sequence[Problem]) -> float:
    """Return the share of problems that the model answers correctly by greedy decoding."""
    model, tokenizer = checkpoints.load(run)
    prompts = [tokenizer.render_chat([{"role": "user", "content": each["prompt"]}]) for each in held]
    way = SamplingParams(temperature=0, max_tokens=LONGEST)
    answers = generate_batch(model, tokenizer, prompts, way, 128)
    return mean(last_number(e["prompt"], a.text, e) for a, e in zip(answers, held, strict=True))


def passed(run: Path, held: Sequence[Problem], drawn: int) -> dict[int, float]:
    """Return pass@k for k = 1, 2, 4 ... up to the number of answers for each problem, estimated without bias."""
    model, tokenizer = checkpoints.load(run)
    prompts = [tokenizer.render_chat([{"role": "user", "content": e["prompt"]}]) for e in held for _ in range(drawn)]
    ways = [SamplingParams(temperature=1.0, seed=number, max_tokens=LONGEST) for number in range(len(prompts))]
    answers = generate_batch(model, tokenizer, prompts, ways, 256)
    each = [e for e in held for _ in range(drawn)]
    right = [last_number(e["prompt"], a.text, e) for a, e in zip(answers, each, strict=True)]
    counts = torch.tensor(right).view(-1, drawn).sum(1).tolist()
    return {k: mean(1 - comb(drawn - int(c), k) / comb(drawn, k) for c in counts) for k in powers(drawn)}


def powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def draw(found: dict[str, list[Row]], picture: Path) -> None:
    """Draw pass@k over k, a line for each model and seed."""
    with chart(picture, (6, 4), legend=10) as axes:
        for colour, (name, rows) in zip(("tab:blue", "tab:orange", "tab:green"), found.items(), strict=False):
            for number, row in enumerate(rows):
                axes.plot(
                    [*row.passed], [*row.passed.values()], marker="o", color=colour, label=None if number else name
                )
        axes.set(xscale="log", xlabel="k", ylabel="pass@k on held-out sums", ylim=(0, 1))
        axes.set_xticks(ticks := [*next(iter(found.values()))[0].passed], list(map(str, ticks)))


def timed(work: Callable[[], object]) -> float:
    """Run `work` without its output. Return the seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - start


def tuned(options: argparse.Namespace, folder: Path, model: Path, name: str, steps: int) -> float:
    """Fine-tune on the shown problems. Return the seconds."""
    recipe = sft.Recipe(
        str(model), str(folder / "shown.jsonl"), template="plain", context_length=64, packed=False, held_out=0.02,
        steps=steps, batch_size=64, learning_rate=1e-3, weight_decay=0.1, seed=options.seed,
    )  # fmt: skip
    return timed(lambda: run_jobs(sft.jobs(recipe), folder / name))


def rewarded(options: argparse.Namespace, folder: Path) -> float:
    """Train by the reward on prompts only. Return the seconds."""
    recipe = grpo.Recipe(
        str(folder / "sft"), str(folder / "prompts.jsonl"), reward="last-number", held_out=0.02,
        prompts=options.prompts, group=options.group, max_tokens=LONGEST, beta=options.beta, steps=options.grpo_steps,
        learning_rate=options.rate, warmup=min(20, options.grpo_steps // 2), seed=options.seed, variant=options.variant,
    )  # fmt: skip
    seconds = timed(lambda: run_jobs(grpo.jobs(recipe), folder / "grpo"))
    lines = [line for line in metrics.read(folder / "grpo") if "length_of_right" in line]
    tenth = max(1, len(lines) // 10)
    for name in ("length_of_right", "length_of_wrong"):
        first, last = (mean(line[name] for line in part) for part in (lines[:tenth], lines[-tenth:]))
        print(f"{options.variant}, {name.replace('_', ' ')}: {first:.1f}, then {last:.1f} tokens", flush=True)
    return seconds


def of_seed(options: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """Run everything with one seed. Return the results of each model on the held-out problems."""
    folder.mkdir(parents=True, exist_ok=True)
    found, whose = made(options)
    shown, others = found[HELD_OUT : HELD_OUT + options.shown], found[HELD_OUT + options.shown :]
    held = found[:HELD_OUT]
    for name, some in (
        ("shown", [{"prompt": each["prompt"], "response": text} for each, text in written(shown, options)]),
        ("prompts", others),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in some))
    begun(folder / "base", found, options)
    print(f"{whose}: {len(held)} held out, {len(shown)} shown with answers, {len(others)} prompts alone", flush=True)
    seconds = {
        "sft": tuned(options, folder, folder / "base", "sft", options.sft_steps),
        "grpo": rewarded(options, folder),
    }
    if options.beside:
        more = max(1, round(options.sft_steps * seconds["grpo"] / seconds["sft"]))
        seconds["more"] = tuned(options, folder, folder / "sft", "more", more)
    rows = {}
    for name, each in seconds.items():
        rows[NAMES[name]] = Row(accuracy(folder / name, held), passed(folder / name, held, options.drawn), each)
        print(f"{NAMES[name]}: {rows[NAMES[name]]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"sft-steps": 2000, "grpo-steps": 300, "shown": 6000, "prompts": 32, "group": 8, "digits": 1, "dim": 128}
    for name, value in {**numbers, "layers": 2, "threads": 2, "drawn": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--variant", choices=["grpo", "dr-grpo", "dapo", "gspo"], default="grpo")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--hasty", type=float, default=0.6)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--terms", type=int, nargs=2, default=(3, 4))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--built-in", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or Path(tempfile.mkdtemp())
    print(machine(), flush=True)
    seeds = []
    for seed in options.seeds:
        options.seed = seed
        seeds.append(of_seed(options, folder / f"seed-{seed}"))
    found = {name: [each[name] for each in seeds] for name in seeds[0]}
    print(f"| | likeliest answer | {' | '.join(f'pass@{k}' for k in powers(options.drawn))} | seconds |")
    print("|---|" + "---:|" * (2 + len(powers(options.drawn))))
    for name, rows in found.items():
        cells = [[row.right for row in rows], *([row.passed[k] for row in rows] for k in powers(options.drawn))]
        told = " | ".join(spread(each, ".1%") for each in cells)
        print(f"| {name} | {told} | {mean(row.seconds for row in rows):.0f} |")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
