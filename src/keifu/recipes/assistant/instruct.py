"""InstructGPT's three steps in one command (Ouyang et al., 2022): supervised fine-tuning, reward model, PPO.

Paper: "Training language models to follow instructions with human feedback". Each step is the recipe of its name, with
all of its options: sft, reward and ppo, each in a separate folder. The second and third steps start from the results
before them. One report shows all three. A stopped run resumes at any point, also within a step.
Command: keifu train instruct --model smollm2 --sft.data chats.jsonl --reward.data preferences.jsonl
Cost: the cost of each step is printed before it starts.
Expected: see docs/results.md, "InstructGPT's pipeline".
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from keifu.data.chat import conversations
from keifu.data.text.documents import documents
from keifu.errors import UserError, shell
from keifu.files import write_atomic
from keifu.recipes.assistant import ppo as third, reward as second, sft as first
from keifu.recipes.assistant.finetuning import make_rewards, prompt_parts
from keifu.recipes.options import to_json
from keifu.training.job import RUN_FOLDER, Jobs, JobStage, staged
from keifu.training.run.report import write_joined
from keifu.training.run.run_directory import RECIPE, command, read_recipe, record, recorded
from keifu.training.settings import compare, flat
from keifu.training.signals import Interrupted
from keifu.untrusted import read_json_object

PHASES = "phases.json"  # options of each finished step


@dataclass(frozen=True)
class Recipe:
    """Options of the run. The model and the reward of a step come from the steps before it."""

    model: str = "smollm2"
    """The language model that becomes an assistant: a run, a directory, a catalogue name or a hub id."""
    sft: first.Recipe = field(default_factory=first.Recipe)
    """The first step: supervised fine-tuning."""
    reward: second.Recipe = field(default_factory=second.Recipe)
    """The second: the reward model."""
    ppo: third.Recipe = field(default_factory=lambda: third.Recipe(data="prompts.jsonl"))
    """The third: proximal policy optimisation."""

    def __post_init__(self) -> None:
        values = {"sft.model": self.sft.model, "reward.model": self.reward.model, "ppo.model": self.ppo.model}
        values["ppo.reward"] = self.ppo.reward
        defaults = {"sft.model": first.Recipe().model, "reward.model": second.Recipe().model}
        defaults |= {"ppo.model": third.Recipe().model, "ppo.reward": third.Recipe().reward}
        if wrong := [f"--{name}" for name, value in values.items() if value != defaults[name]]:
            raise UserError(
                f"{' and '.join(wrong)} cannot be chosen here, where the step before decides: leave it out, choose "
                "--model, or train each step by its own recipe."
            )


class Phase(NamedTuple):
    """Step of the pipeline: its name, recipe, module of the recipe, and folder."""

    name: str
    recipe: Any
    jobs: Callable[[Any], Jobs]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the step has finished."""
        return bool(read_recipe(self.folder).get("finished"))


def phases(recipe: Recipe, out: Path) -> Iterator[Phase]:
    """Yield the three steps with their folders. Each starts from the results of earlier steps."""
    tuned, judge = out / "sft", out / "reward"
    yield Phase("sft", replace(recipe.sft, model=recipe.model), first.jobs, tuned)
    yield Phase("reward", replace(recipe.reward, model=str(tuned)), second.jobs, judge)
    yield Phase("ppo", replace(recipe.ppo, model=str(tuned), reward=str(judge)), third.jobs, out / "ppo")


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of the three steps, or of the unfinished ones, and write one report of all."""
    out = yield RUN_FOLDER
    steps = [*phases(recipe, out)]
    done = read_json_object(out / PHASES) if (out / PHASES).is_file() else {}
    for phase in steps:
        if phase.finished:
            check(phase, done)
        else:
            INPUTS[phase.name](phase.recipe)
    for number, phase in enumerate(steps, 1):
        if phase.finished:
            print(f"{number} of 3, {phase.name}: done before, in {phase.folder}.", flush=True)
            continue
        print(f"{number} of 3, {phase.name}, in {phase.folder}:", flush=True)
        if not recorded(phase.folder):
            record(phase.folder, phase.name, to_json(phase.recipe), place=str(Path.cwd()))
        try:
            yield from staged(phase.jobs(phase.recipe), JobStage(phase.name))
        except Interrupted as stop:
            where = f"Stopped in step {number} of 3, {phase.name}."
            raise Interrupted(f"{where} To go on:\n{command(out)}", stop.number) from stop
        done[phase.name] = flat(asdict(phase.recipe))
        write_atomic(out / PHASES, json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    report = write_joined(out, f"{recipe.model} becomes an assistant", summary(steps), [step.folder for step in steps])
    print(f"The assistant is in {steps[-1].folder}: keifu chat {shell(steps[-1].folder)} (see {report})")


def _demonstrations(recipe: first.Recipe) -> None:
    first.split(first.select_conversations(list(conversations.read(recipe.data)), recipe.limit), recipe.held_out)


def _rankings(recipe: second.Recipe) -> None:
    second.require_whole()
    prompt_parts(recipe.data, recipe.held_out)
    _ = list(conversations.read(recipe.demonstrations)) if recipe.demonstrations else []


def _prompts(recipe: third.Recipe) -> None:
    recipe.parts()
    for name in recipe.measured:
        make_rewards(name)
    _ = next(iter(documents(recipe.text.data)), "") if recipe.text.data else ""


# read the data of a step, so that errors are reported before the first step begins
INPUTS: dict[str, Callable[[Any], None]] = {"sft": _demonstrations, "reward": _rankings, "ppo": _prompts}


def check(phase: Phase, done: dict[str, dict[str, Any]]) -> None:
    """Raise `UserError` if the options of a finished step have changed, because later steps depend on it."""
    if phase.name not in done:
        return
    if changed := compare(done[phase.name], flat(asdict(phase.recipe))):
        names = ", ".join(f"--{phase.name}.{option}" for option in changed)
        raise UserError(
            f"The step {phase.name} is done, and these options of it differ: {names}; put them back, or choose another "
            "folder with --out."
        )


def summary(steps: list[Phase]) -> str:
    """Return a line with the last figures of each step."""
    figure_names = {"sft": ("validation_loss",), "reward": ("validation_accuracy", "validation_loss")}
    figure_names["ppo"] = (
        "reward",
        "kl",
        "validation_reward",
        "validation_kl",
        "validation_length",
        "validation_text_loss",
    )
    lines = []
    for phase in steps:
        figures = read_json_object(phase.folder / RECIPE)["figures"]
        words = [
            f"{name.replace('_', ' ')} {figures[name]:.4g}" for name in figure_names[phase.name] if name in figures
        ]
        lines.append(f"{phase.name:7} {'   '.join(words)}")
    return "\n".join(lines)
