"""Group relative policy optimisation (Shao et al., 2024): reinforcement learning on rewards that a program can check.

Paper: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models": groups of 64 answers, a
rate of 1e-6, β 0.04, one update for each set of answers. No reward model and no value model: the answers to one prompt
are compared with each other. The built-in task has sums in the form of reasoning-gym's chain_sum, made here.
Command: keifu train grpo --model runs/sft
Cost: printed before it starts, measured on the machine, without the writing of the answers.
Expected: the reward in metrics.jsonl rises, and so does validation_reward, that of the likeliest answers to held-out
prompts; docs/results.md, "GRPO on sums".
"""

from dataclasses import dataclass
from pathlib import Path

from keifu.alignment.grpo import NORMAL, GRPOBatches, grpo
from keifu.alignment.monitor import DivergenceMonitor
from keifu.errors import UserError
from keifu.ranges import Count, NotNegative
from keifu.recipes.assistant import finetuning
from keifu.recipes.assistant.finetuning import RolloutOptions, RolloutTask, open_model
from keifu.training.loop import Summary
from keifu.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Recipe(RolloutOptions):
    """Options of the run."""

    reward: str = "last-number"
    """file.py:function, called with a prompt, an answer and the example (a dict); or last-number or exact, which
    compare with the example's field answer; or reasoning-gym, its own scorers; or a reward model, a run of keifu train
    reward."""
    group: Count = 8
    """Responses to each prompt, which are compared with each other."""
    beta: NotNegative = 0.04
    """Weight β of the KL penalty, which keeps the policy near the reference model; 0 keeps no reference model."""
    steps: Count = 200
    """Updates of the weights; a rollout serves minibatches times epochs of them."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 1e-6, and 2e-5 for adapters."""

    def __post_init__(self) -> None:
        if self.beta < 0 or not 0 < self.clip < 1:
            raise UserError(f"beta is 0 or more and clip from 0 to 1, and they are {self.beta} and {self.clip}.")
        if self.group < 2:
            raise UserError(f"A group has 2 answers or more, which are compared, and not {self.group}.")


def prepare(recipe: Recipe) -> RolloutTask:
    """Load the model and the reward, read or make the prompts, and keep the reference model."""
    by = finetuning.make_rewards(recipe.reward)
    parts = recipe.parts()
    model, tokenizer = open_model(recipe.model, recipe.template)
    reference = finetuning.reference_model(model, recipe.lora) if recipe.beta else None
    model = finetuning.to_train(model, recipe.lora, recipe.seed)
    data = GRPOBatches(model, reference, tokenizer, *parts, by.scorer, recipe.plan(recipe.group))
    return RolloutTask(model, tokenizer, data, by)


def settings(recipe: Recipe) -> Settings:
    """Return the training loop's settings."""
    rows, rate = recipe.prompts * recipe.group // recipe.minibatches, recipe.rate(1e-6, 2e-5)
    return finetuning.rollout_settings(recipe, recipe.steps, batch_size=rows, learning_rate=rate, warmup=recipe.warmup)


def learn(recipe: Recipe, task: RolloutTask, out: Path, resume: bool = False) -> tuple[Summary, DivergenceMonitor]:
    """Train the task's model into a run folder."""
    objective, chosen = grpo(recipe.clip, recipe.beta, recipe.temperature), settings(recipe)
    options, paper = {"clip": recipe.clip, "beta": recipe.beta}, "Shao et al., DeepSeekMath (2024)"
    return finetuning.learn_from_rollouts(recipe, task, objective, chosen, out, resume, paper, NORMAL, options)


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Train into `out`, which keifu chat reads afterwards."""
    summary, watched = learn(recipe, prepare(recipe), out, resume)
    finetuning.print_sentence(watched, summary.figures, out)
