"""A job: everything that one training run consists of. A recipe returns its jobs, and `keifu.training.runs` runs them.

A recipe's `jobs(recipe)` is a generator. It yields a job, and receives the job's `Summary` when that has been trained:
a later stage loads what an earlier one has saved in `summary.directory`.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from keifu.data.attribution import attribution_of
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.training.protocols import Batch, Data, Objective, Sample, Save
from keifu.training.settings import Settings


class Budget(NamedTuple):
    """Number of steps, or a number of minutes, from which the number of steps follows by the machine's speed."""

    steps: int | None
    minutes: float

    @classmethod
    def of(cls, steps: int | None, minutes: float | None, default: float) -> "Budget":
        """Return the budget of the options --steps and --minutes. default: minutes if neither is given."""
        if steps and minutes:
            raise UserError(f"--steps {steps} and --minutes {minutes:g} are two budgets: give one of them.")
        return cls(steps, default if minutes is None else minutes)

    @property
    def limit(self) -> float | None:
        """Number of minutes, for the training loop; None if the budget is in steps."""
        return None if self.steps else self.minutes


@dataclass(frozen=True)
class PlannedSettings:
    """Settings that follow from the number of steps, which the budget decides when the job begins."""

    budget: Budget
    of_steps: Callable[[int], Settings]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Description of a run: the text of its report, and the values that a resumed run must share.

    data: facts about the data, with its name as "source"; its licence is added. options: values that affect the result,
    in addition to the settings. about: further lines of the report. unit: name of the elements that the objective
    counts. bytes_per_unit: converts the loss to bits per byte. watch: called with the figures of each line of metrics;
    returns warnings.
    """

    title: str
    data: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"
    bytes_per_unit: float | None = None
    watch: Callable[[Mapping[str, float]], Iterable[str]] | None = None

    def report(self) -> dict[str, Any]:
        """Return the entries of the report."""
        data = {"data": [{**self.data, **attribution_of(self.data["source"])}]} if self.data else {}
        return {"title": self.title, **self.about, **data}


class JobStage(NamedTuple):
    """Part of a run with several models: its folder in the run's, and its name in the report of the next part."""

    folder: str
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, and everything that is needed to train it.

    data_of_steps: returns the data of a run of that many steps, if they depend on it. tokenizer: saved with the model.
    sample: called with the number of steps done. save: writes the model into the folder; unset: as a Hugging Face
    directory. largest: the batch with the largest memory, if batches differ. stage: unset for the last or only job.
    """

    model: nn.Module
    objective: Objective
    data: Data
    settings: Settings | PlannedSettings
    facts: RunFacts
    tokenizer: Tokenizer | None = None
    sample: Sample | None = None
    save: Save | None = None
    largest: Batch | None = None
    data_of_steps: Callable[[int], Data] | None = None
    stage: JobStage | None = None


@dataclass(frozen=True)
class Computation:
    """Work without the training loop, such as a regression in closed form: a function of the run's folder."""

    work: Callable[[Path], Any]


Result = TypeVar("Result")
# generator of jobs that ends with a result; it receives the Summary of each job, and the result of each computation
JobsReturning = Generator[Job | Computation, Any, Result]
Jobs = JobsReturning[None]
RUN_FOLDER = Computation(lambda folder: folder)  # a recipe yields it to receive the folder of its run


def staged(jobs: Jobs, stage: JobStage) -> Jobs:
    """Yield the jobs of another recipe as a stage of this one."""
    summary = None
    with suppress(StopIteration):
        while True:
            job = jobs.send(summary)
            assert isinstance(job, Job)
            summary = yield replace(job, stage=stage)


def parameters(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
