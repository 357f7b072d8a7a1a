"""Gain of prompting: zero-, one- and few-shot accuracy on topics and on arithmetic, with 95% intervals (Wilson's).

python benchmarks/prompting.py [--model smollm2] [--shots 0 1 8] [--items 300] [--only topics ...] [--picture PNG]

The same items are asked with each number of examples. Topics are chosen among 12 by four scores of likelihood;
arithmetic (Brown et al., 2020, section 3.9.1) is generated and must match exactly. In bfloat16 figures differ in the
last digit.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _charts import chart
from _rounds import machine

from keifu import checkpoints
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.few_shot import evaluate
from keifu.evaluation.text.tasks import SCORES, TASKS

SHOWN = ("topics", "2-digit-addition", "2-digit-subtraction", "2-digit-multiplication")
Line = tuple[int, str, float, float, float]  # shots, score, accuracy and its interval


def draw(found: dict[str, tuple[list[Line], dict[str, Any]]], path: Path) -> None:
    """Draw accuracy over the number of examples: a picture for topics by score, and one for generated answers."""
    with chart(path, (11, 4.3), 2, legend=None) as (left, right):
        for name, (lines, figures) in found.items():
            for way in dict.fromkeys(line[1] for line in lines):
                own = [line for line in lines if line[1] == way]
                axes, label = (left, f"{name}, {way}") if way in SCORES else (right, name)
                errors = [[line[2] - line[3] for line in own], [line[4] - line[2] for line in own]]
                axes.errorbar(
                    range(len(own)), [line[2] for line in own], yerr=errors, marker="o", capsize=3, label=label
                )
                axes.set_xticks(range(len(own)), [str(line[0]) for line in own])
            if "chance" in figures:
                left.axhline(
                    figures["majority"], color="grey", linestyle=":", label=f"always {figures['majority answer']}"
                )
                left.axhline(figures["chance"], color="grey", linestyle="--", label="a guess")
        for axes in (left, right):
            axes.set(xlabel="examples in the prompt", ylabel="accuracy, 95% interval", ylim=(0, 1))
            axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", choices=TASKS, nargs="+", default=SHOWN)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 8])
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    model, tokenizer = checkpoints.load(options.model, getattr(torch, options.dtype))
    assert tokenizer is not None
    print(f"{machine()}; {options.model}, {options.dtype}, {options.items} items of each task\n")
    print("| task | shots | scored by | accuracy | 95% interval | most frequent answer | a guess |")
    print("|---|---:|---|---:|---|---:|---:|", flush=True)
    found: dict[str, tuple[list[Line], dict[str, Any]]] = {}
    start = time.perf_counter()
    for name in options.only:
        asked = EvalRequest(name, limit=options.items, by_shots=tuple(options.shots), seed=options.seed)
        outcome = evaluate(model, tokenizer, asked)
        lines: list[Any] = list(outcome.tables["by shots"].rows)
        found[name] = lines, outcome.figures
        chance = f"{outcome.figures['chance']:.1%}" if "chance" in outcome.figures else ""
        for shots, way, accuracy, low, high in lines:
            share = f"{accuracy:.1%} | {low:.1%} to {high:.1%} | {outcome.figures['majority']:.1%}"
            print(f"| {name} | {shots} | {way} | {share} | {chance} |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
