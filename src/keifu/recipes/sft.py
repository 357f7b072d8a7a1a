"""Supervised fine-tuning: a language model learns to answer, from conversations (Ouyang et al., 2022, section 3.5).

Paper: "Training language models to follow instructions with human feedback": 16 epochs there, a cosine to a tenth, no
warm-up. What is learned is what the assistant says, the token that ends its turn included; conversations are packed
into rows in which none sees another. `--lora.rank` trains low-rank adapters (Hu et al., 2021) in place of the model.
Command: keifu train sft --model smollm2 --data summary-instructions --lora.rank 8
Cost: printed before it starts, measured on the machine.
Expected: see docs/results.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from keifu import checkpoints
from keifu.checkpoints.adapters import adapt, low, save_adapter
from keifu.data import conversations
from keifu.data.chat import CHATML, PLAIN
from keifu.data.conversation_batches import Fitted, PackedConversations, TooLong, Turns, fitted
from keifu.data.conversations import Conversation
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.chat import Conversation as Talk
from keifu.generation.decoding import causal as causal_model
from keifu.recipes._language import whom_to_thank
from keifu.training.loop import Summary, train
from keifu.training.objectives import causal
from keifu.training.protocols import Run
from keifu.training.settings import Settings

TEMPLATES = {"plain": PLAIN, "chatml": CHATML}
SAMPLES = 3


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in place of the whole model."""

    rank: int = 0
    """Of each adapter; 0 trains the whole model."""
    alpha: float = 16.0
    """The adapter's product is multiplied with alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Ends of the names of layers as the model's files call them, such as q_proj v_proj; all-linear: every one."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    dora: bool = False
    """Learn the length of each row apart from its direction (Liu et al., 2024)."""


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    model: str = "smollm2"
    """What is fine-tuned: a run, a directory, a .gguf file, a catalogue name or a hub id."""
    data: str = "summary-instructions"
    """A .jsonl or .json file of conversations (OpenAI messages, ShareGPT, Alpaca, prompt and response), or a name:
    chitchat, chatterbot, summary-instructions, recipe-instructions, translation-instructions."""
    limit: int | None = None
    """At most so many conversations, spread over all."""
    template: Literal["own", "plain", "chatml"] = "own"
    """The chat template; own: the tokenizer's, or plain where it has none, which needs no token but the end of text."""
    context_length: int | None = None
    """Tokens of a row; unset: 1024, or all that the model takes where that is less."""
    too_long: TooLong = "error"
    """What happens to a conversation longer than a row: an error, drop it, or truncate it at its end."""
    packed: bool = True
    """Put several conversations into a row; none sees another."""
    held_out: float = 0.05
    """Share of the conversations that is kept for validation, chosen by a hash of the text."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters."""
    epochs: float = 1.0
    """How often every conversation is seen."""
    steps: int | None = None
    """Updates of the weights, in place of epochs."""
    batch_size: int = 8
    """Rows in a step."""
    micro_batch: int | None = None
    """Rows computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest rate; unset: 2e-5, and 2e-4 for adapters."""
    weight_decay: float = 0.0
    """How strongly AdamW pulls matrices towards zero."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises from 0."""
    seed: int = 0
    """Of the adapters, the order of the rows and dropout."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything made ready: the model, its tokenizer with a chat template, the rows, and what was too long."""

    model: nn.Module
    tokenizer: Tokenizer
    training: Fitted
    held: Fitted
    shown: list[Conversation]
    context_length: int


def prepare(recipe: Recipe) -> Task:
    """Loads the model, reads the conversations and renders them."""
    model, tokenizer = checkpoints.load(recipe.model)
    room = causal_model(model).config.context_length
    if tokenizer is None:
        raise UserError(f"{recipe.model} has no tokenizer, so it cannot read a conversation.")
    length = recipe.context_length or min(1024, room)
    if length > room:
        raise UserError(f"A row of {length} tokens does not fit this model's context of {room}: choose a smaller one.")
    tokenizer = templated(tokenizer, recipe.template)
    training, held = split(chosen(list(conversations.read(recipe.data)), recipe.limit), recipe.held_out)
    rows = (fitted([Turns(*tokenizer.render_turns(each)) for each in part], length, recipe.too_long)
            for part in (training, held))  # fmt: skip
    torch.manual_seed(recipe.seed)
    if recipe.lora.rank:
        adapt(model, recipe.lora.targets, lora_of(recipe.lora))
    else:
        model = model.float()
        for parameter in model.parameters():  # a file's memory map must stay as it is
            parameter.data = parameter.data.clone()
    return Task(model, tokenizer, *rows, held[:SAMPLES], length)


def lora_of(chosen: Lora) -> Any:
    """The adapters' settings, checked."""
    return low(chosen.rank, chosen.alpha, chosen.dropout, chosen.dora)


def templated(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with the template that was chosen; one whose tokens it lacks is a `UserError`."""
    if template == "own":
        template = "plain"
        if tokenizer.chat_template:
            return tokenizer
    if template == "plain" and tokenizer.eos_id is None:
        raise UserError("This tokenizer has no end-of-text token, so no turn could end: take another model.")
    if template == "chatml":
        tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    return tokenizer.with_chat_template(TEMPLATES[template])


def chosen(found: list[Conversation], limit: int | None) -> list[Conversation]:
    """At most so many of them, at even distances."""
    if limit is not None and limit < 2:
        raise UserError(f"limit is {limit}, and at least 2 conversations are needed.")
    return found if limit is None or limit >= len(found) else [found[i * len(found) // limit] for i in range(limit)]


def split(found: Sequence[Conversation], share: float) -> tuple[list[Conversation], list[Conversation]]:
    """To learn from, and held out; by what they begin with, so that the same question is never on both sides."""
    if not 0 <= share < 1:
        raise UserError(f"held_out is a share from 0 up to below 1, and it is {share}.")
    keys = [hashlib.sha256(each[0]["content"].strip().lower().encode()).digest() for each in found]
    bound = sorted({*keys})[: round(share * len({*keys}))]
    held = {*bound}
    return ([each for key, each in zip(keys, found, strict=True) if key not in held],
            [each for key, each in zip(keys, found, strict=True) if key in held])  # fmt: skip


def settings(recipe: Recipe, steps_per_epoch: float) -> Settings:
    """The training loop's settings for so many steps an epoch."""
    steps = recipe.steps or max(1, round(recipe.epochs * steps_per_epoch))
    return Settings(
        steps=steps,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        learning_rate=recipe.learning_rate or (2e-4 if recipe.lora.rank else 2e-5),
        warmup=round(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.999),
        evaluate_every=max(1, steps // 5),
        sample_every=max(1, steps // 3),
        save_every=max(1, steps // 10),
        seed=recipe.seed,
    )


def learn(recipe: Recipe, task: Task, out: Path, resume: bool = False) -> Summary:
    """Trains the task's model into a run folder: a whole model, or adapters beside the name of their base."""
    pad = task.tokenizer.pad_id or 0
    rows = (task.training.kept, task.held.kept)
    data = PackedConversations(*rows, task.context_length, recipe.batch_size, recipe.seed, pad, recipe.packed)

    def save(directory: Path) -> None:
        if recipe.lora.rank:
            save_adapter(task.model, directory, base_name(recipe.model))
            task.tokenizer.save(directory)
        else:
            checkpoints.save(task.model, task.tokenizer, directory)

    return train(
        task.model,
        causal,
        data,
        settings(recipe, data.steps_per_epoch),
        described(recipe, task, out, resume),
        sample=lambda step: answers(task),
        save=save,
        largest=data.largest(),
    )


def base_name(model: str) -> str:
    """Where the base of adapters is to be had: a path in full, or a name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def answers(task: Task) -> str:
    """What the model says to the first questions that were held out."""
    told = []
    for conversation in task.shown:
        asked = next(message["content"] for message in conversation if message["role"] == "user")
        talk = Talk(task.model, task.tokenizer)
        said = "".join(talk.reply(asked, max_tokens=80, temperature=0.0))
        told.append(f"{asked}\n> {said}" + ("" if talk.finish_reason == "stop" else " ..."))
    return "\n\n".join(told)


def described(recipe: Recipe, task: Task, out: Path, resume: bool) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    kept = {"learned from": len(task.training.kept), "held out": len(task.held.kept)}
    gone = {"too long, left out": task.training.dropped, "too long, cut": task.training.shortened}
    return Run(
        directory=out,
        resume=resume,
        options={"begins with": recipe.model, "lora": asdict(recipe.lora), "template": task.tokenizer.chat_template},
        about={
            "title": f"{recipe.model} learns to answer from “{Path(recipe.data).stem}”",
            "paper": "Ouyang et al., InstructGPT (2022), section 3.5",
            "data": [{"source": recipe.data} | kept | gone | whom_to_thank(recipe.data)],
        },
        unit="tokens",
        how_to_resume=f"keifu train sft --out {out} --resume, with the options of this run",
    )


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Fine-tunes into `out`, which keifu chat reads afterwards."""
    task = prepare(recipe)
    for part in (task.training, task.held):
        if said := part.sentence(task.context_length):
            print(said)
    learn(recipe, task, out, resume)
    print(f"The model is in {out}: keifu chat {out}.")
