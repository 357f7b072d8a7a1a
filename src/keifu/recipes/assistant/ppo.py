"""Proximal policy optimisation as in InstructGPT (Ouyang et al., 2022): a policy is trained on a reward model.

Paper: "Training language models to follow instructions with human feedback", sections 3.5 and C.4: 512 answers of 512
prompts a rollout, 8 minibatches, one pass, β 0.02 a token, clip 0.2, no discount, temperature 1, the weights' moving
average 0.992, a value model that begins as the reward model (rate 9e-6), and with `--text` the loss on pretraining text
times 27.8 (PPO-ptx), 8 texts for each answer. The paper does not state the policy's rate; above 8e-6 it diverged
without the text. You choose the pretraining text and its length.
Command: keifu train ppo --model runs/sft --reward runs/reward --data prompts.jsonl
Cost: printed before it starts, measured on the machine, without generating the answers.
Expected: the reward in metrics.jsonl rises, and kl stays inside its range: docs/results.md, "InstructGPT's pipeline".
"""

import copy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from keifu.alignment.ppo import NORMAL, ActorCritic, PPOBatches, PPOSettings, PretrainingMix, ppo
from keifu.data.text.packed import PackedText
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.ranges import BelowOne, Count, Natural, NotNegative, Share
from keifu.recipes.assistant import finetuning
from keifu.recipes.assistant.reward import with_score_head
from keifu.recipes.language.pretraining import TextOptions
from keifu.recipes.options import value_or
from keifu.training.job import Job, Jobs
from keifu.training.settings import Settings

POLICY = "policy"


@dataclass(frozen=True)
class RolloutText(TextOptions):
    """Pretraining text next to the answers (PPO-ptx), so that the model keeps what it learned from it."""

    data: str | None = None
    """A catalogue name (keifu data list), a file or a folder; unset: none."""
    weight: NotNegative = PPOSettings.text_weight
    """γ, of the loss on it, in nats per token."""
    each: Count = 8
    """Texts for each answer of an update."""
    length: Count = 128
    """Tokens of one."""


# names of these options in a saved state, with which a resumed run compares
STORED = {"kl_coef": "beta", "gae_lambda": "trace", "missing_eos_penalty": "cut_off"}


@dataclass(frozen=True, kw_only=True)
class Recipe(finetuning.RolloutOptions):
    """Options of the run."""

    model: str = field(default="runs/sft", kw_only=False)
    """The policy as it begins, and the reference model: a model that was fine-tuned to answer (keifu train sft)."""
    reward: str = "runs/reward"
    """A reward model, a run of keifu train reward; or file.py:function, called with a prompt, an answer and the example
    (a dict); or last-number or exact, which compare with the example's field answer; or reasoning-gym, its scorers."""
    value: str | None = None
    """Start of the value model: a reward model, or policy, which is the policy with a new head; unset: the reward
    model, or the policy if the reward is a function."""
    measured: tuple[str, ...] = ()
    """Further rewards that are computed and reported under their names, but not learned from."""
    text: RolloutText = field(default_factory=RolloutText)
    """Pretraining text."""
    prompts: Count = 64
    """Prompts of a rollout, with one response to each."""
    minibatches: Count = 8
    """Parts of a rollout, each of which makes an update."""
    kl_coef: NotNegative = PPOSettings.kl_coef
    """Weight β of the KL penalty on each token, which keeps the policy near the reference model."""
    value_clip: NotNegative = PPOSettings.value_clip
    """How far a value may move from that of the rollout; further away, it has no gradient."""
    discount: Share = PPOSettings.discount
    """γ: what a reward counts one token earlier."""
    gae_lambda: Share = PPOSettings.gae_lambda
    """λ of generalised advantage estimation: 0 relies on the value model alone, 1 on the rewards alone."""
    missing_eos_penalty: NotNegative = PPOSettings.missing_eos_penalty
    """Subtracted from the reward of a response that reaches max_tokens without an end-of-text token."""
    lora: finetuning.Lora = field(default_factory=finetuning.Lora)
    """Low-rank adapters, of the policy and of the value model."""
    rollouts: Count = 100
    """Rounds of sampling; each serves minibatches times epochs updates."""
    steps: Count | None = None
    """Updates of the weights; replaces rollouts."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate for the policy; unset: 5e-6, and 5e-5 for adapters."""
    value_rate: NotNegative | None = None
    """The same for the value model; unset: 9e-6, and 9e-5 for adapters."""
    warmup: Natural = 10
    """Updates in which the learning rates rise from 0."""
    ema: BelowOne = 0.992
    """Decay of the moving average of the weights, which is validated and saved; 0 keeps none."""

    def __post_init__(self) -> None:
        if self.learning_rate == 0:
            raise UserError("learning_rate must be above 0, for value_rate is a share of it, and it is 0.")
        if self.text.each < 1 or self.text.length < 1:
            raise UserError("Pretraining text needs at least 1 window of 1 token or more; unset --text.data for none.")


@dataclass(frozen=True, eq=False)
class PPOTask(finetuning.RolloutTask):
    """Policy with its value model, tokenizer, prompts, reward, and PPO's update rule."""

    rule: PPOSettings


def prepare(recipe: Recipe) -> PPOTask:
    """Load policy and reward, read the prompts and the text, and keep the reference model."""
    options = {field.name: vars(recipe)[field.name] for field in fields(PPOSettings) if field.name in vars(recipe)}
    rule = PPOSettings(**options, text_weight=recipe.text.weight)
    by, parts = finetuning.make_rewards(recipe.reward), recipe.parts()
    policy, tokenizer = finetuning.open_model(recipe.model, recipe.template)
    reference = finetuning.reference_model(policy, recipe.lora)
    value = value_model(recipe, by, policy, tokenizer)
    model = ActorCritic(finetuning.to_train(policy, recipe.lora, recipe.seed), value)
    mix = pretraining_mix(recipe, policy, tokenizer)
    scorers = {name: reward.scorer for name, reward in finetuning.measured(recipe.measured).items()}
    data = PPOBatches(model.policy, reference, tokenizer, *parts, by.scorer, recipe.plan(1), scorers,
                      value=value, rule=rule, pretraining=mix)  # fmt: skip
    return PPOTask(model, tokenizer, data, by, rule)


def value_model(recipe: Recipe, by: finetuning.RewardOptions, policy: Any, tokenizer: Tokenizer) -> Any:
    """Return a trainable value model, as a copy of the model that it starts from."""
    rewards = finetuning.make_rewards(recipe.value) if recipe.value not in (None, POLICY) else by
    if recipe.value == POLICY or rewards.model is None:
        if recipe.value not in (None, POLICY):
            raise UserError(f"--value {recipe.value} is no model: choose a reward model, or policy.")
        return with_score_head(copy.deepcopy(policy), recipe.lora, recipe.seed + 1)
    if rewards.model.tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(
            f"{recipe.value or recipe.reward} reads other tokens than {recipe.model}, so it cannot become the value "
            "model: choose --value policy, or a reward model that was trained from the same model."
        )
    value = copy.deepcopy(rewards.model.model)
    room, policy_room = (model.config.context_length for model in (value, policy))
    if room < policy_room:
        raise UserError(
            f"The value model's context of {room} is shorter than the policy's {policy_room}: --value policy."
        )
    finetuning.to_train(value.decoder, recipe.lora, recipe.seed + 1)
    value.task_head.requires_grad_(True)
    if value.decoder.head is not None:
        value.decoder.head.requires_grad_(False)  # the language model head is not used
    return value


def pretraining_mix(recipe: Recipe, policy: Any, tokenizer: Tokenizer) -> PretrainingMix | None:
    """Return the pretraining text as windows of the policy's tokens; None if there is none."""
    text = recipe.text
    if text.data is None or not text.weight:
        return None
    length = finetuning.row_length(policy, text.length)
    return PretrainingMix(PackedText(text.shards(text.data, tokenizer), length, 1, recipe.seed), text.each)


def settings(recipe: Recipe) -> Settings:
    """Return the training loop's settings."""
    updates = recipe.minibatches * recipe.epochs
    steps = recipe.steps or recipe.rollouts * updates
    rate = recipe.rate(5e-6, 5e-5)
    value_rate = value_or(recipe.value_rate, 9e-5 if recipe.lora.rank else 9e-6)
    shares, often = (("value.", value_rate / rate),), max(1, steps // updates // 5) * updates
    rates = {"learning_rate": rate, "rate_shares": shares, "warmup": min(recipe.warmup, steps)}
    return finetuning.rollout_settings(
        recipe, steps, 1, **rates, betas=(0.9, 0.95), ema=recipe.ema, evaluate_every=often
    )


def job_of(recipe: Recipe, task: PPOTask) -> Job:
    """Return the training of the task's policy and value model, of which the policy is saved."""
    options: dict[str, Any] = {STORED.get(name, name): value for name, value in asdict(task.rule).items()}
    options |= {"value": recipe.value, "measured": list(recipe.measured), "text": recipe.text.described()}
    paper = "Ouyang et al., InstructGPT (2022), sections 3.5 and C.4"
    facts = finetuning.rollout_facts(recipe, task, paper, NORMAL, options)
    save = partial(finetuning.save_result, task.model.policy, task.tokenizer, base=recipe.model)
    objective = partial(ppo, rule=task.rule)
    return finetuning.finetuning_job(recipe, task, objective, settings(recipe), facts, save=save)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu chat reads."""
    yield from finetuning.rollout_jobs(job_of(recipe, prepare(recipe)))
