"""Demonstration: pretrained models are shown, a LLaMA-type model learns English, and a published model answers.

Papers: Touvron et al. (2023) for the model that is trained; SmolLM2 (Allal et al., 2025) for the one that answers.
Command: keifu demo
Cost: about 180 MB of downloads the first time, then about 3 minutes on 2 cores.
Expected: a validation loss well below the bigram baseline that is printed next to it, and "Paris".

What the models answer is compared with known answers. If one differs, the demonstration ends with an error that names
the model, because the machine may compute wrongly.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.errors import UserError, shell
from keifu.evaluation.text.perplexity import bigram_loss
from keifu.files import write_atomic
from keifu.inference.chat.conversation import Conversation
from keifu.inference.text.likelihood import ScoredPair, likelihoods
from keifu.models import llama
from keifu.ranges import Count
from keifu.recipes import landmarks
from keifu.recipes.language import gpt
from keifu.recipes.language.pretraining import VALIDATION_TOKENS, pretraining_job
from keifu.training.job import Computation, Jobs

CAPITALS = {"What is the capital of France?": "Paris", "What is the capital of Japan?": "Tokyo"}
# a conversation that chat-en's teacher wrote and that is not in its training data, and the largest loss of the answer
HELD_OUT_QUESTION, HELD_OUT_ANSWER = "Hi.", "Hi, welcome to the chat. What can I help you with?"
HIGHEST_LOSS = 1.5  # nats per token; it is about 0.61 with each instruction set, and a guess is 8.7


@dataclass(frozen=True)
class Recipe:
    """Options of the demonstration."""

    data: str = "english"
    """The text to learn from."""
    steps: Count = 260
    """Updates of the weights."""


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training between the other parts of the demonstration; print the requirements and results of each."""
    began = time.monotonic()
    print("\n1. Landmarks, in small models that these recipes trained before.", flush=True)
    pictures, differing_models = landmarks.show()
    yield Computation(partial(write_pictures, pictures))
    dial = gpt.Recipe(depth=4, data=recipe.data, steps=recipe.steps, vocab_size=4096, context_length=256, batch_size=16)
    task, config, settings = gpt.prepare(dial)
    settings = replace(settings, evaluate_every=130, sample_every=130, save_every=0)
    baseline = bigram_loss(task.shards.tokens, task.shards.validation[:VALIDATION_TOKENS], task.tokenizer.vocab_size)
    print(f"\n2. A LLaMA-type model of {gpt.parameters(config) / 1e6:.1f} M parameters learns {recipe.data}.")
    job = pretraining_job("demo", task, llama.build, config, settings, prompt="The President")
    about = {**job.facts.about, "bigram baseline (nats per token)": round(baseline, 3)}
    summary = yield replace(job, facts=replace(job.facts, about=about))
    out = summary.directory
    loss, bits = summary.figures["validation_loss"], task.shards.bits_per_byte
    print(f"   validation loss {loss:.3f} nats per token ({bits(loss):.3f} bits per byte)")
    print(f"   bigram baseline {baseline:.3f} nats per token ({bits(baseline):.3f} bits per byte)")
    print(f"   Report: {out / 'report.html'}")
    if recipe.steps >= Recipe.steps and loss >= baseline:
        differing_models.append("the model that was trained here")
    print("\n3. SmolLM2-135M-Instruct, read from its published GGUF file, answers.", flush=True)
    answers = _ask("smollm2", *CAPITALS)
    if not all(capital in answer for capital, answer in zip(CAPITALS.values(), answers, strict=True)):
        differing_models.append("smollm2")
    if catalogue.is_cached("chat-en", catalogue.MODELS):
        print("   chat-en learned from SmolLM2, not from this question, and often misses the point:", flush=True)
        _ask("chat-en", "My umbrella is broken. What should I do?")
        if held_out_loss("chat-en") > HIGHEST_LOSS:
            differing_models.append("chat-en")
    if differing_models:
        raise UserError(
            f"The answers of {', '.join(differing_models)} are not the known ones: this machine computes wrongly, or a "
            "model's file is damaged. Compare with KEIFU_NATIVE=portable keifu demo, and report both outputs."
        )
    print(f"\nDone in {time.monotonic() - began:.0f} s. Next:")
    print(f'   keifu generate {shell(out)} "The President of the United States"')
    print('   keifu chat smollm2 "What is the capital of Germany?"')
    print(f"   keifu serve {shell(out)} smollm2    # both at http://127.0.0.1:8000, for people and for programs")
    print("   keifu train gpt --depth 4 --data FILE-OR-FOLDER-OF-YOUR-OWN")
    print("   keifu lineage    # the landmarks in order of years, what each brought, and how to repeat it")


def write_pictures(pictures: Mapping[str, bytes], out: Path) -> None:
    """Write each picture as PNG into the folder, for the report."""
    for name, picture in pictures.items():
        write_atomic(out / f"{name.replace(' ', '_')}.png", picture)


def held_out_loss(name: str) -> float:
    """Return the loss of the held-out answer in nats per token, computed as answers are."""
    model, tokenizer = checkpoints.load(name)
    prompt = tokenizer.render_chat([{"role": "user", "content": HELD_OUT_QUESTION}])
    [likelihood] = likelihoods(model, [ScoredPair(tuple(prompt), tuple(tokenizer.encode(HELD_OUT_ANSWER)))])
    return -likelihood.total / len(likelihood.log_probabilities)


def _ask(name: str, *questions: str) -> list[str]:
    """Print a model's answer to each question, and return the answers."""
    model, tokenizer = checkpoints.load(name)
    answers: list[str] = []
    for question in questions:
        answers.append("")
        print(f"   > {question}\n   ", end="", flush=True)
        for piece in Conversation(model, tokenizer).reply(question, seed=0, max_tokens=60):
            answers[-1] += piece
            print(piece.replace("\n", "\n   "), end="", flush=True)
        print()
    return answers
