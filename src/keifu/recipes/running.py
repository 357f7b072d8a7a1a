"""Running of recipes: their jobs into a folder, with models saved as Hugging Face directories."""

from collections.abc import Iterable
from pathlib import Path

from keifu import checkpoints
from keifu.training import runs
from keifu.training.job import Computation, Job
from keifu.training.loop import Summary


def run_jobs(jobs: Iterable[Job | Computation], out: Path, resume: bool = False) -> Summary | None:
    """Run the jobs that a recipe yields into a folder. Return the summary of the last one."""
    return runs.run_jobs(jobs, out, resume, save)


def train_job(job: Job, directory: Path, resume: bool = False, replaces: bool = False) -> Summary:
    """Run one job into a folder. replaces: whether an earlier run in the folder is removed."""
    return runs.run_job(job, directory, resume, save, replaces)


def save(job: Job, directory: Path) -> None:
    """Write the model of a job, with its tokenizer, as a Hugging Face directory."""
    checkpoints.save(job.model, job.tokenizer, directory)
