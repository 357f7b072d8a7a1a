"""Fine-tuning and GRPO compared with TRL and PEFT: the same weights, conversations and prompts, in alternating rounds.

python benchmarks/alignment.py [--model DIR] [--dim 256] [--layers 4] [--steps 20] [--rounds 3] [--batch 8]
    [--only sft lora grpo ppo] [--threads 2] [--json FILE]

Without --model a LLaMA with random weights is made, because the time does not depend on the weights; a directory is any
that transformers loads. In each round every contender trains in a separate process. It reports its speed after the
first ten steps, and its peak memory. sft and lora count trained tokens, in rows that are not packed on either side;
keifu's packed rows are reported separately. grpo counts answers, 8 for each prompt, with a reference model. TRL 1.16
has no PPO, so keifu's has no comparison. Both sides compute in the same dtype: for sft and lora bfloat16 if the
processor supports it, float32 for answers.
"""

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import typed, usual, write_timing
from _rounds import machine

from keifu import checkpoints
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama
from keifu.recipes.assistant import grpo, ppo, sft
from keifu.recipes.assistant.finetuning import Lora, with_template
from keifu.recipes.running import train_job
from keifu.training.hardware.precision import resolve_dtype
from keifu.training.run import metrics

SECTION = "Fine-tuning and GRPO with TRL and PEFT"
WARM = 10  # uncounted steps
GROUP, ANSWER = 8, 24
WORDS = ["the", "cat", "sees", "a", "dog", "and", "birds", "fly", "over", "green", "hills", "while", "people", "sleep"]
CPU = torch.device("cpu")


def prepared(folder: Path, options: argparse.Namespace) -> None:
    """Write the model, conversations, prompts and a reward function to files for both sides."""
    chance = random.Random(0)

    def said(least: int, most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    count = options.batch * (options.steps + WARM)
    talks = [(said(4, 12), said(20, 60)) for _ in range(count)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in talks]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": a}) + "\n" for a, _ in talks))
    (folder / "rewards.py").write_text("def length(prompt, answer, example): return len(answer) / 100\n")
    if options.model:
        model, tokenizer = checkpoints.load(options.model)
    else:
        tokenizer = train_tokenizer("bpe", [f"User: {a}\n\nAssistant: {b}" for a, b in talks], 8192)
        config = llama.Config(
            vocab_size=8192, context_length=256, dim=options.dim, hidden_dim=3 * options.dim,
            n_layers=options.layers, n_heads=options.dim // 64,
        )  # fmt: skip
        model = llama.build(config)
    checkpoints.save(model, with_template(tokenizer, "own"), folder / "model")


def ours_sft(folder: Path, options: argparse.Namespace, rank: int, packed: bool) -> float:
    """Return trained tokens per second of keifu's recipe."""
    recipe = sft.Recipe(
        str(folder / "model"), str(folder / "talks.jsonl"), context_length=256, packed=packed, held_out=0.0,
        steps=options.steps + WARM, batch_size=options.batch, lora=Lora(rank=rank),
    )  # fmt: skip
    train_job(sft.job_of(recipe, sft.prepare(recipe)), folder / "run")
    return rate(folder / "run", "tokens_per_second")


def ours_grpo(folder: Path, options: argparse.Namespace) -> float:
    """Return answers per second of keifu's recipe."""
    recipe = grpo.Recipe(
        str(folder / "model"), str(folder / "prompts.jsonl"), reward=f"{folder / 'rewards.py'}:length", held_out=0.0,
        prompts=options.batch, group=GROUP, max_tokens=ANSWER, steps=options.steps + WARM,
    )  # fmt: skip
    train_job(grpo.job_of(recipe, grpo.prepare(recipe)), folder / "run")
    return rate(folder / "run", "answers_per_second")


def ours_ppo(folder: Path, options: argparse.Namespace) -> float:
    """Return answers per second of keifu's recipe, with a value model of the policy's size."""
    recipe = ppo.Recipe(
        str(folder / "model"), str(folder / "prompts.jsonl"), reward=f"{folder / 'rewards.py'}:length", held_out=0.0,
        prompts=options.batch * GROUP, minibatches=1, max_tokens=ANSWER, rollouts=options.steps + WARM,
    )  # fmt: skip
    train_job(ppo.job_of(recipe, ppo.prepare(recipe)), folder / "run")
    return rate(folder / "run", "answers_per_second")


def rate(run: Path, name: str) -> float:
    """Return the median of a metric over the steps after the warm-up."""
    return statistics.median([line[name] for line in metrics.read(run) if name in line and line["step"] > WARM])


def theirs(kind: str, folder: Path, options: argparse.Namespace) -> float:
    """Return the speed of TRL's trainer: trained tokens, or answers, per second."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *given: Any, **named: Any) -> None:
            self.times.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    usual = {
        "output_dir": str(folder / "theirs"), "max_steps": options.steps + WARM, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1000, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    rows = [json.loads(line)["messages"] for line in (folder / "talks.jsonl").read_text().splitlines()]
    if kind == "grpo":
        given = trl.GRPOConfig(
            per_device_train_batch_size=options.batch * GROUP, num_generations=GROUP, max_completion_length=ANSWER,
            beta=0.04, bf16=False, **usual,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": row[:1]} for row in rows])
        reward = lambda completions, **named: [len(each[0]["content"]) / 100 for each in completions]  # noqa: E731
        trainer = trl.GRPOTrainer(model, reward, args=given, train_dataset=data, processing_class=tokenizer)
        units = float(options.batch * GROUP)
    else:
        low = resolve_dtype("auto", CPU) == torch.bfloat16
        given = trl.SFTConfig(per_device_train_batch_size=options.batch, bf16=low, max_length=256, **usual)
        data = Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])
        adapter: Any = None
        if kind == "lora":
            from peft import LoraConfig

            adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(model, args=given, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
        ours = load_tokenizer(folder / "model")
        units = statistics.mean(sum(ours.render_turns(row)[1]) for row in rows) * options.batch
    trainer.add_callback(Clock())
    trainer.train()
    ticks = Clock.times[WARM - 1 :]
    return units / statistics.median([b - a for a, b in zip(ticks, ticks[1:], strict=False)])


CONTENDERS: dict[str, dict[str, Callable[[Path, argparse.Namespace], float]]] = {
    "sft": {
        "keifu": lambda folder, options: ours_sft(folder, options, 0, False),
        "keifu, packed": lambda folder, options: ours_sft(folder, options, 0, True),
        "TRL": lambda folder, options: theirs("sft", folder, options),
    },
    "lora": {
        "keifu": lambda folder, options: ours_sft(folder, options, 8, False),
        "keifu, packed": lambda folder, options: ours_sft(folder, options, 8, True),
        "TRL": lambda folder, options: theirs("lora", folder, options),
    },
    "grpo": {"keifu": ours_grpo, "TRL": lambda folder, options: theirs("grpo", folder, options)},
    "ppo": {"keifu": ours_ppo},
}
TASKS = {"sft": "fine-tuning, learned tokens/s", "lora": "with LoRA of rank 8", "grpo": "GRPO, answers/s",
         "ppo": "PPO, answers/s"}  # fmt: skip


def one(kind: str, name: str, source: Path, options: argparse.Namespace) -> None:
    """Run one contender in this process. Print its seconds a unit and its peak memory as a line of JSON."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for each in source.iterdir():
            (folder / each.name).symlink_to(each)
        with contextlib.redirect_stdout(sys.stderr):
            found = CONTENDERS[kind][name](folder, options)
    print(
        json.dumps(
            {"seconds": round(1 / found, 9), "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        )
    )


def elsewhere(kind: str, name: str, folder: Path) -> dict[str, float]:
    """Run one contender in a separate process and return its seconds a unit and its peak memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}, {name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(kind: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the task of one kind of training: seconds of a unit in each round, and the highest memory in MB."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS[kind]}
    memory = dict.fromkeys(seconds, 0.0)
    for _ in range(rounds):
        for name, taken in seconds.items():
            found = elsewhere(kind, name, folder)
            taken.append(found["seconds"])
            memory[name] = max(memory[name], found["memory"])
    return {"amount": 1, "seconds": seconds, "more": {name: [f"{each / 1e6:,.0f}"] for name, each in memory.items()}}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"dim": 256, "layers": 4, "steps": 20, "rounds": 3, "batch": 8, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], options.one[1], Path(options.one[2]), options)
        return
    torch.set_num_threads(options.threads)
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepared(folder, options)
        tasks = {TASKS[kind]: measured(kind, folder, options.rounds) for kind in options.only}
    values = {"tasks": tasks, "a row": "task", "against": {"keifu": ["TRL"]}}
    columns = ["a second; keifu: ratio to TRL; peak memory, MB", "keifu", "keifu, packed", "TRL and PEFT"]
    write_timing(options.json, SECTION, typed("alignment.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
