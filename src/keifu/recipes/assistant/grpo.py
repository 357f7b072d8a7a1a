"""Group relative policy optimisation (Shao et al., 2024): a model learns from answers that a program can check.

Paper: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models": groups of 64 answers, a
rate of 1e-6, β 0.04, one update for each set of answers. No reward model and no value model: the answers to one prompt
are compared with each other. The built-in task has sums in the form of reasoning-gym's chain_sum, made here.
Command: keifu train grpo --model runs/sft
Cost: printed before it starts, measured on the machine, without the writing of the answers.
Expected: the reward in metrics.jsonl rises, and so does validation_reward, that of the likeliest answers to held-out
prompts.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from keifu.alignment.grpo import NORMAL, GRPOBatches, grpo
from keifu.alignment.monitor import DivergenceMonitor
from keifu.alignment.rollouts import RolloutInputs, RolloutPlan
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.recipes.assistant.common import (
    CHAIN_SUM,
    Lora,
    RewardOptions,
    SumPrompts,
    Template,
    about,
    kl_watch,
    make_rewards,
    open_model,
    print_sentence,
    prompts,
    reference_model,
    save_result,
    split_prompts,
    to_train,
)
from keifu.recipes.options import Logging
from keifu.training.loop import Summary, train
from keifu.training.protocols import Run
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run."""

    model: str = "smollm2"
    """What it begins with, best one that has learned to answer: a run, a directory, a catalogue name or a hub id."""
    data: str = CHAIN_SUM
    """chain-sum, the built-in task; or a .jsonl or .json file: prompt, and whatever the reward needs; or conversations
    by name, as keifu train sft takes them; or gym:NAME, problems of reasoning-gym (gym:chain_sum,max_terms=3)."""
    reward: str = "last-number"
    """file.py:function, called with a prompt, an answer and the example (a dict); or last-number or exact, which
    compare with the example's field answer; or reasoning-gym, its own scorers; or a reward model, a run of keifu train
    reward."""
    template: Template = "own"
    """The chat template; own: the tokenizer's, or plain where it has none."""
    held_out: float = 0.1
    """Share of the prompts that is kept for validation, chosen by a hash of the text."""
    sums: SumPrompts = field(default_factory=SumPrompts)
    """Of chain-sum."""
    prompts: int = 8
    """Of a rollout."""
    group: int = 8
    """Answers to each prompt, which are compared with each other."""
    max_tokens: int = 64
    """Of an answer, at most."""
    temperature: float = 1.0
    """Of the answers' sampling."""
    minibatches: int = 1
    """Parts of a rollout, each of which makes an update."""
    epochs: int = 1
    """How often the answers of a rollout are gone through."""
    clip: float = 0.2
    """How far a token's probability may move, as a share, before it counts no more."""
    beta: float = 0.04
    """Weight β of the KL penalty, which keeps the policy near the reference model; 0 keeps no reference model."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters."""
    steps: int = 200
    """Updates of the weights; a rollout serves minibatches times epochs of them."""
    micro_batch: int | None = None
    """Answers computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest rate; unset: 1e-6, and 2e-5 for adapters."""
    warmup: int = 0
    """Steps in which the rate rises from 0."""
    seed: int = 0
    """Of the adapters, the problems, the order of the prompts, and the answers."""

    def __post_init__(self) -> None:
        if self.beta < 0 or not 0 < self.clip < 1:
            raise UserError(f"beta is 0 or more and clip from 0 to 1, and they are {self.beta} and {self.clip}.")
        if self.group < 2:
            raise UserError(f"A group has 2 answers or more, which are compared, and not {self.group}.")


@dataclass(frozen=True, eq=False)
class Task:
    """Everything made ready: the model, its tokenizer, and the prompts that it answers while it learns."""

    model: nn.Module
    tokenizer: Tokenizer
    data: GRPOBatches
    rewarding: RewardOptions


def prepare(recipe: Recipe) -> Task:
    """Loads the model and the reward, reads or makes the prompts, and keeps what the model began with."""
    plan = RolloutPlan(
        recipe.prompts, recipe.group, recipe.max_tokens, recipe.temperature, recipe.seed, recipe.minibatches,
        recipe.epochs,
    )  # fmt: skip
    by = make_rewards(recipe.reward)
    parts = split_prompts(prompts(recipe.data, recipe.sums, recipe.seed), recipe.held_out)
    model, tokenizer = open_model(recipe.model, recipe.template)
    reference = reference_model(model, recipe.lora) if recipe.beta else None
    model = to_train(model, recipe.lora, recipe.seed)
    inputs = RolloutInputs(model, reference, tokenizer, *parts, by.scorer, plan)
    return Task(model, tokenizer, GRPOBatches(inputs), by)


def settings(recipe: Recipe) -> Settings:
    """The training loop's settings; every step has a line of metrics."""
    return Settings(
        steps=recipe.steps,
        batch_size=recipe.prompts * recipe.group // recipe.minibatches,
        micro_batch=recipe.micro_batch,
        learning_rate=recipe.learning_rate or (2e-5 if recipe.lora.rank else 1e-6),
        schedule="constant",
        warmup=recipe.warmup,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        precision="float32",  # ratios of probabilities lie close to 1
        log_every=1,
        evaluate_every=max(1, recipe.steps // 5),
        save_every=max(1, recipe.steps // 10),
        seed=recipe.seed,
        **recipe.logging(),
    )


def learn(recipe: Recipe, task: Task, out: Path, resume: bool = False) -> tuple[Summary, DivergenceMonitor]:
    """Trains the task's model into a run folder."""
    objective, watched = grpo(recipe.clip, recipe.beta, recipe.temperature), kl_watch(NORMAL, out, resume)
    save, largest = lambda to: save_result(task.model, task.tokenizer, to, recipe.model), task.data.largest()
    run = describe(recipe, task, out, resume, watched)
    return train(task.model, objective, task.data, settings(recipe), run, save=save, largest=largest), watched


def describe(recipe: Recipe, task: Task, out: Path, resume: bool, watched: DivergenceMonitor) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    options: dict[str, Any] = {"reward": recipe.reward, "reward's file": task.rewarding.digest}
    options |= {"clip": recipe.clip, "beta": recipe.beta}
    return Run(
        directory=out,
        resume=resume,
        options=options | {"begins with": recipe.model, "lora": asdict(recipe.lora)},
        about=about(recipe, "Shao et al., DeepSeekMath (2024)", NORMAL, task.data.parts),
        unit="answers",
        watch=watched,
    )


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Trains into `out`, which keifu chat reads afterwards."""
    summary, watched = learn(recipe, prepare(recipe), out, resume)
    print_sentence(watched, summary.figures)
    print(f"The model is in {out}: keifu chat {out}.")
