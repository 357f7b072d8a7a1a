"""GRPO on arithmetic: how many more held-out sums a small model gets right than after its fine-tuning.

python benchmarks/chain_sum.py [--sft-steps 2000] [--grpo-steps 300] [--shown 6000] [--hasty 0.6] [--prompts 32]
    [--group 8] [--rate 1e-4] [--beta 0.0] [--terms 3 4] [--plain] [--digits 1] [--dim 128] [--layers 2] [--seed 0]
    [--threads 2] [--built-in] [--beside] [--out DIR]

The problems are reasoning-gym's chain_sum where that is installed (else, and with --built-in, sums of the same form
made here), each once: 500 are held out and never seen, --shown are fine-tuned on, and of all others only the prompts
are used, whose last number is checked while GRPO learns. What is shown is of mixed quality, as what people write is: a
share of --hasty stops after the first sum, the others go on to the answer ("7 5 14" for 4 + 3 - 2 + 9; with --plain all
are the answer alone). Fine-tuning imitates both; the reward tells them apart, and right sums from wrong ones. The
model, a LLaMA of half a million weights, knows nothing before: what it can do after fine-tuning is the level that GRPO
begins with. Accuracy is that of the likeliest answer, and of one drawn at temperature 1. With --beside it is also
fine-tuned on the shown ones for as many seconds more as GRPO had: what GRPO's lift has to be compared with.
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
from itertools import accumulate
from pathlib import Path

import torch
from _rounds import machine

from keifu import checkpoints
from keifu.alignment.rewards import last_number
from keifu.data.chat.prompts import gym_problems
from keifu.data.text.synthetic_math import chain_sums
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.generation.text.generate import generate_batch
from keifu.generation.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.recipes.assistant import grpo, sft

HELD_OUT = 500
POOL = 20_000  # problems that are drawn; the same one counts once
LONGEST = 12  # tokens of an answer
Problem = dict[str, str]


def made(options: argparse.Namespace) -> tuple[list[Problem], str]:
    """Different problems with their answers, in an order that the seed decides; and whose they are."""
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
    """The sums on the way from left to right, the answer last: "7 5 14" for 4 + 3 - 2 + 9."""
    signs = re.findall(r"([+-]?)\s*(\d+)", problem["prompt"])
    sums = [*accumulate(int(sign + number) for sign, number in signs)]
    assert str(sums[-1]) == problem["answer"]
    return " ".join(map(str, sums[1:]))


def written(shown: Sequence[Problem], options: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """The problems that are shown, with what is said to each."""
    chance = random.Random(options.seed)
    for each in shown:
        whole = each["answer"] if options.plain else worked(each)
        yield each, whole.split()[0] if chance.random() < options.hasty else whole


def begun(folder: Path, texts: Sequence[Problem], options: argparse.Namespace) -> None:
    """A model that knows nothing, and a tokenizer for such texts, as a directory."""
    said = [f"User: {each['prompt']}\nAssistant: {worked(each)}\n" for each in texts]
    tokenizer = train_tokenizer("bpe", said, 400)
    torch.manual_seed(options.seed)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=64, dim=options.dim, hidden_dim=3 * options.dim,
        n_layers=options.layers, n_heads=4,
    )  # fmt: skip
    checkpoints.save(llama.build(config), tokenizer, folder)


def accuracy(run: Path, held: Sequence[Problem], temperature: float = 0.0) -> float:
    """The share of problems whose answer is right, the likeliest one or at a temperature one that was drawn."""
    model, tokenizer = checkpoints.load(run)
    prompts = [tokenizer.render_chat([{"role": "user", "content": each["prompt"]}]) for each in held]
    way = SamplingParams(temperature=temperature, seed=0, max_tokens=LONGEST)
    answers = generate_batch(model, tokenizer, prompts, way, 128)
    return sum(last_number(e["prompt"], a.text, e) for a, e in zip(answers, held, strict=True)) / len(held)


def timed(work: Callable[[], object]) -> float:
    """Seconds of some work whose words nobody needs."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - start


def tuned(options: argparse.Namespace, folder: Path, model: Path, name: str, steps: int) -> float:
    """Fine-tunes on the problems that are shown; the seconds that it took."""
    recipe = sft.Recipe(
        str(model), str(folder / "shown.jsonl"), template="plain", context_length=64, packed=False, held_out=0.02,
        steps=steps, batch_size=64, learning_rate=1e-3, weight_decay=0.1, seed=options.seed,
    )  # fmt: skip
    return timed(lambda: sft.run(recipe, folder / name, False))


def rewarded(options: argparse.Namespace, folder: Path) -> float:
    """Learns from the reward on prompts alone; the seconds that it took."""
    recipe = grpo.Recipe(
        str(folder / "sft"), str(folder / "prompts.jsonl"), reward="last-number", held_out=0.02,
        prompts=options.prompts, group=options.group, max_tokens=LONGEST, beta=options.beta, steps=options.grpo_steps,
        learning_rate=options.rate, warmup=20, seed=options.seed,
    )  # fmt: skip
    return timed(lambda: grpo.run(recipe, folder / "grpo", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"sft-steps": 2000, "grpo-steps": 300, "shown": 6000, "prompts": 32, "group": 8, "digits": 1, "dim": 128}
    for name, value in {**numbers, "layers": 2, "seed": 0, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--hasty", type=float, default=0.6)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--terms", type=int, nargs=2, default=(3, 4))
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--built-in", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found, whose = made(options)
    held, shown, others = (
        found[:HELD_OUT],
        found[HELD_OUT : HELD_OUT + options.shown],
        found[HELD_OUT + options.shown :],
    )
    for name, some in (
        ("shown", [{"prompt": each["prompt"], "response": text} for each, text in written(shown, options)]),
        ("prompts", others),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in some))
    begun(folder / "base", found, options)
    print(f"{machine()}\n{whose}: {len(held)} held out, {len(shown)} shown with answers, {len(others)} prompts alone")
    rows = [("fine-tuned", tuned(options, folder, folder / "base", "sft", options.sft_steps), folder / "sft")]
    print(f"fine-tuned: {accuracy(rows[0][2], held):.1%} after {rows[0][1]:.0f} s", flush=True)
    rows.append(("then GRPO", rewarded(options, folder), folder / "grpo"))
    if options.beside:
        more = max(1, round(options.sft_steps * rows[1][1] / rows[0][1]))
        rows.append(
            ("or fine-tuned for as long", tuned(options, folder, folder / "sft", "more", more), folder / "more")
        )
    print("| | held-out accuracy | of drawn answers | seconds |\n|---|---:|---:|---:|")
    for name, seconds, run in rows:
        print(f"| {name} | {accuracy(run, held):.1%} | {accuracy(run, held, 1.0):.1%} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
