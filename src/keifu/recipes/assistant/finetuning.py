"""Shared code of the recipes that turn a language model into an assistant: options, loading with a chat template,
adapters, ranked responses, prompts with rewards, and saving."""

import copy
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from keifu import checkpoints
from keifu.alignment import monitor, reward_model, rewards, rollouts
from keifu.checkpoints.hf.write import generation_config
from keifu.checkpoints.hub import locate
from keifu.checkpoints.lora.peft import adapt, save_adapter
from keifu.data.chat import prompts as gym
from keifu.data.chat.packing import TurnMasks
from keifu.data.chat.preferences import RankedResponses, read_preferences
from keifu.data.chat.prompts import Prompt, prompt, read_prompts
from keifu.data.text.synthetic_math import arithmetic, chain_sums, countdowns
from keifu.data.tokenizers import chat_template, formats
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, shell
from keifu.files import sha256, write_atomic
from keifu.inference.text.model import causal
from keifu.layers.lora import LoraSettings, adapters, merge, quantize_bases
from keifu.processes import current
from keifu.ranges import BELOW_ONE, BelowOne, Count, Finite, Natural, NotNegative, SmallCount, Temperature, check_value
from keifu.recipes.options import value_or
from keifu.recipes.training_options import FinetuneOptions
from keifu.training.job import Job, Jobs, RunFacts
from keifu.training.loop import Summary
from keifu.training.protocols import Objective, Sample, Save
from keifu.training.settings import Settings

Template = Literal["own", "plain", "chatml"]
CHAIN_SUM = "chain-sum"
MADE: dict[str, Callable[[Any, int], Iterable[dict[str, Any]]]] = {  # built-in tasks, from `SumPrompts` and a seed
    CHAIN_SUM: lambda sums, seed: chain_sums(sums.count, sums.terms, sums.digits, seed),
    "countdown": lambda sums, seed: countdowns(sums.count, sums.terms, sums.digits, seed),
    "arithmetic": lambda sums, seed: arithmetic(sums.count, seed),
}
TEMPLATES = {"plain": chat_template.PLAIN, "chatml": chat_template.CHATML}
T = TypeVar("T")
Sides = tuple[list[T], list[T]]  # training and held-out items
Make = Callable[[RankedResponses], Iterable[T]]
Answers = Callable[[T], Sequence[TurnMasks]]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters that are trained instead of the whole model."""

    rank: Natural = 0
    """Rank of each adapter; 0 trains the whole model."""
    alpha: Finite = 16.0
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Ends of layer names in the model's files, such as q_proj v_proj; all-linear: every linear layer."""
    dropout: BelowOne = 0.0
    """Dropout of the adapters' inputs."""
    base: Literal["float", "int4"] = "float"
    """Type of the frozen matrices that have adapters. float: that of the files. int4: 4.5 bits a number (QLoRA)."""
    dora: bool = False
    """Learn the length of each row apart from its direction (Liu et al., 2024)."""

    def __post_init__(self) -> None:
        if not self.rank and (self.dora or self.base != "float"):
            raise UserError("--lora.dora and --lora.base need adapters: set --lora.rank too, such as 16.")


@dataclass(frozen=True, kw_only=True)
class AssistantOptions(FinetuneOptions):
    """Options of every recipe that trains a language model on conversations."""

    template: Template = "own"
    """The chat template; own: the tokenizer's, or plain if it has none, which needs no token but the end of text."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters."""

    def origin(self) -> dict[str, Any]:
        """Return the values that a resumed run must share."""
        lora = {name: value for name, value in asdict(self.lora).items() if value != "float"}  # new
        return super().origin() | {"lora": lora}

    def rate(self, full: float, adapters: float) -> float:
        """Return the --learning-rate option, or else the default: `full` for all weights, `adapters` for adapters."""
        return value_or(self.learning_rate, adapters if self.lora.rank else full)


@dataclass(frozen=True, eq=False)
class FinetuneTask:
    """Task that is ready to train: the model, its tokenizer, and the data."""

    model: Any
    tokenizer: Tokenizer
    data: Any


@dataclass(frozen=True, eq=False)
class RankedTask(FinetuneTask):
    """Task of learning from ranked responses. dropped: number of examples that were too long."""

    dropped: int


def epoch_settings(recipe: Any, data: Any, rates: tuple[float, float], **different: Any) -> Settings:
    """Return the settings of a recipe that trains in epochs. rates: default learning rates for all weights and for
    adapters. different: fields of `Settings` with other values."""
    steps = recipe.total_steps(data.steps_per_epoch)
    warmup = round(recipe.warmup * steps)
    return recipe.settings(
        steps, batch_size=recipe.batch_size, learning_rate=recipe.rate(*rates), warmup=warmup, **different
    )


def finetuning_job(
    recipe: AssistantOptions, task: FinetuneTask, objective: Objective, settings: Settings, facts: RunFacts,
    sample: Sample | None = None, save: Save | None = None,
) -> Job:  # fmt: skip
    """Return the training of the task's model, whose result is a whole model or its adapters.

    facts: the source of the data and the values of `recipe.origin()` are added. save: of the model, if it is not
    `save_result`.
    """
    data, options = {"source": recipe.data, **facts.data}, {**recipe.origin(), **facts.options}
    return Job(
        model=task.model, objective=objective, data=task.data, settings=settings, tokenizer=task.tokenizer,
        facts=replace(facts, data=data, options=options), sample=sample, largest=task.data.largest(),
        save=save or partial(save_result, task.model, task.tokenizer, base=recipe.model),
    )  # fmt: skip


def counted(what: str, parts: Sequence[Any], dropped: int) -> dict[str, int]:
    """Return the numbers of training and held-out examples, and of those that were too long, for the report."""
    learned, validation = map(len, parts)
    return {f"{what} to learn from": learned, f"{what} held out": validation, "too long, left out": dropped}


@dataclass(frozen=True, kw_only=True)
class RankedOptions(AssistantOptions):
    """Options of the recipes that learn from ranked responses."""

    context_length: Count | None = None
    """Tokens of a prompt with its response; unset: 1024, or the context length of the model if that is less."""
    drop_long: bool = False
    """Leave out what is longer; without it that is an error."""
    warmup: NotNegative = 0.03
    """Share of the steps in which the learning rate rises from 0."""


def open_model(name: str, template: Template) -> tuple[Any, Tokenizer]:
    """Load a causal model and its tokenizer with the chosen chat template; adapters are merged."""
    print(f"Loading {name} ...", file=sys.stderr, flush=True)
    model, tokenizer = checkpoints.load(name)
    causal(merge(model))
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so it cannot read a conversation.")
    return model, with_template(tokenizer, template)


def with_template(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """Return the tokenizer with that template. Raises `UserError` if it lacks a token of the template."""
    if template == "own" and tokenizer.chat_template:
        return tokenizer
    if template == "chatml":
        _ = [tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>")]
    elif tokenizer.eos_id is None:
        raise UserError("This tokenizer has no end-of-text token, so no turn could end: take another model.")
    return tokenizer.with_chat_template(TEMPLATES["plain" if template == "own" else template])


def padding(tokenizer: Tokenizer, texts: Sequence[Sequence[int]]) -> Tokenizer:
    """Return the tokenizer with a padding token that is not the last token of any of these texts, so that their ends
    can be recognised.

    If it has none, another special token is used; if there is no other, the tokenizer stays without one.
    """
    ends = {text[-1] for text in texts}
    if tokenizer.pad_id is not None and tokenizer.pad_id not in ends:
        return tokenizer
    free = sorted(tokenizer.special_ids - ends - tokenizer.stop_ids) or sorted(tokenizer.special_ids - ends)
    roles = {role: token for role, token in tokenizer.special.items() if role != "pad_token"}
    if free and (token := tokenizer.backend.id_to_token(free[0])):
        roles["pad_token"] = token
    return tokenizer.replace(special=roles)


def row_length(model: Any, length: int | None) -> int:
    """Return the number of tokens of a row: `length`, by default the context length up to 1024. Raises `UserError` if
    `length` exceeds the context."""
    room = causal(model).config.context_length
    if length is not None and length > room:
        raise UserError(f"A row of {length} tokens does not fit this model's context of {room}: choose a smaller one.")
    return length or min(1024, room)


def to_train(model: nn.Module, lora: Lora, seed: int) -> nn.Module:
    """Add new adapters and freeze the model; or without LoRA unfreeze all weights in float32. The model's file does not
    change."""
    torch.manual_seed(seed)
    if lora.rank:
        adapt(model, lora.targets, LoraSettings(lora.rank, lora.alpha, lora.dropout, lora.dora))
        return quantize_bases(model) if lora.base == "int4" else model
    return model.float().requires_grad_(True)


def reference_model(model: nn.Module, lora: Lora) -> nn.Module:
    """Return the model before training: a frozen copy. With adapters it is the model itself, whose weights they do not
    change (see `unadapted`)."""
    return model if lora.rank else copy.deepcopy(model).float().requires_grad_(False)


def held_out(items: Sequence[T], texts: Sequence[str], share: float) -> Sides[T]:
    """Split into training and held-out items by a hash of the text. Items with the same text are not separated."""
    check_value("held_out", share, BELOW_ONE)
    keys = [hashlib.sha256(text.strip().lower().encode()).digest() for text in texts]
    held_out_keys = {*sorted({*keys})[: round(share * len({*keys}))]}
    sides: Sides[T] = [], []
    for key, item in zip(keys, items, strict=True):
        sides[key in held_out_keys].append(item)
    return sides


def save_result(model: nn.Module, tokenizer: Tokenizer, directory: Path, base: str) -> None:
    """Write the result: a whole model, or adapters with the name of their base; in both cases with the tokenizer."""
    if next(adapters(model), None) is None:
        checkpoints.save(model, tokenizer, directory)
        return
    save_adapter(model, directory, str(Path(base).resolve()) if Path(base).exists() else base)
    if current().is_main:
        tokenizer.save(directory)
        write_atomic(directory / formats.GENERATION_CONFIG, json.dumps(generation_config(tokenizer), indent=2) + "\n")


def prompt_parts(source: str, share: float, single: bool = False) -> Sides[RankedResponses]:
    """Split the preferences into training and held-out ones without separating equal questions. single: whether single
    answers with a label are allowed."""
    preferences = list(read_preferences(source, single))
    return held_out(preferences, [ranked.prompt[-1]["content"] for ranked in preferences], share)


def ranked_examples(
    recipe: RankedOptions,
    make: Make[T],
    answers: Answers[T],
    length: int,
    message: tuple[str, str],
    single: bool = False,
) -> tuple[list[T], list[T], int]:
    """Return training and held-out examples, and the number of preferences that were left out because an answer is too
    long.

    Without --drop-long such an answer raises a `UserError`. message: the error's text before and after the length.
    """
    fitting, dropped = list[list[T]](), 0
    for side in prompt_parts(recipe.data, recipe.held_out, single):
        examples = [example for ranked in side for example in make(ranked)]
        longest = [max(len(answer.ids) for answer in answers(one)) for one in examples]
        over = [size for size in longest if size > length]
        if over and not recipe.drop_long:
            raise UserError(
                f"{len(over):,} of {len(examples):,} {message[0]} longer than {length} tokens, the longest {message[1]}"
                f"{max(over)}: leave them out with --drop-long, or choose a longer --context-length."
            )
        fitting.append([one for one, size in zip(examples, longest, strict=True) if size <= length])
        dropped += len(over)
    learned, tested = fitting
    return learned, tested, dropped


def sample_answer(tokenizer: Tokenizer, ranked: RankedResponses, index: int) -> TurnMasks:
    """Render a prompt with one of its answers. Only this answer is trained, not the assistant's earlier turns."""
    said = {"role": "assistant", "content": ranked.answers[index]}
    turns = TurnMasks(*tokenizer.render_turns([*ranked.prompt, said]))
    return TurnMasks(turns.ids, [mine and i >= turns.last_answer for i, mine in enumerate(turns.learned)])


@dataclass(frozen=True)
class SumPrompts:
    """The built-in task."""

    count: SmallCount = 2000
    """Problems, also of reasoning-gym."""
    terms: tuple[Count, Count] = (2, 3)
    """The fewest and the most numbers of a problem."""
    digits: Count = 1
    """Most digits of a number."""


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(AssistantOptions):
    """Options of the recipes that learn from responses which the model samples itself (reinforcement learning)."""

    data: str = field(default=CHAIN_SUM, kw_only=False)
    """Prompts: a .jsonl or .json file of them, with the fields that the reward reads; or conversations by name, as
    keifu train sft takes them; or gym:NAME, problems of reasoning-gym (gym:chain_sum,max_terms=3); or a built-in task:
    chain-sum, countdown (numbers that make a target), or arithmetic (to be worked out in steps)."""
    sums: SumPrompts = field(default_factory=SumPrompts)
    """Options of the built-in tasks."""
    reward: str = "last-number"
    """file.py:function, called with a prompt, an answer and the example (a dict); or last-number or exact, which
    compare with the example's field answer; or worked-steps, for which all written equations must be true as well; or
    countdown; or reasoning-gym, its own scorers; or a reward model, a run of keifu train reward."""
    prompts: Count = 8
    """Prompts of a rollout."""
    max_tokens: Count = 64
    """Most tokens of a response."""
    temperature: Temperature = 1.0
    """Sampling temperature of the responses."""
    minibatches: Count = 1
    """Parts of a rollout, each of which makes an update."""
    epochs: Count = 1
    """Passes over the responses of a rollout."""
    clip: NotNegative = 0.2
    """Range of the ratio of a token's probability to that of the rollout, 1 - clip to 1 + clip; outside it, a token has
    no gradient."""
    warmup: Natural = 0
    """Updates in which the learning rate rises from 0."""

    def plan(self, group: int) -> rollouts.RolloutPlan:
        """Return the plan of a rollout with `group` responses to each prompt."""
        return rollouts.RolloutPlan(
            self.prompts, group, self.max_tokens, self.temperature, self.seed, self.minibatches, self.epochs
        )

    def parts(self) -> Sides[Prompt]:
        """Return training and held-out prompts. Raises `UserError` if they lack a field that the reward reads."""
        all_prompts = prompts(self.data, self.sums, self.seed)
        rewards.check_fields(self.reward, all_prompts)
        return held_out(all_prompts, [prompt.text for prompt in all_prompts], self.held_out)


def prompts(source: str, sums: SumPrompts, seed: int) -> Sequence[Prompt]:
    """Read the prompts of a file or of conversations known by name, of reasoning-gym, or of the built-in task."""
    if source.startswith(gym.PREFIX):
        return [prompt(record, source) for record in gym.gym_problems(source, sums.count, seed)]
    if source not in MADE:
        return list(read_prompts(source))
    return [prompt(record, source) for record in MADE[source](sums, seed)]


@dataclass(frozen=True, eq=False)
class RewardOptions:
    """Scorer of answers, its hash, and if it is a reward model, the model and its tokenizer."""

    scorer: rewards.Scorer
    model: reward_model.ModelReward | None
    digest: str


def make_rewards(name: str) -> RewardOptions:
    """Return the scorer of a function (see `keifu.alignment.rewards.reward`) or of a reward model (directory or hub
    id)."""
    if name in rewards.BUILT_IN or ".py:" in name or not (Path(name).is_dir() or "/" in name):
        return RewardOptions(rewards.score_responses(rewards.reward(name)), None, rewards.text_hash(name))
    model: Any
    model, tokenizer = checkpoints.load(name)
    if getattr(model.config, "form", "") != "score" or tokenizer is None:
        raise UserError(f"{name} gives no score: take a model of keifu train reward, or file.py:function.")
    files = sorted(locate(name).glob("*.safetensors"))  # a hub id is in the hub's cache
    by = reward_model.ModelReward(model.float().requires_grad_(False), tokenizer)
    return RewardOptions(by, by, "+".join(map(sha256, files)))


@dataclass(frozen=True, eq=False)
class RolloutTask(FinetuneTask):
    """Model, its tokenizer, the prompts for its rollouts, and the reward."""

    rewarding: RewardOptions


def rollout_settings(recipe: RolloutOptions, steps: int, group: int, **different: Any) -> Settings:
    """Return the settings of a recipe that learns from `group` sampled responses to each prompt. Every update is
    logged. Ratios of probabilities are close to 1, so they are computed in float32."""
    defaults = {"batch_size": recipe.prompts * group // recipe.minibatches, "log_every": 1, "keep_best": False}
    return recipe.settings(steps, schedule="constant", precision="float32", **defaults, **different)


def rollout_facts(
    recipe: Any, task: RolloutTask, paper: str, normal: Mapping[str, monitor.Healthy], options: Mapping[str, Any]
) -> RunFacts:
    """Return the facts of a run that learns from rollouts.

    normal: ranges of figures outside which there is a warning. options: values that affect the result, in addition to
    the settings and the reward.
    """
    learned, validation = task.data.parts
    problem_facts = {"source": f"{recipe.data} (problems made here)", **asdict(recipe.sums)}
    counts: dict[str, Any] = {"prompts to learn from": len(learned), "prompts held out": len(validation)}
    counts |= problem_facts if recipe.data in MADE else {}
    return RunFacts(
        title=f"{recipe.model} learns from the reward {Path(recipe.reward).name}", data=counts, unit="answers",
        about={"paper": paper, "normal ranges": monitor.describe(normal)}, watch=monitor.DivergenceMonitor(normal),
        options={"reward": recipe.reward, "reward's file": task.rewarding.digest, **options},
    )  # fmt: skip


def rollout_jobs(job: Job) -> Jobs:
    """Yield the job of a recipe that learns from rollouts. Print the last figures with their normal ranges, the answers
    to held-out prompts, and the folder."""
    summary = yield job
    assert isinstance(job.facts.watch, monitor.DivergenceMonitor)
    print(f"The last figures, each with its normal range:\n{job.facts.watch.table(summary.figures)}")
    if (mean := summary.figures.get("validation_reward")) is not None:
        print(f"The likeliest answers to held-out prompts have a mean reward of {mean:.3g}.")
    show_folder(summary)


def show_folder(summary: Summary) -> None:
    """Print the folder of a chat model, with the command that reads it."""
    print(f"The model is in {summary.directory}: keifu chat {shell(summary.directory)}")


def measured(names: Sequence[str]) -> dict[str, RewardOptions]:
    """Return rewards that are only reported, not trained on, by name. The name is the shortest end of the path that is
    unique: for runs/a/reward and runs/b/reward, measured_a_reward and measured_b_reward."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--measured names {twice} twice: leave one out.")
    split = (re.split(r"[/\\:]", name.replace(".py:", ":")) for name in names)
    parts = [[part for part in words if part not in ("", ".")] for words in split]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        short = ["_".join(words[-depth:]) for words in parts]
        if len(set(short)) == len(short):
            return {f"measured_{label}": make_rewards(name) for label, name in zip(short, names, strict=True)}
    raise UserError(f"--measured {' '.join(names)}: these are the same names, so their figures would be one.")
