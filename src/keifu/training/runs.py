"""The run of a recipe's jobs into a folder: number of steps, resuming, training, saving and the report."""

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from keifu.data.tokenizers.load import tokenizers_kept_in
from keifu.files import write_atomic
from keifu.training.job import Computation, Job, Jobs, JobStage, PlannedSettings
from keifu.training.loop import Summary, train
from keifu.training.protocols import Run
from keifu.training.run import checkpoint, metrics
from keifu.training.run.report import CURVES
from keifu.training.run.run_directory import SAMPLES
from keifu.training.settings import Settings
from keifu.training.setup import steps_within

Write = Callable[[Job, Path], None]  # writes the model of a job that has no `save` of its own
TRIAL_STEPS = 1000  # length of the run whose pace is tried


def run_jobs(jobs: Iterable[Job | Computation], out: Path, resume: bool, write: Write) -> Summary | None:
    """Run the jobs of a recipe one after the other. Return the summary of the last one.

    A stage has a folder inside `out`. A stage that has begun is resumed, and a finished one only loads its result, so
    that the whole run resumes bit for bit. The report of the job without a stage shows the curves of the stages. What
    stops a job is raised in the recipe, where it yields the job.
    """
    summary: Summary | None = None
    result: Any = None
    stages: list[JobStage] = []
    generator: Jobs = jobs if isinstance(jobs, Generator) else (job for job in jobs)
    with closing(generator), tokenizers_kept_in(out):
        while (job := _next(generator, result)) is not None:
            if isinstance(job, Computation):
                result = job.work(out)
                continue
            if job.stage is None and (stages or (out / CURVES).exists()):  # which may be of an earlier run
                show_stages(out, stages)
            directory = out / job.stage.folder if job.stage else out
            try:
                result = summary = run_job(job, directory, resume and bool(checkpoint.steps(directory)), write)
            except BaseException as stop:
                generator.throw(stop)
                raise
            stages += [job.stage] if job.stage else []
    return summary


def _next(generator: Jobs, result: Any) -> Job | Computation | None:
    """Send the result of the last job or computation to the recipe, and return its next job; None after the last."""
    try:
        return generator.send(result)
    except StopIteration:
        return None


def run_job(job: Job, directory: Path, resume: bool, write: Write, replaces: bool = False) -> Summary:
    """Train the model of a job into a folder. replaces: whether an earlier run in the folder is removed."""
    job = resolve(job, directory, resume)
    facts = job.facts
    assert isinstance(job.settings, Settings)
    if resume and facts.watch:  # a resumed run compares with its first figures
        first = next((line for line in metrics.read(directory) if "loss" in line), {})
        list(facts.watch({name: float(value) for name, value in first.items()}))
    run = Run(directory, resume, replaces, facts.options, facts.report(), facts.unit, facts.bytes_per_unit, facts.watch)
    save = job.save or (lambda folder: write(job, folder))
    return train(job.model, job.objective, job.data, job.settings, run, job.sample, save, job.largest)


def resolve(job: Job, directory: Path, resume: bool) -> Job:
    """Return the job with the settings for the steps of its budget, or for those of the resumed run in the folder."""
    settings = job.settings
    if isinstance(settings, PlannedSettings):
        settings = _for_budget(job, settings, directory, resume)
    data = job.data_of_steps(settings.steps) if job.data_of_steps else job.data
    return replace(job, settings=settings, data=data)


def _for_budget(job: Job, plan: PlannedSettings, directory: Path, resume: bool) -> Settings:
    """Return the settings for the budget's steps, or for as many as fit the minutes at the measured speed. A resumed
    run keeps the schedule with which it began."""
    steps, minutes = plan.budget
    if begun := checkpoint.latest_facts(directory) if resume else {}:
        settings = plan.of_steps(begun["described"]["settings"]["steps"])
        return replace(settings, steps=steps or settings.steps)
    if steps is None:
        print(f"Trying the pace, to fit the training into {minutes:g} minutes ...", flush=True)
        data = job.data_of_steps(TRIAL_STEPS) if job.data_of_steps else job.data
        largest = data.batch(0) if job.largest is None else job.largest
        steps = steps_within(minutes, job.model, job.objective, data, plan.of_steps(TRIAL_STEPS), largest)
    return plan.of_steps(steps)


def show_stages(out: Path, stages: Iterable[JobStage]) -> None:
    """Add the curves and the last pictures of finished stages to the report of the run."""
    charts = []
    for stage in stages:
        directory = out / stage.folder
        lines = metrics.last_metrics(metrics.read(directory))
        points = {
            label: [[float(line["step"]), float(line[field])] for line in lines if field in line]
            for label, field in (("training", "loss"), ("validation", "validation_loss"))
        }
        curves = [{"name": name, "points": p, "marked": name == "validation"} for name, p in points.items()]
        charts.append({"title": f"{stage.name}: loss", "y_label": "loss", "curves": curves})
        if pictures := sorted((directory / SAMPLES).glob("*.png")):
            write_atomic(out / f"{directory.name}.png", pictures[-1].read_bytes())
    write_atomic(out / CURVES, json.dumps(charts) + "\n")
