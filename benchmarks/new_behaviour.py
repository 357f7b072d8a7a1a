"""A new behaviour by LoRA: what SmolLM2 learns from a few hundred answers, on prompts it never saw, and what it
retains.

python benchmarks/new_behaviour.py [--model smollm2] [--shown 320] [--steps 80] [--rank 8] [--asked 40] [--text sotu]
    [--text-windows 2] [--seed 0] [--threads 1] [--out DIR]

Wikipedia's summaries become instructions: "What is X?", answered only by "In short: " and the first sentence. `keifu
train sft --lora.rank` trains on them. Held-out questions of the same kind, and of another ("How do I make X?"), are
then answered greedily by the model before and after. An answer has the new form if it begins with those words, has one
sentence, and ends with an end token. Forgetting is measured by the perplexity on an unrelated text. The adapter is also
merged into the model, and PEFT loads it with transformers' model; the differences of both logits from keifu's are
printed.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _rounds import machine
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.lora.peft import WEIGHTS
from keifu.data.catalogue.readers import Conversation
from keifu.data.chat import conversations
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.perplexity import evaluate
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.translation import sentences
from keifu.layers.lora import merge
from keifu.recipes.assistant import sft
from keifu.recipes.assistant.finetuning import Lora
from keifu.recipes.running import run_jobs

START, LONGEST = "In short: ", 80


def changed(conversation: Conversation) -> Conversation | None:
    """Return the same question with a short answer, or None if the first sentence is very short or very long."""
    question, answer = conversation
    first = sentences(answer["content"])[0].strip()
    if not 40 <= len(first) <= 220:
        return None
    return [question, {**answer, "content": START + first}]


def follows(answer: Any) -> bool:
    """Return whether an answer has the new form."""
    text = answer.text.strip()
    return text.startswith(START.strip()) and len(sentences(text)) == 1 and answer.finish_reason == "stop"


def answers(model: Any, tokenizer: Any, questions: Sequence[Conversation]) -> list[Any]:
    """Return the greedy answer to each question."""
    prompts = [tokenizer.render_chat(each[:1]) for each in questions]
    return generate_batch(model, tokenizer, prompts, SamplingParams(temperature=0, seed=0, max_tokens=LONGEST), 20)


@torch.no_grad()
def logits(model: Any, rows: Tensor) -> Tensor:
    return model(rows).float()


def report(options: argparse.Namespace, folder: Path, asked: dict[str, list[Conversation]]) -> None:
    """Return a table of the model before and after."""
    print("| | " + " | ".join(f"follows, {name}" for name in asked) + f" | perplexity on {options.text} |")
    print(f"|---|{'---:|' * (len(asked) + 1)}", flush=True)
    perplexities = []
    for name, place in {"before": options.model, "after": str(folder / "run")}.items():
        model, tokenizer = checkpoints.load(place, torch.float32)
        merge(model)
        said = {kind: answers(model, tokenizer, questions) for kind, questions in asked.items()}
        with contextlib.redirect_stderr(io.StringIO()):
            found = evaluate(model, tokenizer, EvalRequest(on=options.text, limit=options.text_windows))
        perplexities.append(found.figures["perplexity"])
        shares = " | ".join(f"{sum(map(follows, each))}/{len(each)}" for each in said.values())
        print(f"| {name} | {shares} | {perplexities[-1]:.2f} |", flush=True)
        for kind, questions in asked.items():
            print(f"  {questions[0][0]['content']} -> {said[kind][0].text.strip()[:200]!r}", flush=True)
    print(f"\nPerplexity: {perplexities[1] / perplexities[0] - 1:+.2%}")


def compared(options: argparse.Namespace, folder: Path, asked: Sequence[Conversation]) -> None:
    """Compare logits with separate adapters, with merged ones, and with those loaded by PEFT."""
    model, tokenizer = checkpoints.load(folder / "run", torch.float32)
    rows = torch.tensor([tokenizer.render_chat(asked[0])])
    beside = logits(model, rows)
    size = (folder / "run" / WEIGHTS).stat().st_size / 1e6
    inside = (logits(merge(model), rows) - beside).abs().max() / beside.abs().max()
    print(f"The adapter has {size:.2f} MB; worked into the model it gives logits {float(inside):.1e} apart.")
    try:
        import peft
        import transformers
    except ImportError:
        print("PEFT is not installed, so it was not asked.")
        return
    checkpoints.convert(options.model, folder / "hf", "hf")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder / "run").eval()
    with torch.no_grad():
        apart = (theirs(rows).logits - beside).abs().max() / beside.abs().max()
    print(f"PEFT {peft.__version__} loads it and gives logits {float(apart):.1e} apart.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "shown": 320, "steps": 80, "rank": 8, "asked": 40, "text-windows": 2, "seed": 0, "threads": 1, "batch": 8
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="sotu", help="of the catalogue, whose held-out part is measured")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    made = [found for each in conversations.read("summary-instructions") if (found := changed(each))]
    step = len(made) // (options.shown + options.asked)
    spread = made[::step]
    shown, held = spread[: options.shown], spread[options.shown : options.shown + options.asked]
    dishes = [*conversations.read("recipe-instructions")]
    asked = {
        '"What is X?"': held,
        '"How do I make X?"': [dishes[i * len(dishes) // options.asked] for i in range(options.asked)],
    }
    lines = "".join(json.dumps({"messages": each}, ensure_ascii=False) + "\n" for each in shown)
    (folder / "shown.jsonl").write_text(lines, encoding="utf-8")
    told = f"{len(shown)} answers shown, {options.steps} steps of {options.batch} rows, rank {options.rank}"
    print(f"{machine()}; {told}")
    recipe = sft.Recipe(
        options.model, str(folder / "shown.jsonl"), context_length=256, lora=Lora(options.rank), held_out=0.0,
        steps=options.steps, batch_size=options.batch, packed=False, learning_rate=options.rate, seed=options.seed,
    )  # fmt: skip
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run_jobs(sft.jobs(recipe), folder / "run")
    print(f"Learned in {time.perf_counter() - start:.0f} s.\n", flush=True)
    report(options, folder, asked)
    compared(options, folder, held)


if __name__ == "__main__":
    main()
