"""What the recipes that learn from answers of their own have in common: prompts, what rewards the answers, how far the
run is normal; it knows no objective."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keifu import checkpoints
from keifu.alignment.reward import ByModel
from keifu.alignment.scoring import OWN, Scorer, each, reward, text_hash
from keifu.alignment.watching import Range, Watch, told
from keifu.checkpoints.hub import locate
from keifu.data import gym
from keifu.data.chain_sums import chain_sums
from keifu.data.prompts import Prompt, prompt, read
from keifu.errors import UserError
from keifu.files import sha256
from keifu.recipes._assistant import held_out
from keifu.recipes._language import whom_to_thank
from keifu.training import metrics

CHAIN_SUM = "chain-sum"


@dataclass(frozen=True)
class Sums:
    """The built-in task."""

    count: int = 2000
    """Problems, also of reasoning-gym."""
    terms: tuple[int, int] = (2, 3)
    """The fewest and the most numbers of a problem."""
    digits: int = 1
    """Of a number, at most."""


def prompts(source: str, sums: Sums, seed: int) -> Sequence[Prompt]:
    """Those of a file or of conversations known by name, of reasoning-gym, or of the built-in task."""
    if source.startswith(gym.PREFIX):
        return [prompt(record, source) for record in gym.problems(source, sums.count, seed)]
    if source != CHAIN_SUM:
        return list(read(source))
    return [prompt(record, CHAIN_SUM) for record in chain_sums(sums.count, sums.terms, sums.digits, seed)]


def parted(found: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and held out."""
    return held_out(found, [each.text for each in found], share)


def source_of(data: str, sums: Sums) -> dict[str, Any]:
    """Where prompts are from, for a report."""
    made = {"source": "sums in the form of reasoning-gym's chain_sum, made here", **asdict(sums)}
    return made if data == CHAIN_SUM else {"source": data} | whom_to_thank(data)


def about(
    recipe: Any, paper: str, normal: Mapping[str, Range], parts: tuple[Sequence[Prompt], Sequence[Prompt]]
) -> dict[str, Any]:
    """What a report says of a run of such a recipe; parts: the prompts to learn from, and those held out."""
    counts = {"prompts to learn from": len(parts[0]), "prompts held out": len(parts[1])}
    return {
        "title": f"{recipe.model} learns from the reward {Path(recipe.reward).name}",
        "paper": paper,
        "normal ranges": told(normal),
        "data": [source_of(recipe.data, recipe.sums) | counts],
    }


@dataclass(frozen=True, eq=False)
class Rewarding:
    """What scores answers; the reward model and its tokenizer, where it is one; a hash of whatever it is."""

    scorer: Scorer
    model: ByModel | None
    digest: str


def rewarding(name: str) -> Rewarding:
    """By a function (see `keifu.alignment.scoring.reward`), or by a reward model: a directory or a hub id."""
    if name in OWN or ".py:" in name or not (Path(name).is_dir() or "/" in name):
        return Rewarding(each(reward(name)), None, text_hash(name))
    model: Any
    model, tokenizer = checkpoints.load(name)
    if getattr(model.config, "form", "") != "score" or tokenizer is None:
        raise UserError(
            f"{name} gives no score: as a reward, choose a model of keifu train reward, or file.py:function."
        )
    files = sorted(locate(name).glob("*.safetensors"))  # of a hub id, in the hub's cache
    by = ByModel(model.float().requires_grad_(False), tokenizer)
    return Rewarding(by, by, "+".join(map(sha256, files)))


def measured(names: Sequence[str]) -> dict[str, Rewarding]:
    """Rewards that are shown and not learned from, each by the end of its name, as much of it as tells it from the
    others: of runs/a/reward and runs/b/reward it is measured_a_reward and measured_b_reward."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--measured names {twice} twice: leave one out.")
    split = (re.split(r"[/\\:]", name.replace(".py:", ":")) for name in names)
    parts = [[part for part in each if part not in ("", ".")] for each in split]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        short = ["_".join(each[-depth:]) for each in parts]
        if len(set(short)) == len(short):
            return {f"measured_{label}": rewarding(name) for label, name in zip(short, names, strict=True)}
    raise UserError(f"--measured {' '.join(names)}: these are the same names, so their figures would be one.")


def watch(normal: Mapping[str, Range], out: Path, resume: bool) -> Watch:
    """Warnings of a run; one that is resumed compares with its own first figures."""
    first = next((line for line in metrics.read(out) if "reward" in line), {}) if resume else {}
    return Watch(normal, {name: float(value) for name, value in first.items()})


def say(watched: Watch, figures: Mapping[str, float]) -> None:
    """Prints the last figures beside their normal ranges, and how held-out prompts are answered."""
    print(f"The last figures, each beside its normal range:\n{watched.table(figures)}")
    if (mean := figures.get("validation_reward")) is not None:
        print(f"The likeliest answers to held-out prompts have a mean reward of {mean:.3g}.")
