"""Group relative policy optimisation (Shao et al., 2024): reinforcement learning on rewards that a program can check.

Paper: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models": groups of 64 answers, a
rate of 1e-6, β 0.04, one update for each set of answers. No reward model and no value model: the answers to one prompt
are compared with each other. The built-in task has sums in the form of reasoning-gym's chain_sum, made here.
Command: keifu train grpo --model runs/sft
Cost: printed before it starts, measured on the machine, without the writing of the answers.
Expected: the reward in metrics.jsonl rises, and so does validation_reward, that of the likeliest answers to held-out
prompts; docs/results.md, "What GRPO bought on sums".
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from keifu.alignment.grpo import NORMAL, GRPOBatches, grpo
from keifu.alignment.monitor import DivergenceMonitor
from keifu.alignment.rollouts import RolloutInputs
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.recipes.assistant.common import (
    RewardOptions,
    RolloutOptions,
    describe_rollouts,
    kl_watch,
    make_rewards,
    open_model,
    print_sentence,
    reference_model,
    save_result,
    to_train,
)
from keifu.recipes.finetuning import finetune_settings
from keifu.training.loop import Summary, train
from keifu.training.protocols import Run
from keifu.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Recipe(RolloutOptions):
    """Options of the run."""

    reward: str = "last-number"
    """file.py:function, called with a prompt, an answer and the example (a dict); or last-number or exact, which
    compare with the example's field answer; or reasoning-gym, its own scorers; or a reward model, a run of keifu train
    reward."""
    group: int = 8
    """Responses to each prompt, which are compared with each other."""
    beta: float = 0.04
    """Weight β of the KL penalty, which keeps the policy near the reference model; 0 keeps no reference model."""
    steps: int = 200
    """Updates of the weights; a rollout serves minibatches times epochs of them."""
    learning_rate: float | None = None
    """AdamW's highest learning rate; unset: 1e-6, and 2e-5 for adapters."""

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
    by = make_rewards(recipe.reward)
    parts = recipe.parts()
    model, tokenizer = open_model(recipe.model, recipe.template)
    reference = reference_model(model, recipe.lora) if recipe.beta else None
    model = to_train(model, recipe.lora, recipe.seed)
    inputs = RolloutInputs(model, reference, tokenizer, *parts, by.scorer, recipe.plan(recipe.group))
    return Task(model, tokenizer, GRPOBatches(inputs), by)


def settings(recipe: Recipe) -> Settings:
    """The training loop's settings; every step has a line of metrics."""
    return finetune_settings(
        recipe,
        recipe.steps,
        batch_size=recipe.prompts * recipe.group // recipe.minibatches,
        learning_rate=recipe.rate(1e-6, 2e-5),
        schedule="constant",
        warmup=recipe.warmup,
        precision="float32",  # ratios of probabilities lie close to 1
        log_every=1,
    )


def learn(recipe: Recipe, task: Task, out: Path, resume: bool = False) -> tuple[Summary, DivergenceMonitor]:
    """Trains the task's model into a run folder."""
    objective, watched = grpo(recipe.clip, recipe.beta, recipe.temperature), kl_watch(NORMAL, out, resume)
    save, largest = lambda to: save_result(task.model, task.tokenizer, to, recipe.model), task.data.largest()
    run = describe(recipe, task, out, resume, watched)
    return train(task.model, objective, task.data, settings(recipe), run, save=save, largest=largest), watched


def describe(recipe: Recipe, task: Task, out: Path, resume: bool, watched: DivergenceMonitor) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    options = {"clip": recipe.clip, "beta": recipe.beta}
    paper = "Shao et al., DeepSeekMath (2024)"
    return describe_rollouts(recipe, task, out, resume, paper=paper, options=options, watched=watched)


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Trains into `out`, which keifu chat reads afterwards."""
    summary, watched = learn(recipe, prepare(recipe), out, resume)
    print_sentence(watched, summary.figures)
    print(f"The model is in {out}: keifu chat {out}.")
