"""Reasoning by checkable rewards: three losses of GRPO, votes of several samples, and distillation, on worked sums.

python benchmarks/reasoning.py --out DIR [--seeds 0 1 2] [--variants grpo dr-grpo dapo] [--grpo-steps 40]
    [--sft-steps 600] [--write JSON] [--pictures DIR]
python benchmarks/reasoning.py --distil --out DIR [--seeds 0 1 2] [--write JSON]
python benchmarks/reasoning.py --undamaged --out DIR [--seeds 0 1 2] [--grpo-steps 200] [--write JSON]

The problems are all 2,048 sums and differences of four numbers from 0 to 3, such as 2 + 3 - 1 + 0. A LLaMA of 0.1 M
weights is first fine-tuned on 1,200 of them with worked answers: "5 4 4". A share of --hasty of these stops after the
first sum, and every number is written once, twice or three times at random ("5 5 4 4 4 4"). So the length is free, and
a longer answer is not better. Then each loss is trained on the prompts that are not held out, with only the reward: 1
if the last number is right. All losses begin with the same model and have no reference model.

Accuracy is that of the likeliest answers to 300 held-out problems. For 100 of them --drawn answers are sampled at
temperature 1: their lengths are counted in tokens, and k of them vote by their last number, or the reward chooses the
best of k. All seconds are of one core (`time.process_time`).

--distil needs the runs of the first command in DIR. A smaller model is fine-tuned on the same shown problems. Then it
is trained in three ways for as many seconds: by GRPO; on right answers that the larger model, after GRPO, gives to
other prompts, generation included; or again on the shown problems.

--undamaged compares GRPO with further fine-tuning for as many seconds, from a model that was fine-tuned on whole
answers only (--hasty 0). The fine-tuning has the worked answers to 1,200 problems, and GRPO only the reward, for all
1,748 problems that are not held out.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _charts import chart, plot_seeds
from _results import publish
from _rounds import machine, spread

from keifu import checkpoints
from keifu.alignment.rewards import NUMBER, last_number
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.text.generate import Completion, generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.recipes.assistant import grpo, sft
from keifu.recipes.running import run_jobs
from keifu.training.run import metrics

HELD_OUT, SHOWN, VOTED = 300, 1200, 100  # numbers of problems
LONGEST = 24  # maximal tokens of an answer
LARGE, SMALL = 64, 32  # width of the model, and of the one that learns from it
POINT = 5  # steps of a point in a curve
NAMES = {"sft": "fine-tuned", "grpo": "GRPO", "dr-grpo": "Dr. GRPO", "dapo": "DAPO", "gspo": "GSPO"}
LOSSES, VOTES, DISTILLED = "Three losses of GRPO", "Votes of several samples", "Distillation and GRPO"
UNDAMAGED = "GRPO and further fine-tuning"
AGAIN = 3e-3, 5e-4  # rates of further fine-tuning: that of the first fine-tuning, and that of GRPO
TOLD = {
    "small-sft": "small, fine-tuned", "longer": "then fine-tuned for longer", "small-grpo": "or GRPO on itself",
    "distilled": "or the large model's right answers", "grpo": "the large model after GRPO",
}  # fmt: skip
Problem = dict[str, Any]


def problems() -> list[Problem]:
    """Return all problems with their answers."""
    found = []
    for numbers in product(range(4), repeat=4):
        for signs in product("+-", repeat=3):
            rest = [f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True)]
            asked = f"{numbers[0]}{''.join(f' {each[0]} {each[1]}' for each in rest)}"
            found.append({"prompt": f"What is {asked}?", "answer": str(numbers[0] + sum(map(int, rest)))})
    return found


def worked(problem: Problem, chance: random.Random, hasty: float) -> str:
    """Return an answer in which each partial sum is repeated one to three times, or with the probability `hasty` only
    the first one."""
    signs = re.findall(r"([+-]?)\s*(\d+)", problem["prompt"])
    sums = [*accumulate(int(sign + number) for sign, number in signs)][1:]
    sums = sums[:1] if chance.random() < hasty else sums
    return " ".join(str(each) for each in sums for _ in range(chance.randint(1, 3)))


def write_lines(path: Path, lines: Sequence[Problem]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


def prepare(options: argparse.Namespace, seed: int, folder: Path) -> list[Problem]:
    """Write the shown problems and all prompts. Return the held-out problems."""
    folder.mkdir(parents=True, exist_ok=True)
    found = problems()
    random.Random(seed).shuffle(found)
    held, others = found[:HELD_OUT], found[HELD_OUT:]
    chance = random.Random(seed)
    texts = [{"prompt": each["prompt"], "response": worked(each, chance, options.hasty)} for each in others[:SHOWN]]
    write_lines(folder / "shown.jsonl", texts)
    write_lines(folder / "prompts.jsonl", others)
    return held


def begin(folder: Path, name: str, dim: int, seed: int) -> None:
    """Save an untrained model, with a tokenizer for these texts."""
    lines = (folder / "shown.jsonl").read_text(encoding="utf-8").splitlines()
    said = [f"User: {each['prompt']}\nAssistant: {each['response']}\n" for each in map(json.loads, lines)]
    tokenizer = train_tokenizer("bpe", said, 400)
    torch.manual_seed(seed)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=64, dim=dim, hidden_dim=3 * dim, n_layers=2, n_heads=dim // 16
    )
    checkpoints.save(llama.build(config), tokenizer, folder / name)


def seconds_of(work: Callable[[], object]) -> float:
    """Run `work` without its output. Return its seconds of processor time."""
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.process_time() - start


def finetune(folder: Path, model: str, data: str, out: str, steps: int, seed: int, rate: float = 3e-3) -> float:
    """Fine-tune on problems with answers. Return the seconds."""
    recipe = sft.Recipe(
        str(folder / model), str(folder / f"{data}.jsonl"), template="plain", context_length=64, packed=False,
        held_out=0.02, steps=steps, batch_size=32, learning_rate=rate, weight_decay=0.1, seed=seed,
    )  # fmt: skip
    return seconds_of(lambda: run_jobs(sft.jobs(recipe), folder / out))


def reinforce(folder: Path, model: str, out: str, variant: Any, options: argparse.Namespace, seed: int) -> float:
    """Train by the reward on prompts only. Return the seconds."""
    recipe = grpo.Recipe(
        str(folder / model), str(folder / "prompts.jsonl"), reward="last-number", held_out=0.005, prompts=16, group=8,
        max_tokens=LONGEST, beta=0.0, steps=options.grpo_steps, learning_rate=options.rate,
        warmup=min(5, options.grpo_steps // 2), seed=seed, variant=variant,
    )  # fmt: skip
    return seconds_of(lambda: run_jobs(grpo.jobs(recipe), folder / out))


def answers(run: Path, problems: Sequence[Problem], drawn: int = 0) -> list[Completion]:
    """Return the likeliest answer to each problem, or `drawn` sampled ones."""
    model, tokenizer = checkpoints.load(run)
    assert tokenizer
    prompts = [tokenizer.render_chat([{"role": "user", "content": each["prompt"]}]) for each in problems]
    likeliest = SamplingParams(temperature=0, max_tokens=LONGEST)
    if not drawn:
        return generate_batch(model, tokenizer, prompts, likeliest, 128)
    several = [prompt for prompt in prompts for _ in range(drawn)]
    ways = [SamplingParams(temperature=1.0, seed=number, max_tokens=LONGEST) for number in range(len(several))]
    return generate_batch(model, tokenizer, several, ways, 256)


def rights(found: Sequence[Completion], problems: Sequence[Problem]) -> list[bool]:
    """Return for each answer whether it is right. There are equally many for each problem."""
    each = [problem for problem in problems for _ in range(len(found) // len(problems))]
    return [last_number(p["prompt"], a.text, p) > 0 for p, a in zip(each, found, strict=True)]


def votes(found: Sequence[Completion], right: Sequence[bool], problems: int, drawn: int) -> dict[str, dict[str, float]]:
    """Return the share of problems that k samples solve, by vote and by the reward: the mean of 20 choices of k
    samples. Of answers with equal votes the first one counts."""
    chance = random.Random(0)
    last = [(NUMBER.findall(each.text) or [""])[-1] for each in found]
    sums = {"vote": Counter[str](), "best": Counter[str]()}
    for first in range(0, len(found), drawn):
        for _ in range(20):
            order = chance.sample(range(first, first + drawn), drawn)
            for k in (2**power for power in range(drawn.bit_length())):
                chosen = Counter(last[place] for place in order[:k]).most_common(1)[0][0]
                sums["vote"][str(k)] += next(right[place] for place in order if last[place] == chosen)
                sums["best"][str(k)] += any(right[place] for place in order[:k])
    return {way: {k: round(count / problems / 20, 4) for k, count in own.items()} for way, own in sums.items()}


def measure(run: Path, held: Sequence[Problem], drawn: int) -> dict[str, Any]:
    """Return the accuracy of the likeliest answers, the lengths of right and wrong drawn answers, and the votes."""
    accuracy = mean(rights(answers(run, held), held))
    found = answers(run, held[:VOTED], drawn)
    right = rights(found, held[:VOTED])
    lengths = {
        name: round(mean(len(each.tokens) for each, good in zip(found, right, strict=True) if good is side), 2)
        for name, side in (("right tokens", True), ("wrong tokens", False))
    }
    return {"accuracy": round(accuracy, 4), **lengths, **votes(found, right, VOTED, drawn)}


def curves(run: Path) -> dict[str, list[float]]:
    """Return the training curves, averaged over five steps for each point. Steps without a figure are skipped."""
    lines = [line for line in metrics.read(run) if "length_of_right" in line]
    parts = [lines[start : start + POINT] for start in range(0, len(lines), POINT)]
    names = ("reward", "length_of_right", "length_of_wrong")
    return {name: [round(mean([x[name] for x in part if x[name]] or [0.0]), 3) for part in parts] for name in names}


def kept(folder: Path, name: str, train: Callable[[], float], held: Sequence[Problem], drawn: int) -> dict[str, Any]:
    """Train a run and return its measurements. If they are already in a file, return them instead."""
    path = folder / f"{name}.json"
    if not path.is_file():
        shutil.rmtree(folder / name, ignore_errors=True)  # of an interrupted run
        spent = train()
        found = measure(folder / name, held, drawn) | {"core seconds": round(spent, 1)}
        found |= {"curves": curves(folder / name)} if found and "sft" not in name else {}
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"{folder.name}, {name}: { {key: value for key, value in found.items() if key != 'curves'} }", flush=True)
    return found


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train every loss with every seed. Return the measurements by name and seed."""
    found: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        held = prepare(options, seed, folder)
        begin(folder, "base", LARGE, seed)
        works = {"sft": partial(finetune, folder, "base", "shown", "sft", options.sft_steps, seed)}
        works |= {name: partial(reinforce, folder, "sft", name, name, options, seed) for name in options.variants}
        for name, work in works.items():
            found.setdefault(NAMES[name], {})[f"seed {seed}"] = kept(folder, name, work, held, options.drawn)
    return found


def cells(runs: dict[str, Any], name: str, form: str, factor: float = 1) -> str:
    return spread([factor * each[name] for each in runs.values()], form)


def report(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print and write the tables of losses and of votes, and draw both."""
    columns = ["", "likeliest answer right, %", "tokens of right answers", "tokens of wrong ones", "core seconds"]
    forms: Sequence[tuple[str, str, float]] = [
        ("accuracy", ".1f", 100), ("right tokens", ".2f", 1), ("wrong tokens", ".2f", 1), ("core seconds", ".0f", 1)
    ]  # fmt: skip
    rows = [[name, *(cells(runs, *form) for form in forms)] for name, runs in found.items()]
    tell(options, LOSSES, columns, rows, found)
    counts = [2**power for power in range(options.drawn.bit_length())]
    several = [name for name in found if name in (NAMES["sft"], NAMES["grpo"])]
    shares = {
        f"{name}, {told}": {str(k): [each[way][str(k)] for each in found[name].values()] for k in counts}
        for name in several
        for way, told in (("vote", "majority of k"), ("best", "best of k by the reward"))
    }
    rows = [[name, *(spread([100 * x for x in each], ".1f") for each in own.values())] for name, own in shares.items()]
    tell(options, VOTES, ["% right, by number of samples", *map(str, counts)], rows, shares)
    if options.pictures:
        draw_curves(found, options.pictures / "reasoning.png")
        draw_votes(shares, options.pictures / "votes.png")


def tell(options: argparse.Namespace, section: str, columns: list[str], rows: list[list[str]], values: dict) -> None:
    """Print a table, and write it."""
    part = {DISTILLED: "--distil ", UNDAMAGED: f"--undamaged --grpo-steps {options.grpo_steps} "}.get(section, "")
    publish(options.write, section, f"python benchmarks/reasoning.py {part}--out DIR", columns, rows, values)


def draw_curves(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw for each loss the reward and the lengths of right and wrong answers over the steps. The shade is the range
    of the seeds."""
    with chart(path, (11, 3.6), 3, legend=None) as panels:
        titles = {"reward": "drawn answers right", "length_of_right": "tokens of right answers",
                  "length_of_wrong": "tokens of wrong answers"}  # fmt: skip
        for axes, (figure_name, title) in zip(panels, titles.items(), strict=True):
            for name, runs in found.items():
                if all("curves" in each for each in runs.values()):
                    lines = torch.tensor([each["curves"][figure_name] for each in runs.values()])
                    steps = [POINT * (number + 0.5) for number in range(lines.shape[1])]
                    plot_seeds(axes, steps, lines, name)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step")
        panels[0].legend(fontsize=9)


def draw_votes(shares: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the share of right answers over the number of samples."""
    with chart(path, (6.5, 4), legend=9) as axes:
        for name, by_count in shares.items():
            values = 100 * torch.tensor([*by_count.values()])
            counts = [int(k) for k in by_count]
            plot_seeds(axes, counts, values.T, name, "o-")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set(xlabel="samples", ylabel="problems right, %", ylim=(0, 102))


def taught(folder: Path) -> Iterator[Problem]:
    """Yield further problems with the larger model's right answers."""
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [*map(json.loads, lines)]
    found = answers(folder / "grpo", problems, 1)
    for problem, answer, right in zip(problems, found, rights(found, problems), strict=True):
        if right:
            yield {"prompt": problem["prompt"], "response": answer.text.strip()}


def finetune_for(
    folder: Path, start: str, limit: float, step: float, seed: int, name: str, rate: float = 3e-3
) -> float:
    """Fine-tune the model `start` for `limit` seconds, on the larger one's answers or on the shown problems. Return the
    seconds, including generation. step: seconds per step."""
    spent, data = 0.0, "shown"
    if name == "distilled":
        spent, data = seconds_of(lambda: write_lines(folder / "taught.jsonl", [*taught(folder)])), "taught"
    steps = max(1, round((limit - spent) / step))
    return spent + finetune(folder, start, data, name, steps, seed, rate)


def distil(options: argparse.Namespace) -> None:
    """Compare GRPO, distillation and further fine-tuning of a smaller model for equal seconds."""
    found: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        held = prepare(options, seed, folder)
        begin(folder, "small", SMALL, seed)
        start = partial(finetune, folder, "small", "shown", "small-sft", options.sft_steps, seed)
        itself = partial(reinforce, folder, "small-sft", "small-grpo", "grpo", options, seed)
        own = {name: kept(folder, name, work, held, options.drawn) for name, work in
               (("small-sft", start), ("small-grpo", itself))}  # fmt: skip
        first, limit = (own[name]["core seconds"] for name in ("small-sft", "small-grpo"))
        more = partial(finetune_for, folder, "small-sft", limit, first / options.sft_steps, seed)
        for name in ("distilled", "longer"):
            own[name] = kept(folder, name, partial(more, name), held, options.drawn)
        own["grpo"] = json.loads((folder / "grpo.json").read_text(encoding="utf-8"))
        for name, title in TOLD.items():
            found.setdefault(title, {})[f"seed {seed}"] = own[name]
    tell_samples(options, DISTILLED, found)


def tell_samples(options: argparse.Namespace, section: str, found: dict[str, dict[str, Any]]) -> None:
    """Print and write a table with the accuracy of the likeliest answer, of one sample, of a vote and of any sample."""
    columns = ["", "likeliest answer right, %", "one sample", f"majority of {options.drawn}",
               f"any of {options.drawn}", "core seconds"]  # fmt: skip
    rows = []
    for title, runs in found.items():
        shares = [
            spread([100 * each[way][str(k)] for each in runs.values()], ".1f")
            for way, k in (("vote", 1), ("vote", options.drawn), ("best", options.drawn))
        ]
        spent = cells(runs, "core seconds", ".0f") if "large model after" not in title else ""
        rows.append([title, cells(runs, "accuracy", ".1f", 100), *shares, spent])
    tell(options, section, columns, rows, found)


def compare_undamaged(options: argparse.Namespace) -> None:
    """Compare GRPO with further fine-tuning for as many seconds, from a model that was fine-tuned on whole answers."""
    found: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        folder = options.out / f"undamaged-{seed}"
        held = prepare(options, seed, folder)
        begin(folder, "base", LARGE, seed)
        start = partial(finetune, folder, "base", "shown", "sft", options.sft_steps, seed)
        first = kept(folder, "sft", start, held, options.drawn)
        learned = kept(folder, "grpo", partial(reinforce, folder, "sft", "grpo", "grpo", options, seed), held,
                       options.drawn)  # fmt: skip
        more = partial(finetune_for, folder, "sft", learned["core seconds"], first["core seconds"] / options.sft_steps)
        runs = {"fine-tuned": first, "then GRPO": learned}
        for rate in AGAIN:
            name = f"longer-{rate:g}"
            work = partial(more, seed, name, rate)
            runs[f"or fine-tuned for longer, rate {rate:g}"] = kept(folder, name, work, held, options.drawn)
        for title, run in runs.items():
            found.setdefault(title, {})[f"seed {seed}"] = run
    tell_samples(options, UNDAMAGED, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=[*NAMES][1:], default=["grpo", "dr-grpo", "dapo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sft-steps", type=int, default=600)
    parser.add_argument("--grpo-steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-4, help="of GRPO")
    parser.add_argument("--hasty", type=float, default=0.4, help="share of shown answers that stop after the first sum")
    parser.add_argument("--drawn", type=int, default=16, help="answers to a problem, a power of 2")
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--undamaged", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    if options.undamaged:
        options.hasty = 0.0
        compare_undamaged(options)
    elif options.distil:
        distil(options)
    else:
        report(compare(options), options)


if __name__ == "__main__":
    main()
