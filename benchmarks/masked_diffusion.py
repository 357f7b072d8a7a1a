"""Masked diffusion (LLaDA) compared with left to right (LLaMA): the same blocks, text and minutes of a core.

python benchmarks/masked_diffusion.py [--minutes 6] [--seed 0] [--out JSON]

Both models have 4 of LLaMA's layers, and are trained on windows of 128 tokens for --minutes of processor time each, on
one thread. One attends to earlier tokens, the other to all tokens that are not masked.

Bits per byte: of held-out windows, for masked diffusion an upper bound (the mean of 16 random masks of each window).
The first token of a window has no context: for the left-to-right model its probability is its share of the training
text. The interval resamples windows.

Steps: 64 tokens after 16 of a held-out text, sampled at temperature 1. They are judged by the loss of the left-to-right
model, which favours its own text, and by the number of different tokens among the 64, because repetitions have a low
loss too.

Gaps: tokens in the middle of 96 tokens are hidden and generated greedily; the figure is the share of exactly right
ones.

Reversed relations, synthetic: 200 teachers and 200 pupils, each a token. Of 150 pairs both sentences are trained, "A
teaches B" and "B learns from A", of 50 pairs only the first. The 50 are asked in the direction of training ("A teaches
_"), in the sentence that was not trained ("B learns from _"), and, if a model fills gaps, by the first token of the
trained sentence ("_ teaches B"). A guess among all names is right once in 400 times.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _results import write_table
from _rounds import machine
from torch import Tensor, nn

from keifu.data.text.packed import PackedText
from keifu.evaluation.intervals import bootstrap, wilson
from keifu.evaluation.text.diffusion_bound import bound
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.unmasking import Unmasking, unmask
from keifu.models import llama
from keifu.models.diffusion import llada
from keifu.recipes.language.pretraining import Text, prepare_text
from keifu.training.objectives.diffusion import add_masking_rates
from keifu.training.objectives.language_modeling import causal_language_modeling, masked_diffusion

VOCAB, LENGTH, ROWS = 512, 128, 16
SIZES: dict[str, Any] = {"context_length": LENGTH, "dim": 128, "hidden_dim": 352, "n_layers": 4, "n_heads": 4}
NAMES = ("left to right", "masked diffusion")
PROMPT, WRITTEN, STEPS = 16, 64, (64, 32, 16, 8, 4, 1)
AROUND, GAPS = 96, (1, 2, 4, 8)
PAIRS, ONE_WAY = 200, 50
TEACHES, LEARNS, BEGIN, END, MASK = range(2 * PAIRS, 2 * PAIRS + 5)
Batches = Callable[[int], dict[str, Tensor]]
Values = dict[str, Any]


class Rows:
    """Training data whose batches are a function of the step."""

    fingerprint = ""

    def __init__(self, batch: Batches):
        self.batch = batch

    def validation(self) -> Any:
        """Return no batches."""
        return iter(())


def both(vocab: int, sizes: dict[str, Any], seed: int) -> tuple[nn.Module, nn.Module]:
    """Build the two models with the same sizes and the same vocabulary; the last token is the mask."""
    torch.manual_seed(seed)
    causal = llama.build(llama.Config(vocab_size=vocab, **sizes))
    torch.manual_seed(seed)
    return causal, llada.build(llada.Config(vocab_size=vocab, mask_token=vocab - 1, rope_theta=10_000.0, **sizes))


def train(model: nn.Module, objective: Any, batches: Batches, minutes: float, rate: float) -> int:
    """Train for `minutes` of processor time, with warm-up and a decreasing rate in the last third. Return the number of
    steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    began, step, share = time.process_time(), 0, 0.0
    model.train()
    while share < 1:
        outcome = objective(model, batches(step))
        (outcome.total / outcome.weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20, 3 * (1 - share) + 0.02)
        optimizer.step()
        optimizer.zero_grad()
        step, share = step + 1, (time.process_time() - began) / 60 / minutes
    model.eval()
    return step


@torch.no_grad()
def causal_losses(model: nn.Module, windows: Tensor, first: Tensor) -> list[float]:
    """Return the nats per token of each window. first: loss of each token at the start of a window."""
    losses = []
    for part in windows.split(32):
        rest = F.cross_entropy(model(part[:, :-1]).mT, part[:, 1:], reduction="none")
        losses += ((rest.sum(1) + first[part[:, 0]]) / part.shape[1]).tolist()
    return losses


@torch.no_grad()
def judged(judge: nn.Module, prompts: Tensor, written: Tensor) -> list[str]:
    """Return the loss of generated tokens after their prompts, and the number of different tokens in each text."""
    tokens = torch.cat([prompts, written], 1)
    logits = judge(tokens)[:, PROMPT - 1 : -1]
    loss = F.cross_entropy(logits.mT, written)
    different = np.mean([len(set(row)) for row in written.tolist()])
    return [f"{float(loss):.3f}", f"{different:.1f}"]


def by_steps(causal: nn.Module, masked: nn.Module, held_out: Tensor, texts: int) -> list[list[str]]:
    """Return a row for each way of generating: passes of the model for a text, loss by the judge, different tokens."""
    prompts, real = held_out[:texts, :PROMPT], held_out[:texts, PROMPT : PROMPT + WRITTEN]
    rows = [["the text itself", "", *judged(causal, prompts, real)]]
    samplings = [SamplingParams(max_tokens=WRITTEN, temperature=1.0, seed=seed) for seed in range(texts)]
    done = generate_batch(causal, None, prompts.tolist(), samplings)
    rows.append(["left to right", str(WRITTEN), *judged(causal, prompts, torch.tensor([one.tokens for one in done]))])
    for steps in STEPS:
        began = [
            unmask(masked, [*prompt, *[VOCAB] * WRITTEN], Unmasking(None, steps, WRITTEN, 1.0, seed))
            for seed, prompt in enumerate(prompts.tolist())
        ]
        rows.append(["masked diffusion", str(steps), *judged(causal, prompts, torch.tensor(began)[:, PROMPT:])])
    return rows


def by_gaps(causal: nn.Module, masked: nn.Module, held_out: Tensor, texts: int) -> list[list[str]]:
    """Return a row for each length of a gap: the share of its tokens that each model predicts correctly."""
    rows, greedy = [], {"temperature": 0, "seed": 0}
    for gap in GAPS:
        begin = (AROUND - gap) // 2
        right: dict[str, int] = dict.fromkeys(NAMES, 0)
        windows = held_out[:texts, :AROUND]
        wanted = windows[:, begin : begin + gap]
        before = generate_batch(causal, None, windows[:, :begin].tolist(), SamplingParams(max_tokens=gap, **greedy))
        right[NAMES[0]] = int((torch.tensor([one.tokens for one in before]) == wanted).sum())
        hidden = windows.clone()
        hidden[:, begin : begin + gap] = VOCAB
        filled = torch.tensor([unmask(masked, row, Unmasking()) for row in hidden.tolist()])
        right[NAMES[1]] = int((filled[:, begin : begin + gap] == wanted).sum())
        rows.append([f"{gap} hidden", *(_share(right[name], wanted.numel()) for name in NAMES)])
    return rows


def _share(right: int, total: int) -> str:
    low, high = wilson(right, total)
    return f"{100 * right / total:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def relations(seed: int, minutes: float) -> tuple[list[list[str]], Values]:
    """Return a row for each kind of question about the pairs of which only one sentence was trained."""
    random = torch.Generator().manual_seed(seed)
    teachers, pupils = torch.randperm(PAIRS, generator=random), PAIRS + torch.randperm(PAIRS, generator=random)
    ones = torch.ones_like(pupils)
    forward = torch.stack([BEGIN * ones, teachers, TEACHES * ones, pupils, END * ones], 1)
    back = torch.stack([BEGIN * ones, pupils, LEARNS * ones, teachers, END * ones], 1)
    known = torch.cat([forward, back[ONE_WAY:]])

    def batch(step: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(known), (64,), generator=torch.Generator().manual_seed(1000 * seed + step))
        return {"tokens": known[chosen]}

    sizes = {"context_length": 8, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
    causal, masked = both(MASK + 1, sizes, seed)
    steps = [train(causal, causal_language_modeling, batch, minutes, 3e-3)]
    steps.append(train(masked, masked_diffusion, add_masking_rates(Rows(batch), seed).batch, minutes, 3e-3))
    asked = forward[:ONE_WAY], back[:ONE_WAY]
    found: dict[str, list[list[int]]] = {
        "A teaches _": [_ahead(causal, asked[0]), _filled(masked, asked[0], 3)],
        "B learns from _": [_ahead(causal, asked[1]), _filled(masked, asked[1], 3)],
        "_ teaches B": [[], _filled(masked, asked[0], 1)],
    }
    rows = [[name, *(_share(sum(each), len(each)) if each else "" for each in pair)] for name, pair in found.items()]
    return rows, {"steps": steps, **found}


@torch.no_grad()
def _ahead(model: nn.Module, sentences: Tensor) -> list[int]:
    return (model(sentences[:, :3])[:, -1].argmax(-1) == sentences[:, 3]).int().tolist()


@torch.no_grad()
def _filled(model: Any, sentences: Tensor, place: int) -> list[int]:
    hidden = sentences.clone()
    hidden[:, place] = MASK
    return (model.predict_masked(hidden)[:, place].argmax(-1) == sentences[:, place]).int().tolist()


def compare(options: argparse.Namespace) -> dict[str, tuple[list[str], list[list[str]], Values]]:
    """Train both models and measure them; return columns, rows and values of each table, by its section."""
    task = prepare_text(Text(options.data, vocab_size=VOCAB))
    data = PackedText(task.shards, LENGTH, ROWS, options.seed, options.held_out * LENGTH)
    windows = torch.cat([each["tokens"] for each in data.validation()])[: options.held_out, :LENGTH].long()
    causal, masked = both(VOCAB + 1, SIZES, options.seed)
    rated = add_masking_rates(Rows(lambda step: {"tokens": data.batch(step)["tokens"][:, :LENGTH]}), options.seed)
    steps = [train(causal, causal_language_modeling, data.batch, options.minutes, options.rate)]
    steps.append(train(masked, masked_diffusion, rated.batch, options.minutes, options.rate))
    print(f"steps: {steps}", flush=True)
    counts = torch.bincount(torch.as_tensor(np.asarray(task.shards.tokens, dtype=np.int64)), minlength=VOCAB + 1) + 1.0
    losses = {
        NAMES[0]: causal_losses(causal, windows, -(counts / counts.sum()).log()),
        NAMES[1]: [bound(masked, window, number) for number, window in enumerate(windows)],
    }
    unit, rows = np.log(2) * task.shards.bytes_per_token, []
    for name, count in zip(NAMES, steps, strict=True):
        low, high = (value / unit for value in bootstrap(losses[name]))
        tokens = f"{count * ROWS * LENGTH / 1e6:.2f}"
        rows.append([name, f"{options.minutes:g}", f"{count:,}", tokens, f"{np.mean(losses[name]) / unit:.3f}",
                     f"{low:.3f} to {high:.3f}"])  # fmt: skip
    kept = {name: [round(loss, 4) for loss in each] for name, each in losses.items()}
    columns = ["", "minutes", "steps", "M tokens", "bits per byte", "95% interval"]
    found = {"Masked diffusion": (columns, rows, {"bytes per token": round(task.shards.bytes_per_token, 4), **kept})}
    texts = options.texts
    columns = ["", "passes", "nats per token, left to right", f"different tokens of {WRITTEN}"]
    found["Masked diffusion by steps"] = columns, by_steps(causal, masked, windows, texts), {"texts": texts}
    columns = ["", *(f"{name}, % right" for name in NAMES)]
    found["Masked diffusion in gaps"] = columns, by_gaps(causal, masked, windows, 2 * texts), {"texts": 2 * texts}
    columns = ["", *(f"{name}, % right" for name in NAMES)]
    found["Reversed relations"] = columns, *relations(options.seed, options.minutes / 6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="processor time of each of the two trainings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--data", default="english")
    parser.add_argument("--held-out", type=int, default=200, help="windows of 128 tokens")
    parser.add_argument("--texts", type=int, default=50, help="that are written; twice as many have gaps")
    parser.add_argument("--out", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    command = f"python benchmarks/masked_diffusion.py --minutes {options.minutes:g} --seed {options.seed}"
    for section, (columns, rows, values) in compare(options).items():
        print(f"{section}\n\n| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))
        for row in rows:
            print(f"| {' | '.join(row)} |")
        if options.out:
            write_table(options.out, section, command, columns, rows, values)


if __name__ == "__main__":
    main()
