"""Supervised fine-tuning of a language model on conversations (Ouyang et al., 2022, section 3.5).

Paper: "Training language models to follow instructions with human feedback": 16 epochs there, a cosine to a tenth, no
warm-up. The loss is on the tokens of the assistant's turns alone, their end-of-turn token included; conversations are
packed into rows in which none attends to another. `--lora.rank` trains low-rank adapters (Hu et al.,
2021) instead of the model. With `--distill.teacher` the student learns all probabilities of a larger model with the
same tokenizer, on the given answers or on its own (GKD, Agarwal et al., 2023).
Command: keifu train sft --model smollm2 --data summary-instructions --lora.rank 8
Cost: printed before it starts, measured on the machine.
Expected: see docs/results.md, "A new behaviour for SmolLM2 by LoRA".
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from keifu.alignment.distillation import StudentAnswers
from keifu.data.chat import conversations
from keifu.data.chat.conversations import Conversation
from keifu.data.chat.packing import FittedConversations, PackedConversations, TooLong, TurnMasks, fit_conversations
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat.conversation import Conversation as Talk
from keifu.ranges import BelowOne, Count, NotNegative
from keifu.recipes.assistant import finetuning
from keifu.recipes.distilling import DistillAnswers
from keifu.training.job import Job, Jobs, RunFacts
from keifu.training.protocols import Objective

PAPER = "Ouyang et al., InstructGPT (2022), section 3.5"
SAMPLES = 3
SAMPLE_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class Recipe(finetuning.AssistantOptions):
    """Options of the run."""

    data: str = field(default="summary-instructions", kw_only=False)
    """A .jsonl or .json file of conversations (OpenAI messages, ShareGPT, Alpaca, prompt and response), or a name:
    chitchat, chatterbot, summary-instructions, recipe-instructions, translation-instructions, arithmetic-instructions.
    """
    limit: Count | None = None
    """Most conversations, spread over all."""
    context_length: Count | None = None
    """Tokens of a row; unset: 1024, or the context length of the model if that is less."""
    too_long: TooLong = "error"
    """Treatment of a conversation longer than a row: an error, drop it, or truncate it at its end."""
    packed: bool = True
    """Pack several conversations into a row; none attends to another."""
    held_out: BelowOne = 0.05
    """Share of the conversations that is kept for validation, chosen by a hash of the text."""
    batch_size: Count = 8
    """Rows in a step."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 2e-5, and 2e-4 for adapters."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, of matrices alone."""
    warmup: NotNegative = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    distill: DistillAnswers = field(default_factory=DistillAnswers)
    """Teacher that the model learns from."""


@dataclass(frozen=True, eq=False)
class SFTTask(finetuning.FinetuneTask):
    """Model, its tokenizer with a chat template, the rows and their conversations, and the questions for samples."""

    training: FittedConversations
    held_out: FittedConversations
    sample_conversations: list[Conversation]
    objective: Objective


def prepare(recipe: Recipe) -> SFTTask:
    """Load the model, read the conversations and render them."""
    return make_task(recipe, *finetuning.open_model(recipe.model, recipe.template))


def make_task(recipe: Recipe, model: Any, tokenizer: Tokenizer) -> SFTTask:
    """Read the conversations and render them for this model."""
    length = finetuning.row_length(model, recipe.context_length)
    objective, distill = recipe.distill.objective(tokenizer, length, model), recipe.distill
    training, unseen = split(select_conversations(list(conversations.read(recipe.data)), recipe.limit), recipe.held_out)
    print(f"Tokenising {len(training) + len(unseen):,} conversations ...", file=sys.stderr)
    sides = ([TurnMasks(*tokenizer.render_turns(chat)) for chat in part] for part in (training, unseen))
    learned, tested = (fit_conversations(side, length, recipe.too_long) for side in sides)
    rows, pad = (learned.fitting, tested.fitting), tokenizer.pad_id or 0
    model = finetuning.to_train(model, recipe.lora, recipe.seed)
    distillation_arguments = model, tokenizer, distill.on_policy, distill.max_tokens
    data = partial(StudentAnswers, *distillation_arguments) if distill.on_policy else PackedConversations
    data = data(*rows, length, recipe.batch_size, recipe.seed, pad, recipe.packed)
    return SFTTask(model, tokenizer, data, learned, tested, unseen[:SAMPLES], objective)


def select_conversations(chats: list[Conversation], limit: int | None) -> list[Conversation]:
    """Return at most `limit` evenly spaced conversations."""
    if limit is not None and limit < 2:
        raise UserError(f"limit is {limit}, and at least 2 conversations are needed.")
    return chats if limit is None or limit >= len(chats) else [chats[i * len(chats) // limit] for i in range(limit)]


def split(chats: Sequence[Conversation], share: float) -> tuple[list[Conversation], list[Conversation]]:
    """Split the conversations into training and held-out ones by the user's first message, so that no question is on
    both sides."""
    questions = [next(turn["content"] for turn in chat if turn["role"] == "user") for chat in chats]
    return finetuning.held_out(chats, questions, share)


def job_of(recipe: Recipe, task: SFTTask, title: str | None = None, paper: str = PAPER) -> Job:
    """Return the training of the task's model; print the number of conversations that are too long.

    title, paper: for the report.
    """
    for part in (task.training, task.held_out):
        if said := part.sentence(task.data.context_length):
            print(said)
    often = max(1, recipe.total_steps(task.data.steps_per_epoch) // 3)
    settings = finetuning.epoch_settings(
        recipe, task.data, (2e-5, 2e-4), sample_every=often, weight_decay=recipe.weight_decay
    )
    facts = RunFacts(
        title=title or f"{recipe.model} learns to answer from “{Path(recipe.data).stem}”",
        about={"paper": paper},
        data={
            "learned from": len(task.training.fitting),
            "held out": len(task.held_out.fitting),
            "too long, left out": task.training.dropped,
            "too long, cut": task.training.shortened,
        },
        options={"template": task.tokenizer.chat_template, **recipe.distill.options()},
    )
    return finetuning.finetuning_job(recipe, task, task.objective, settings, facts, lambda step: answers(task))


def answers(task: SFTTask) -> str:
    """Return the model's answers to the first held-out questions."""
    lines = []
    for conversation in task.sample_conversations:
        question = next(message["content"] for message in conversation if message["role"] == "user")
        talk = Talk(task.model, task.tokenizer)
        said = "".join(talk.reply(question, max_tokens=SAMPLE_TOKENS, seed=0))
        lines.append(f"{question}\n> {said}" + ("" if talk.finish_reason == "stop" else " ..."))
    return "\n\n".join(lines)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the fine-tuning, whose result keifu chat reads."""
    finetuning.show_folder((yield job_of(recipe, prepare(recipe))))
