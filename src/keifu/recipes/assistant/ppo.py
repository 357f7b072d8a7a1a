"""Proximal policy optimisation as InstructGPT did it (Ouyang et al., 2022): a model learns from a learned reward.

Paper: "Training language models to follow instructions with human feedback", sections 3.5 and C.4: 512 answers of 512
prompts a rollout, 8 minibatches, one pass, β 0.02 a token, clip 0.2, no discount, temperature 1, the weights' moving
average 0.992, a value model that begins as the reward model (rate 9e-6), and with `--text` the loss on pretraining text
times 27.8 (PPO-ptx), 8 texts for each answer. The policy's rate is not printed there; above 8e-6 it diverged without
the text. What pretraining text is, and how long, is yours to say.
Command: keifu train ppo --model runs/sft --reward runs/reward --data prompts.jsonl
Cost: printed before it starts, measured on the machine, without the writing of the answers.
Expected: the reward in metrics.jsonl rises, and kl stays inside its range.
"""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from keifu.alignment.monitor import DivergenceMonitor
from keifu.alignment.ppo import NORMAL, ActorCritic, PPOBatches, PPOSettings, PretrainingMix, ppo
from keifu.alignment.rollouts import RolloutInputs, RolloutPlan
from keifu.data.text.packed import PackedText
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
    measured,
    open_model,
    print_sentence,
    prompts,
    reference_model,
    row_length,
    save_result,
    split_prompts,
    to_train,
)
from keifu.recipes.assistant.reward import with_score_head
from keifu.recipes.language.common import TextOptions
from keifu.recipes.options import Logging
from keifu.training.loop import Summary, train
from keifu.training.protocols import Run
from keifu.training.settings import Settings

POLICY = "policy"


@dataclass(frozen=True)
class Text(TextOptions):
    """Pretraining text beside the answers (PPO-ptx), so that what was learned from it is kept."""

    data: str | None = None
    """A catalogue name (keifu data list), a file or a folder; unset: none."""
    weight: float = PPOSettings.text_weight
    """γ, of the loss on it, in nats a token."""
    each: int = 8
    """Texts for each answer of an update."""
    length: int = 128
    """Tokens of one."""


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run."""

    RENAMED: ClassVar[dict[str, str]] = {"beta": "kl_coef", "trace": "gae_lambda", "cut_off": "missing_eos_penalty"}

    model: str = "runs/sft"
    """The policy as it begins, and the reference: one that has learned to answer (keifu train sft)."""
    reward: str = "runs/reward"
    """A reward model, a run of keifu train reward; or file.py:function, called with a prompt, an answer and the example
    (a dict); or last-number or exact, which compare with the example's field answer; or reasoning-gym, its scorers."""
    value: str | None = None
    """What the value model begins as: a reward model, or policy, which is the policy with a new head; unset: the reward
    model, or the policy where the reward is a function."""
    measured: tuple[str, ...] = ()
    """Further rewards that the answers are scored by and nothing is learned from, each a figure by its name."""
    data: str = CHAIN_SUM
    """A .jsonl or .json file of prompts, with whatever the reward needs; or conversations by name, as keifu train sft
    takes them; or gym:NAME, problems of reasoning-gym (gym:chain_sum,max_terms=3); or chain-sum, which is made here."""
    template: Template = "own"
    """The chat template; own: the tokenizer's, or plain where it has none."""
    held_out: float = 0.1
    """Share of the prompts that is kept for validation, chosen by a hash of the text."""
    sums: SumPrompts = field(default_factory=SumPrompts)
    """Of chain-sum."""
    text: Text = field(default_factory=Text)
    """Pretraining text."""
    prompts: int = 64
    """Of a rollout, with an answer to each."""
    minibatches: int = 8
    """Parts of a rollout, each of which makes an update."""
    epochs: int = 1
    """How often the answers of a rollout are gone through."""
    max_tokens: int = 64
    """Of an answer, at most."""
    temperature: float = PPOSettings.temperature
    """Of the answers' sampling."""
    kl_coef: float = PPOSettings.kl_coef
    """Weight β of the KL penalty on each token, which keeps the policy near the reference model."""
    clip: float = PPOSettings.clip
    """How far a token's probability may move, as a share, before it counts no more."""
    value_clip: float = PPOSettings.value_clip
    """How far a value may move from that of the rollout before it counts no more."""
    discount: float = PPOSettings.discount
    """What a reward counts a token earlier."""
    gae_lambda: float = PPOSettings.gae_lambda
    """λ of generalised advantage estimation: 0 relies on the value model alone, 1 on the rewards alone."""
    missing_eos_penalty: float = PPOSettings.missing_eos_penalty
    """Subtracted from the reward of a response that reaches max_tokens without an end-of-text token."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters, of the policy and of the value model."""
    rollouts: int = 100
    """Rounds of answers; each serves minibatches times epochs updates."""
    steps: int | None = None
    """Updates of the weights, in place of rollouts."""
    micro_batch: int | None = None
    """Answers computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest rate for the policy; unset: 5e-6, and 5e-5 for adapters."""
    value_rate: float | None = None
    """The same for the value model; unset: 9e-6, and 9e-5 for adapters."""
    warmup: int = 10
    """Updates in which the rates rise from 0."""
    ema: float = 0.992
    """Decay of the moving average of the weights, which is what validates and is written; 0 keeps none."""
    seed: int = 0
    """Of the new head, the adapters, the problems, the order of the prompts, and the answers."""

    def __post_init__(self) -> None:
        if self.text.each < 1 or self.text.length < 1:
            raise UserError("Of pretraining text there is at least 1 of 1 token or more; unset --text.data for none.")


@dataclass(frozen=True, eq=False)
class Task:
    """Everything made ready: the policy with its value model, its tokenizer, and what it answers while it learns."""

    model: ActorCritic
    tokenizer: Tokenizer
    data: PPOBatches
    rule: PPOSettings
    rewarding: RewardOptions


def prepare(recipe: Recipe) -> Task:
    """Loads policy and reward, reads the prompts and the text, and keeps what the policy began with."""
    plan = RolloutPlan(
        recipe.prompts, 1, recipe.max_tokens, recipe.temperature, recipe.seed, recipe.minibatches, recipe.epochs
    )
    rule = PPOSettings(
        kl_coef=recipe.kl_coef,
        clip=recipe.clip,
        value_clip=recipe.value_clip,
        discount=recipe.discount,
        gae_lambda=recipe.gae_lambda,
        text_weight=recipe.text.weight,
        missing_eos_penalty=recipe.missing_eos_penalty,
        temperature=recipe.temperature,
    )
    by = make_rewards(recipe.reward)
    parts = split_prompts(prompts(recipe.data, recipe.sums, recipe.seed), recipe.held_out)
    policy, tokenizer = open_model(recipe.model, recipe.template)
    reference = reference_model(policy, recipe.lora)
    value = value_model(recipe, by, policy, tokenizer)
    model = ActorCritic(to_train(policy, recipe.lora, recipe.seed), value)
    mix = pretraining_mix(recipe, policy, tokenizer)
    scorers = {name: each.scorer for name, each in measured(recipe.measured).items()}
    inputs = RolloutInputs(model.policy, reference, tokenizer, *parts, by.scorer, plan, scorers)
    return Task(model, tokenizer, PPOBatches(inputs, value, rule, mix), rule, by)


def value_model(recipe: Recipe, by: RewardOptions, policy: Any, tokenizer: Tokenizer) -> Any:
    """The value model, ready to be trained, apart from whatever it begins as."""
    chosen = make_rewards(recipe.value) if recipe.value not in (None, POLICY) else by
    if recipe.value == POLICY or chosen.model is None:
        if recipe.value not in (None, POLICY):
            raise UserError(f"--value {recipe.value} is no model: choose a reward model, or policy.")
        decoder = copy.deepcopy(policy)
        return with_score_head(decoder, recipe.lora, recipe.seed + 1)
    if chosen.model.tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(
            f"{recipe.value or recipe.reward} reads other tokens than {recipe.model}, so it cannot become the value "
            "model: choose --value policy, or a reward model that was trained from the same model."
        )
    value = copy.deepcopy(chosen.model.model)
    room, needed = (each.config.context_length for each in (value, policy))
    if room < needed:
        raise UserError(f"The value model's context of {room} is shorter than the policy's {needed}: --value policy.")
    to_train(value.decoder, recipe.lora, recipe.seed + 1)
    value.task_head.requires_grad_(True)
    if value.decoder.head is not None:
        value.decoder.head.requires_grad_(False)  # of words, which nothing here asks for
    return value


def pretraining_mix(recipe: Recipe, policy: Any, tokenizer: Tokenizer) -> PretrainingMix | None:
    """The pretraining text as windows of the policy's tokens; None where there is none."""
    text = recipe.text
    if text.data is None or not text.weight:
        return None
    length = row_length(policy, text.length)
    packed = PackedText(text.shards(text.data, tokenizer), length, 1, recipe.seed)
    return PretrainingMix(packed, text.each)


def settings(recipe: Recipe) -> Settings:
    """The training loop's settings; every update has a line of metrics."""
    updates = recipe.minibatches * recipe.epochs
    steps = recipe.steps or recipe.rollouts * updates
    rate = recipe.learning_rate or (5e-5 if recipe.lora.rank else 5e-6)
    value_rate = recipe.value_rate or (9e-5 if recipe.lora.rank else 9e-6)
    return Settings(
        steps=steps,
        batch_size=recipe.prompts // recipe.minibatches,
        micro_batch=recipe.micro_batch,
        learning_rate=rate,
        rate_shares=(("value.", value_rate / rate),),
        schedule="constant",
        warmup=min(recipe.warmup, steps),
        weight_decay=0.0,
        betas=(0.9, 0.95),
        ema=recipe.ema,
        precision="float32",  # ratios of probabilities lie close to 1
        log_every=1,
        evaluate_every=max(1, steps // updates // 5) * updates,
        save_every=max(1, steps // 10),
        seed=recipe.seed,
        **recipe.logging(),
    )


def learn(recipe: Recipe, task: Task, out: Path, resume: bool = False) -> tuple[Summary, DivergenceMonitor]:
    """Trains the task's model into a run folder, which then holds the policy."""
    watched, largest = kl_watch(NORMAL, out, resume), task.data.largest()
    run = describe(recipe, task, out, resume, watched)

    def save(directory: Path) -> None:
        save_result(task.model.policy, task.tokenizer, directory, recipe.model)

    return train(task.model, ppo(task.rule), task.data, settings(recipe), run, save=save, largest=largest), watched


def describe(recipe: Recipe, task: Task, out: Path, resume: bool, watched: DivergenceMonitor) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    options: dict[str, Any] = {"reward": recipe.reward, "reward's file": task.rewarding.digest, "value": recipe.value}
    then = {now: old for old, now in Recipe.RENAMED.items()}  # as runs of earlier versions have them
    options |= {then.get(name, name): value for name, value in asdict(task.rule).items()}
    options |= {"begins with": recipe.model, "measured": list(recipe.measured)}
    return Run(
        directory=out,
        resume=resume,
        options=options | {"lora": asdict(recipe.lora), "text": asdict(recipe.text)},
        about=about(recipe, "Ouyang et al., InstructGPT (2022), sections 3.5 and C.4", NORMAL, task.data.parts),
        unit="answers",
        watch=watched,
    )


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Trains into `out`, which keifu chat reads afterwards."""
    summary, watched = learn(recipe, prepare(recipe), out, resume)
    print_sentence(watched, summary.figures)
    print(f"The model is in {out}: keifu chat {out}.")
