"""Direct preference optimisation (DPO; Rafailov et al., 2023) on pairs of a chosen and a rejected response.

Paper: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model": β 0.1, batches of 64 pairs, a
rate of 1e-6 and a warm-up of 150 steps there. The log-probabilities of the reference model are computed once, before
the first step, so no second model stays in memory. `--loss ipo`, `robust` and `normalised` are common variants. SimPO
(Meng et al., 2024) and ORPO (Hong et al., 2024) need no reference model; KTO (Ethayarajh et al., 2024) needs no pairs.
Command: keifu train dpo --model runs/sft --data preferences.jsonl
Cost: printed before it starts, measured on the machine.
Expected: see docs/results.md, "InstructGPT's pipeline".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keifu.alignment.dpo import WITHOUT_REFERENCE, Loss, MarkedAnswers, dpo, kto, reference
from keifu.data.chat.packing import TurnMasks
from keifu.data.chat.preferences import Pair, PreferencePairs, RankedResponses, stack_rows
from keifu.data.progress import counting
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.layers.lora import unadapted
from keifu.processes import current
from keifu.ranges import BelowOne, Count, NotNegative
from keifu.recipes.assistant import finetuning
from keifu.recipes.options import value_or
from keifu.training.job import Job, Jobs, RunFacts
from keifu.training.loader import on_device
from keifu.training.protocols import Objective
from keifu.training.trainer import ObjectiveModule

PAPERS = {"simpo": "Meng et al., SimPO", "orpo": "Hong et al., ORPO", "kto": "Ethayarajh et al., KTO"}  # 2024


@dataclass(frozen=True, kw_only=True)
class Recipe(finetuning.RankedOptions):
    """Options of the run."""

    data: str = field(default="preferences.jsonl", kw_only=False)
    """A .jsonl or .json file: prompt, chosen and rejected; or prompt and answers, the best first; or for kto prompt,
    completion and label, true or false; or chitchat-preferences, talks that their speakers rated 3 of 10 apart or more.
    """
    loss: Loss = "dpo"
    """dpo, robust (for noisy labels), ipo, or normalised by the lengths of the responses; simpo or orpo, which need no
    reference model; kto, which learns whether single answers are good or bad."""
    beta: NotNegative | None = None
    """Strength β of the KL constraint: a larger one keeps the policy closer to the reference model. Of simpo the factor
    of the margin, of orpo the weight of the odds. Unset: 0.1, for simpo 2."""
    margin: NotNegative | None = None
    """Margin γ by which simpo wants the better answer to lead; unset: 1."""
    label_smoothing: BelowOne = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round, for dpo, robust, normalised and simpo."""
    batch_size: Count = 16
    """Pairs in a step."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 1e-6, and 2e-5 for adapters."""
    warmup: NotNegative = 0.1
    """Share of the steps in which the learning rate rises from 0."""

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise UserError(f"beta must be more than 0, not {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}.")
        if self.label_smoothing and self.loss in ("ipo", "orpo", "kto"):
            raise UserError(f"The loss {self.loss} has no label_smoothing: leave it out, or choose --loss robust.")
        if self.margin is not None and self.loss != "simpo":
            raise UserError(f"The loss {self.loss} has no margin: leave it out, or choose --loss simpo.")

    @property
    def strength(self) -> float:
        """β: the option or its default."""
        return value_or(self.beta, 2.0 if self.loss == "simpo" else 0.1)

    def losses(self) -> tuple[Objective, dict[str, Any]]:
        """Return the objective, and the options that affect it."""
        if self.loss == "kto":
            return partial(kto, beta=self.strength), {"loss": "kto", "beta": self.strength}
        options = {"loss": self.loss, "beta": self.strength, "label_smoothing": self.label_smoothing}
        options |= {"margin": value_or(self.margin, 1.0)} if self.loss == "simpo" else {}
        return partial(dpo, **options), options


def prepare(recipe: Recipe) -> finetuning.RankedTask:
    """Load the model, read the preferences, and compute the log-probabilities of the reference model."""
    model, tokenizer = finetuning.open_model(recipe.model, recipe.template)
    length = finetuning.row_length(model, recipe.context_length)
    (learned, tested), good, dropped = examples(recipe, tokenizer, length)
    rows, pad = recipe.batch_size, tokenizer.pad_id or 0
    model = finetuning.to_train(model, recipe.lora, recipe.seed)
    if recipe.loss in WITHOUT_REFERENCE:
        references = torch.zeros(len(learned), 2), torch.zeros(len(tested), 2)
    else:
        references = with_reference(model, learned, rows, pad), with_reference(model, tested, rows, pad)
    prepared = learned, tested, rows, recipe.seed, pad, references
    data = MarkedAnswers(model, (good[0], good[1]), *prepared) if good else PreferencePairs(*prepared)
    return finetuning.RankedTask(model, tokenizer, data, dropped)


def examples(recipe: Recipe, tokenizer: Tokenizer, length: int) -> tuple[list[list[Pair]], list[Tensor], int]:
    """Return training and held-out pairs, the labels of KTO's answers, and the number of examples that are too long."""
    if recipe.loss != "kto":
        make, message = partial(pairs, tokenizer), ("pairs are", "has ")
        learned, tested, dropped = finetuning.ranked_examples(recipe, make, tuple, length, message)
        return [learned, tested], [], dropped
    *parts, dropped = finetuning.ranked_examples(
        recipe, lambda ranked: marked(tokenizer, ranked), lambda one: [one.turns], length, ("answers are", "has "), True
    )
    good = [torch.tensor([answer.good for answer in part]) for part in parts]
    return [with_others(part, length) for part in parts], good, dropped


def pairs(tokenizer: Tokenizer, ranked: RankedResponses) -> list[Pair]:
    """Return every pair of a better and a worse answer, as ids."""
    turns = [finetuning.sample_answer(tokenizer, ranked, index) for index in range(len(ranked.answers))]
    return [Pair(turns[better], turns[worse]) for better, worse in ranked.pairs()]


class Marked(NamedTuple):
    """Answer after its prompt. label: 1 if it is good, else 0."""

    turns: TurnMasks
    good: float


def marked(tokenizer: Tokenizer, ranked: RankedResponses) -> list[Marked]:
    """Return every answer with its label."""
    turns = [finetuning.sample_answer(tokenizer, ranked, index) for index in range(len(ranked.answers))]
    return [Marked(*pair) for pair in zip(turns, map(float, ranked.marks()), strict=True)]


def with_others(marked: Sequence[Marked], length: int) -> list[Pair]:
    """Pair each answer with the answer to the next other prompt, placed after the former's prompt and cut to
    `length`."""
    prompts = [answer.turns.ids[: answer.turns.last_answer] for answer in marked]
    pairs = []
    for i, (answer, prompt) in enumerate(zip(marked, prompts, strict=True)):
        following = (index % len(marked) for index in range(i + 1, i + len(marked)))
        other = marked[next((index for index in following if prompts[index] != prompt), i)].turns
        ids = [*prompt, *other.ids[other.last_answer :]]
        learned = [False] * len(prompt) + other.learned[other.last_answer :]
        pairs.append(Pair(answer.turns, TurnMasks(ids[:length], learned[:length])))
    return pairs


def with_reference(model: nn.Module, pairs: Sequence[Pair], batch_size: int, pad_id: int) -> Tensor:
    """Return the log-probabilities of both answers of each pair, [pairs, 2], under the untrained model.

    Answers of similar length are computed together. If processes share the model, each computes a part.
    """
    module = current().split(ObjectiveModule(model))
    order = sorted(range(len(pairs)), key=lambda index: max(len(turns.ids) for turns in pairs[index]))
    values = torch.zeros(len(pairs), 2)
    with counting("Reading the answers", len(pairs), "pairs") as progress, unadapted(model):
        for at in range(0, len(order), batch_size):
            indices = order[at : at + batch_size]
            batch = on_device(stack_rows([pairs[index] for index in indices], pad_id), next(model.parameters()).device)
            values[indices] = module(reference, batch).cpu()
            progress(min(at + batch_size, len(order)))
    current().discard_gradients(module)  # FSDP keeps some whole weights after a forward pass
    return values


def job_of(recipe: Recipe, task: finetuning.RankedTask) -> Job:
    """Return the training of the task's model."""
    # float32: differences of log-probabilities are smaller than the rounding of bfloat16
    different: dict[str, Any] = {"schedule": "linear", "final_ratio": 0.0, "precision": "float32"}
    settings = finetuning.epoch_settings(recipe, task.data, (1e-6, 2e-5), **different)
    unit = "answers" if recipe.loss == "kto" else "pairs"
    objective, options = recipe.losses()
    facts = RunFacts(
        title=f"{recipe.model} learns what is preferred in “{Path(recipe.data).stem}”",
        about={"paper": PAPERS.get(recipe.loss, "Rafailov et al., Direct Preference Optimization (2023)")},
        data=finetuning.counted(unit, task.data.parts, task.dropped),
        options=options,
        unit=unit,
    )
    return finetuning.finetuning_job(recipe, task, objective, settings, facts)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu chat reads; print the accuracy on held-out answers."""
    task = prepare(recipe)
    if task.dropped:
        print(f"{task.dropped:,} examples are longer than a row and were left out.")
    summary = yield job_of(recipe, task)
    if (right := summary.figures.get("validation_accuracy")) is not None:
        pairs = "In held-out pairs the better answer has the higher reward in"
        marks = "Held-out answers are on the right side of the reference point in"
        print(f"{marks if recipe.loss == 'kto' else pairs} {right:.1%}.")
    finetuning.show_folder(summary)
