"""InstructGPT's pipeline on a model trained here: PPO follows a reward model that was trained only on rankings by a
gold reward, and both rewards are compared.

python benchmarks/instruct.py [--depth 3] [--pretraining-steps 1200] [--sft-steps 300] [--ranked 400] [--answers 4]
    [--noise 0.5] [--reward-steps 150] [--rollouts 60] [--prompts 64] [--dpo-steps 150] [--test 200] [--seeds 0]
    [--threads 2] [--out DIR] [--write FILE] [--picture PNG]

A small LLaMA is trained on Wikipedia summaries, fine-tuned on "What is X?" with the summary as the answer, and answers
--ranked further questions several times. benchmarks/_gold.py scores the answers instead of people. These scores, with
added noise, rank the answers, so the preferences are synthetic. A reward model learns the rankings. PPO learns from the
reward model, with and without additional pretraining text (PPO-ptx), and DPO from the same pairs.

Results: the reward model's accuracy on held-out pairs; gold and learned reward by the KL divergence that PPO has
reached (the over-optimisation curve); and for each model on unseen questions the gold reward, with the 95% interval by
resampling the questions, how often it beats the fine-tuned one by gold, with Wilson's 95% interval, and the loss on
held-out pretraining text. Each seed repeats everything; the questions of several seeds are put together.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _gold import gold
from _results import publish, share_of, typed, usual
from _rounds import machine, spread

from keifu import checkpoints
from keifu.data.chat import conversations
from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import prepare
from keifu.evaluation.intervals import bootstrap
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.recipes.assistant import dpo, ppo, reward, sft
from keifu.recipes.language import gpt
from keifu.recipes.running import run_jobs
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.run import metrics

TEXT = "wiki-summaries"
CONTEXT = 128
LONGEST = 48  # maximal tokens of an answer
GOLD = f"{Path(__file__).parent / '_gold.py'}:gold"


@dataclass(frozen=True)
class Row:
    """Results of a model on unseen questions, with answers sampled at temperature 1."""

    name: str
    gold: list[float]
    nats: float


def cells(rows: Sequence[Row], tuned: Sequence[Row]) -> list[str]:
    """Return a row of the table from one model's results of all seeds. tuned: those of the fine-tuned model."""
    scores, others = ([score for row in some for score in row.gold] for some in (rows, tuned))
    low, high = bootstrap(scores)
    pairs = [(a, b) for a, b in zip(scores, others, strict=True) if a != b]
    won = share_of(sum(a > b for a, b in pairs), len(pairs)) if pairs else ""
    reward = f"{statistics.mean(scores):.3f} ({low:.3f} to {high:.3f})"
    return [rows[0].name, reward, won, spread([row.nats for row in rows])]


def quietly(work: Callable[[], object]) -> float:
    """Run `work` without its output. Return the seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - start


def answers(run: Path, questions: Sequence[str], seed: int) -> list[str]:
    """Return one sampled answer to each question. A question that occurs several times gets a new answer each time."""
    model, tokenizer = checkpoints.load(run)
    prompts = [tokenizer.render_chat([{"role": "user", "content": each}]) for each in questions]
    drawn = [SamplingParams(max_tokens=LONGEST, seed=seed + number) for number in range(len(prompts))]
    return [each.text.strip() for each in generate_batch(model, tokenizer, prompts, drawn, 64)]


def ranked(run: Path, questions: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return several answers to each question with their noisy gold scores, as records of a file of preferences."""
    chance, count = random.Random(options.seed), options.answers
    said = answers(run, [each for each in questions for _ in range(count)], options.seed + 1)
    made = []
    for number, question in enumerate(questions):
        some = [*dict.fromkeys(filter(None, said[number * count : (number + 1) * count]))]
        scores = [gold(question, each, {}) + chance.gauss(0, options.noise) for each in some]
        if len(some) > 1:
            made.append({"prompt": question, "answers": some, "scores": scores})
    return made


@torch.inference_mode()
def nats(run: Path, windows: int = 60) -> float:
    """Return the loss per token on held-out pretraining text, in nats."""
    model, tokenizer = checkpoints.load(run)
    model = model.float().eval()
    data = PackedText(prepare(TEXT, tokenizer), CONTEXT - 1, 20, validation_tokens=windows * CONTEXT)
    found = [causal_language_modeling(model, batch) for batch in data.validation()]
    return float(sum(each.total for each in found)) / float(sum(each.weight for each in found))


def measured(name: str, run: Path, questions: Sequence[str], seed: int) -> Row:
    """Return a model's results."""
    said = answers(run, questions, seed)
    scores = [round(gold(question, each, {}), 4) for question, each in zip(questions, said, strict=True)]
    return Row(name, scores, round(nats(run), 4))


def curve(run: Path, bins: int = 8) -> list[tuple[float, float, float]]:
    """Return mean KL, learned and gold reward of a PPO run's rollouts, in bins along the run."""
    lines = [(x["kl"], x["reward"], x["measured_gold"]) for x in metrics.read(run) if "measured_gold" in x]
    return [tuple(np.mean(part, 0).tolist()) for part in np.array_split(np.array(lines), min(bins, len(lines)))]


def prepared(options: argparse.Namespace, folder: Path) -> list[str]:
    """Train the language model and the fine-tuned one, write rankings and prompts, and return the test questions."""
    recipe = gpt.Recipe(options.depth, TEXT, context_length=CONTEXT, steps=options.pretraining_steps, seed=options.seed)
    print(f"pretrained in {quietly(lambda: run_jobs(gpt.jobs(recipe), folder / 'base')):.0f} s", flush=True)
    found = list(conversations.read("summary-instructions"))
    random.Random(options.seed).shuffle(found)
    questions = [each[0]["content"] for each in found]
    cuts = np.cumsum([options.test, options.ranked, 4 * options.prompts])
    shown = found[cuts[-1] : cuts[-1] + 3000]
    sides = {"shown": [{"messages": each} for each in shown]}
    sides["prompts"] = [{"prompt": each} for each in questions[cuts[1] : cuts[2]]]
    write(folder, sides)
    tuning = sft.Recipe(
        str(folder / "base"), str(folder / "shown.jsonl"), context_length=CONTEXT, too_long="truncate",
        steps=options.sft_steps, batch_size=16, learning_rate=3e-4, seed=options.seed,
    )  # fmt: skip
    print(f"fine-tuned in {quietly(lambda: run_jobs(sft.jobs(tuning), folder / 'sft')):.0f} s", flush=True)
    made = ranked(folder / "sft", questions[cuts[0] : cuts[1]], options)
    write(folder, {"preferences": made})
    return questions[: cuts[0]]


def write(folder: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def learned(options: argparse.Namespace, folder: Path) -> None:
    """Train the reward model, DPO, and PPO without and with pretraining text."""
    tuned, preferences = str(folder / "sft"), str(folder / "preferences.jsonl")
    judging = reward.Recipe(
        tuned, preferences, context_length=CONTEXT, drop_long=True, steps=options.reward_steps, held_out=0.2,
        learning_rate=1e-4, seed=options.seed,
    )  # fmt: skip
    pairs = dpo.Recipe(
        tuned, preferences, context_length=CONTEXT, drop_long=True, steps=options.dpo_steps, learning_rate=2e-5,
        seed=options.seed,
    )  # fmt: skip

    def policy(text: str | None) -> ppo.Recipe:
        return ppo.Recipe(
            tuned, reward=str(folder / "reward"), measured=(GOLD,), data=str(folder / "prompts.jsonl"),
            text=ppo.RolloutText(text, weight=options.text_weight, each=1, length=CONTEXT - 1), prompts=options.prompts,
            minibatches=4, max_tokens=LONGEST, kl_coef=options.beta, rollouts=options.rollouts,
            learning_rate=options.rate, value_rate=3 * options.rate, missing_eos_penalty=1.0, ema=0.9,
            seed=options.seed,
        )  # fmt: skip

    work = {
        "reward": lambda: run_jobs(reward.jobs(judging), folder / "reward"),
        "DPO": lambda: run_jobs(dpo.jobs(pairs), folder / "DPO"),
        "PPO": lambda: run_jobs(ppo.jobs(policy(None)), folder / "PPO"),
        "PPO-ptx": lambda: run_jobs(ppo.jobs(policy(TEXT)), folder / "PPO-ptx"),
    }
    for name, each in work.items():
        print(f"{name} in {quietly(each):.0f} s", flush=True)


Curve = list[tuple[float, float, float]]


def draw(curves: dict[str, list[Curve]], picture: Path) -> None:
    """Draw gold and learned reward over KL, a pair of lines for each seed."""
    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.5), sharey=True, squeeze=False)
    for place, (name, seeds) in zip(axes[0], curves.items(), strict=True):
        for number, points in enumerate(seeds):
            distances, told, true = zip(*points, strict=True)
            for values, title, colour in ((told, "reward model", "tab:blue"), (true, "gold", "tab:orange")):
                label = None if number else title
                place.plot(distances, values, marker="o", markersize=3, color=colour, label=label)
        place.set(title=name, xlabel="KL of an answer, nats")
        place.grid(alpha=0.3)
        place.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def of_seed(options: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Curve]]:
    """Run everything with one seed. Return the results of each model, and the curves of PPO."""
    test = prepared(options, folder)
    learned(options, folder)
    last = [each for each in metrics.read(folder / "reward") if "validation_accuracy" in each][-1]
    print(f"The reward model is right in {last['validation_accuracy']:.1%} of held-out pairs.", flush=True)
    rows = [measured("fine-tuned", folder / "sft", test, options.seed + 2)]
    rows += [measured(name, folder / name, test, options.seed + 3) for name in ("DPO", "PPO", "PPO-ptx")]
    return rows, {name: curve(folder / name) for name in ("PPO", "PPO-ptx")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"depth": 3, "pretraining-steps": 1200, "sft-steps": 300, "ranked": 400, "answers": 4}
    numbers |= {"reward-steps": 150, "rollouts": 60, "prompts": 64, "dpo-steps": 150, "test": 200}
    for name, value in {**numbers, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"noise": 0.5, "beta": 0.02, "rate": 3e-5, "text-weight": 1.0}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or Path(tempfile.mkdtemp())
    print(machine())
    found = []
    for seed in options.seeds:
        options.seed, own = seed, folder / f"seed-{seed}"
        own.mkdir(parents=True, exist_ok=True)
        print(f"\nseed {seed}:", flush=True)
        found.append(of_seed(options, own))
    models = [*zip(*(rows for rows, _ in found), strict=True)]
    table = [cells(rows, models[0]) for rows in models]
    columns = ["", "gold reward", "beats the fine-tuned one by gold", "nats per token on held-out pretraining text"]
    values = {rows[0].name: {"gold": [row.gold for row in rows], "nats": [row.nats for row in rows]} for rows in models}
    command = typed("instruct.py", vars(options), usual(parser))
    publish(options.write, "InstructGPT's pipeline", command, columns, table, values)
    curves = {name: [each[name] for _, each in found] for name in found[0][1]}
    for name, seeds in curves.items():
        for seed, points in zip(options.seeds, seeds, strict=True):
            print(f"\n{name}, seed {seed}: KL, learned reward, gold reward, from the start to the end")
            print("\n".join(f"{kl:8.2f} {told:8.3f} {true:8.3f}" for kl, told, true in points))
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
