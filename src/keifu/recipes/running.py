"""Running of recipes: their jobs into a folder, with models saved as Hugging Face directories."""

from pathlib import Path
from types import ModuleType
from typing import Any

from keifu import checkpoints
from keifu.training import runs
from keifu.training.job import Job, Jobs
from keifu.training.loop import Summary


def run_recipe(module: ModuleType, recipe: Any, out: Path, resume: bool) -> None:
    """Run the jobs of a recipe into a folder; or the function `run` of a recipe that trains by itself."""
    if "jobs" in vars(module):
        run_jobs(module.jobs(recipe), out, resume)
    else:
        module.run(recipe, out, resume)


def run_jobs(jobs: Jobs, out: Path, resume: bool = False) -> Summary | None:
    """Run the jobs that a recipe yields into a folder. Return the summary of the last one."""
    return runs.run_jobs(jobs, out, resume, save)


def train_job(job: Job, directory: Path, resume: bool = False, replaces: bool = False) -> Summary:
    """Run one job into a folder. replaces: whether an earlier run in the folder is removed."""
    return runs.run_job(job, directory, resume, save, replaces)


def save(job: Job, directory: Path) -> None:
    """Write the model of a job, with its tokenizer, as a Hugging Face directory."""
    checkpoints.save(job.model, job.tokenizer, directory)
