"""Group relative policy optimisation (Shao et al., 2024): reinforcement learning on rewards that a program can check.

Paper: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models": groups of 64 answers, a
rate of 1e-6, β 0.04, one update for each set of answers. No reward model and no value model: the answers to one prompt
are compared with each other. The built-in task has sums in the form of reasoning-gym's chain_sum, made here.
`--variant` chooses Dr. GRPO (Liu et al., 2025), DAPO (Yu et al., 2025) or GSPO (Zheng et al., 2025).
Command: keifu train grpo --model runs/sft
Cost: printed before it starts, measured on the machine, without generating the answers.
Expected: the reward in metrics.jsonl rises, and so does validation_reward (of the likeliest answers to held-out
prompts); docs/results.md, "GRPO on sums".
"""

from dataclasses import dataclass
from functools import partial

from keifu.alignment.grpo import NORMAL, GRPOBatches, Variant, grpo
from keifu.errors import UserError
from keifu.ranges import Count, NotNegative
from keifu.recipes.assistant import finetuning
from keifu.recipes.options import value_or
from keifu.training.job import Job, Jobs

PAPERS = {"dr-grpo": "Liu et al., Dr. GRPO", "dapo": "Yu et al., DAPO", "gspo": "Zheng et al., GSPO"}  # 2025


@dataclass(frozen=True, kw_only=True)
class Recipe(finetuning.RolloutOptions):
    """Options of the run."""

    group: Count = 8
    """Responses to each prompt, which are compared with each other."""
    variant: Variant = "grpo"
    """grpo; dr-grpo: no division by an answer's length and by the deviation of the rewards; dapo: all tokens count the
    same, a higher --clip-high, and --rounds; gspo: the ratio of an answer instead of a token."""
    clip: NotNegative | None = None
    """Range of the ratio of probabilities, from 1 - clip; outside it, a token has no gradient. Unset: 0.2, for gspo
    0.0003."""
    clip_high: NotNegative | None = None
    """Upper end of the range, 1 + clip_high; unset: clip, for dapo 0.28, for gspo 0.0004."""
    rounds: Count | None = None
    """Most rollouts that are sampled to replace groups with equal rewards (dynamic sampling); unset: 1, for dapo 4."""
    beta: NotNegative | None = None
    """Weight β of the KL penalty, which keeps the policy near the reference model; 0 keeps no reference model. Unset:
    0.04, for the variants 0."""
    steps: Count = 200
    """Updates of the weights; a rollout serves minibatches times epochs of them."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 1e-6, and 2e-5 for adapters."""

    def __post_init__(self) -> None:
        (low, high), beta = self.clips, self.penalty
        if beta < 0 or not 0 < low < 1 or high <= 0:
            raise UserError(f"beta must be 0 or more and clip from 0 to 1, not {beta} and {low}, {high}.")
        if self.group < 2:
            raise UserError(f"A group has 2 answers or more, which are compared, and not {self.group}.")

    @property
    def clips(self) -> tuple[float, float]:
        """Both ends of the range of ratios: the options or their defaults."""
        low = value_or(self.clip, 3e-4 if self.variant == "gspo" else 0.2)
        return low, value_or(self.clip_high, {"dapo": 0.28, "gspo": 4e-4}.get(self.variant, low))

    @property
    def penalty(self) -> float:
        """β: the option or its default."""
        return value_or(self.beta, 0.04 if self.variant == "grpo" else 0.0)


def prepare(recipe: Recipe) -> finetuning.RolloutTask:
    """Load the model and the reward, read or generate the prompts, and keep the reference model."""
    by, parts = finetuning.make_rewards(recipe.reward), recipe.parts()
    model, tokenizer = finetuning.open_model(recipe.model, recipe.template)
    reference = finetuning.reference_model(model, recipe.lora) if recipe.penalty else None
    model = finetuning.to_train(model, recipe.lora, recipe.seed)
    plan, rounds = recipe.plan(recipe.group), recipe.rounds or (4 if recipe.variant == "dapo" else 1)
    data = GRPOBatches(model, reference, tokenizer, *parts, by.scorer, plan, variant=recipe.variant, rounds=rounds)
    return finetuning.RolloutTask(model, tokenizer, data, by)


def job_of(recipe: Recipe, task: finetuning.RolloutTask) -> Job:
    """Return the training of the task's model."""
    clips, beta, rate = recipe.clips, recipe.penalty, recipe.rate(1e-6, 2e-5)
    settings = finetuning.rollout_settings(recipe, recipe.steps, recipe.group, learning_rate=rate, warmup=recipe.warmup)
    objective = partial(grpo, clip=clips, beta=beta, temperature=recipe.temperature, variant=recipe.variant)
    options = {"clip": list(clips), "beta": beta, "variant": recipe.variant, "rounds": task.data.rounds}
    paper = PAPERS.get(recipe.variant, "Shao et al., DeepSeekMath (2024)")
    facts = finetuning.rollout_facts(recipe, task, paper, NORMAL, options)
    return finetuning.finetuning_job(recipe, task, objective, settings, facts)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu chat reads."""
    yield from finetuning.rollout_jobs(job_of(recipe, prepare(recipe)))
