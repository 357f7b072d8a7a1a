"""A reward model, which scores responses, trained on ranked responses (Ouyang et al., 2022, section 3.5).

Paper: "Training language models to follow instructions with human feedback": 4 to 9 ranked answers of each of 64
prompts in a step, one epoch, a rate of 9e-6 there. All pairs of a prompt are one element of the loss. At the end a bias
makes the mean score of the demonstrations zero; without a file of demonstrations, that of the best answers in the
rankings.
Command: keifu train reward --model runs/sft --data preferences.jsonl
Cost: printed before it starts, measured on the machine.
Expected: see docs/results.md, "InstructGPT's pipeline".
"""

import copy
import json
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from keifu import checkpoints
from keifu.alignment.reward_model import Calibration, calibration, margins, ranking_loss, scores_of
from keifu.data.chat import conversations
from keifu.data.chat.preferences import RankedAnswers, RankedResponses, Ranking
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError
from keifu.files import write_atomic
from keifu.layers.lora import merge
from keifu.models import task_head
from keifu.processes import current
from keifu.ranges import Count, NotNegative, Positive
from keifu.recipes.assistant import finetuning
from keifu.training.job import Job, Jobs, RunFacts
from keifu.training.run.report import CURVES

DEMONSTRATIONS = 256  # maximal number of demonstrations for computing the bias


@dataclass(frozen=True, kw_only=True)
class Recipe(finetuning.RankedOptions):
    """Options of the run."""

    data: str = field(default="preferences.jsonl", kw_only=False)
    """A .jsonl or .json file: prompt and answers, the best first, or with scores, where equal ones are as good;
    or prompt, chosen and rejected; or chitchat-preferences, talks that their speakers rated 3 of 10 apart or more."""
    demonstrations: str | None = None
    """Conversations whose mean score is made zero, as keifu train sft reads them; unset: the best answers."""
    lora: finetuning.Lora = field(default_factory=finetuning.Lora)
    """Low-rank adapters, merged into the model in the end."""
    epochs: Positive = 1.0
    """Passes over the training examples; more than one overfits (section C.2)."""
    batch_size: Count = 8
    """Prompts in a step."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 9e-6, and 1e-4 for adapters."""


@dataclass(frozen=True, eq=False)
class RewardTask(finetuning.RankedTask):
    """A model with a score head to train, its tokenizer, the rankings, and the demonstrations as ids."""

    demonstrations: list[list[int]]


def prepare(recipe: Recipe) -> RewardTask:
    """Load the model, add a head, and read the rankings."""
    require_whole()
    model, tokenizer = finetuning.open_model(recipe.model, recipe.template)
    length = finetuning.row_length(model, recipe.context_length)
    make, reason = partial(rankings, tokenizer), ("prompts have an answer", "")
    learned, tested, dropped = finetuning.ranked_examples(recipe, make, attrgetter("answers"), length, reason)
    demonstration_ids = demonstrations(recipe.demonstrations, tokenizer, length) or [
        ranking.answers[0].ids for ranking in learned
    ]
    tokenizer = finetuning.padding(tokenizer, demonstration_ids)
    data = RankedAnswers(learned, tested, recipe.batch_size, recipe.seed, tokenizer.pad_id or 0)
    model = with_score_head(model, recipe.lora, recipe.seed)
    return RewardTask(model, tokenizer, data, dropped, demonstration_ids[:DEMONSTRATIONS])


def require_whole() -> None:
    """Raise `UserError` for a model that is split over processes, because its bias is computed from its scores."""
    if not current().is_replicated:
        raise UserError("A reward model is trained whole on each process: leave out --mesh.shard and --mesh.tensor.")


def with_score_head(decoder: Any, lora: finetuning.Lora, seed: int) -> task_head.ModelWithHead:
    """Return the decoder, or adapters on it, with a new score head, ready for training."""
    config = task_head.Config(decoder.config, "score", ("reward",), classifier_dropout=0.0)
    finetuning.to_train(decoder, lora, seed)
    model = task_head.add_head(decoder, config).to(choose())
    if decoder.head is not None:
        decoder.head.requires_grad_(False)  # the language model head is not used
    return model


def rankings(tokenizer: Tokenizer, ranked: RankedResponses) -> list[Ranking]:
    """Return the one ranking of the answers with their prompt. None is truncated, because the score is read after the
    last token."""
    turns = [finetuning.sample_answer(tokenizer, ranked, index) for index in range(len(ranked.answers))]
    return [Ranking([turn._replace(learned=[True] * len(turn.ids)) for turn in turns], list(ranked.levels))]


def demonstrations(source: str | None, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Return the conversations that fit into the context, as ids; empty if there is no file of them."""
    rendered = [tokenizer.render_turns(chat)[0] for chat in conversations.read(source)] if source else []
    short = [ids for ids in rendered if len(ids) <= length]
    if rendered and not short:
        raise UserError(f"No demonstration in {source} fits a row of {length} tokens.")
    return short


def job_of(recipe: Recipe, task: RewardTask) -> Job:
    """Return the training of the task's model."""
    settings = finetuning.epoch_settings(recipe, task.data, (9e-6, 1e-4), betas=(0.9, 0.95))
    facts = RunFacts(
        title=f"{recipe.model} learns to score answers from “{Path(recipe.data).stem}”",
        about={"paper": "Ouyang et al., InstructGPT (2022), section 3.5"},
        data=finetuning.counted("prompts", task.data.parts, task.dropped),
        options={"template": task.tokenizer.chat_template},
        unit="prompts",
    )
    return finetuning.finetuning_job(recipe, task, ranking_loss, settings, facts, save=partial(leave, task))


def leave(task: RewardTask, directory: Path) -> None:
    """Write the whole model, with a bias that makes the demonstrations' mean score zero, and its accuracy."""
    model: Any = merge(copy.deepcopy(task.model))  # the trained model stays unchanged
    task_head.shift(model, -float(scores_of(model, task.demonstrations, task.tokenizer.pad_id or 0).mean()))
    checkpoints.save(model, task.tokenizer, directory)
    figures = calibration(margins(model, task.data.validation()))
    write_atomic(directory / CURVES, json.dumps([calibration_chart(figures)] if figures.count else []))


def calibration_chart(figures: Calibration) -> dict[str, Any]:
    """Return a chart of the accuracy on held-out pairs at each level of confidence."""
    points = [*zip(figures.sure, figures.right, strict=True)]
    measured = {"name": "held-out pairs", "points": points, "marked": True}
    ideal = {"name": "as sure as right", "points": [[0.5, 0.5], [1.0, 1.0]]}
    title = f"Calibration: off by {figures.error:.3f} on average over {sum(figures.count):,} pairs"
    return {"title": title, "y_label": "share that is right", "x_label": "how sure", "curves": [measured, ideal]}


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and transformers read; print the accuracy on held-out pairs."""
    task = prepare(recipe)
    if task.dropped:
        print(f"{task.dropped:,} prompts have an answer that is longer than a row and were left out.")
    summary = yield job_of(recipe, task)
    if (right := summary.figures.get("validation_accuracy")) is not None:
        print(f"In held-out pairs the better answer has the higher score in {right:.1%}.")
    print(f"The reward model is in {summary.directory}; transformers loads it as AutoModelForSequenceClassification.")
