"""The training loop: steps, and between them metrics, validation, samples and checkpoints; for every model.

The data make the batches, the objective computes the loss. All randomness in a step is a function of the seed and the
step, so a run that was stopped and resumed ends with the same bits as one that was not.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from keifu.errors import UserError
from keifu.threads import follow_load
from keifu.training.hardware import cost as machine
from keifu.training.hardware import failures
from keifu.training.hardware.flops import peak
from keifu.training.hardware.precision import tensor_float32
from keifu.training.loader import Loader, prefetches
from keifu.training.pace import Budget, Pace, TimeLeft
from keifu.training.protocols import Batch, Data, Objective, OnPolicy, Run, Sample, Save
from keifu.training.run import checkpoint, metrics
from keifu.training.run import directory as run_directory
from keifu.training.run.progress import Display, format_seconds, number
from keifu.training.run.report import REPORT, write_report
from keifu.training.settings import Settings, as_chosen
from keifu.training.setup import ADVICE, TrainingSetup, rewind, set_up, tensors
from keifu.training.signals import Interrupted, StopRequest
from keifu.training.step import Gradient


@dataclass(frozen=True)
class Summary:
    """The result of a finished run: its steps, its seconds of training, and the last figures (see metrics.jsonl)."""

    directory: Path
    steps: int
    seconds: float
    figures: dict[str, float | int] = field(default_factory=dict)


def train(
    model: nn.Module,
    objective: Objective,
    data: Data,
    settings: Settings,
    run: Run,
    sample: Sample | None = None,
    save: Save | None = None,
    largest: Batch | None = None,
) -> Summary:
    """Trains a model, on the device where its parameters are, and writes a run directory.

    `sample`: called with the number of steps done, gives a text or a PNG picture. `save`: writes the model into the
    directory. `largest`: the batch to measure memory on; unset: the first one. Data that are `OnPolicy` need it, since
    memory is measured before the weights of a resumed run are loaded. Ctrl-C raises `Interrupted` after the state is
    saved. A number that is not finite, or too little memory, is a `UserError`, raised before the step is made and
    after the state before it is saved.
    """
    follow_load()
    run_directory.claim_directory(run)
    settings = as_chosen(settings)
    tensor_cores = tensor_float32(next(model.parameters()).device)
    with Display(settings.steps, run.unit) as display, StopRequest(display.note) as stop, tensor_cores:
        started = set_up(model, objective, data, settings, run, display.note, largest)
        display.expect(started.progressed.plan.steps)
        sinks = metrics.sinks(run.directory, settings.tensorboard, settings.wandb, started.described)
        at = started.progressed
        with metrics.Metrics(run.directory, sinks, at.step, at.spikes.skipped) as lines:
            loop = _Loop(started, data, started.settings, run, sample, save, display, lines, lambda: stop.wanted)
            try:
                loop.go()
                return loop.finish()
            finally:
                loop.loader.close()


@dataclass
class _Loop:
    """A run between its start and its end."""

    started: TrainingSetup
    data: Data
    settings: Settings
    run: Run
    sample: Sample | None
    save: Save | None
    display: Display
    lines: metrics.Metrics
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self.stepper, self.at = self.started.stepper, self.started.progressed
        s, whole = self.settings, self.settings.whole_steps
        self.pace = Pace(self.at.seconds, self.at.passed)
        self.left = TimeLeft(whole(self.at.step), whole(self.at.plan.steps))
        every = {"validation": s.evaluate_every, "sample": s.sample_every, "state": s.save_every}
        seconds = None if s.minutes is None else 60 * s.minutes
        self.budget = Budget(seconds, self.pace, self.at.step, every)
        self.peak = peak(self.stepper.device, self.stepper.dtype)
        self.figures, self.validated, self.gradient_norm = self.lines.latest(), self.lines.validated, math.nan
        self.saved = self.at.step if self.run.resume else -1
        self.on_policy = isinstance(self.data, OnPolicy)
        device = self.stepper.device
        self.loader = Loader(self.data.batch, device, prefetches(device) and not self.on_policy)
        self.how = run_directory.how_to_resume(self.run)
        self._write_recipe({})

    def go(self) -> None:
        """Makes all remaining steps."""
        self.stepper.model.train()
        if self.at.spikes.due(self.at.step):
            self._save_state()
        while self.at.step < self.at.plan.steps:
            gradient = self._finite(self._batch())
            if gradient is None:
                self._stopped()
            if self.settings.spikes.rise and self.at.spikes.complete(gradient.sums.means()["loss"]):
                self._rewind(gradient)
            else:
                self.started.optimisers.step(self.at.step, self.at.plan.ahead(self.at.step))
                self.stepper.scale.count()
                self._count(gradient)
                self._between()

    def finish(self) -> Summary:
        """Makes the last validation, sample and checkpoint, and writes the model and the report."""
        if self.validated != self.at.step:
            self._evaluate()
            self._sample()
        self._save_state()
        self._leave({"finished": True})
        report = self.run.directory / REPORT
        self.display.note(f"Done: {number(self.at.step, 'step')} in {format_seconds(self.at.seconds)}. See {report}.")
        return Summary(self.run.directory, self.at.step, self.at.seconds, self.figures)

    def _batch(self) -> Batch:
        """The batch of the next step; the one after it is prefetched, unless it depends on the weights."""
        with self._whole():
            index = self.at.step + self.at.spikes.skipped
            more = self.at.step + 1 < self.at.plan.steps and not self.on_policy
            return self.loader.get(index, index + 1 if more else None)

    def _finite(self, batch: Batch) -> Gradient | None:
        """The gradient, checked to be finite; None where a stop was requested.

        This check is the only point in a step where the host waits for the device. An overflow in float16 is computed
        again with a lower loss scale.
        """
        while True:
            gradient = None if self.stop() else self._gradient(batch)
            if gradient is None or failures.is_finite(gradient.norm + gradient.sums.total):
                return gradient
            if not (failures.is_finite(gradient.sums.total) and self.stepper.scale.lower()):
                self._not_finite(batch)
            self.started.optimisers.drop_gradients()

    def _gradient(self, batch: Batch) -> Gradient | None:
        """The gradient; where it does not fit into memory, with half as many rows at a time, down to one."""
        with self._whole():
            while True:
                try:
                    with failures.explain_out_of_memory(ADVICE):
                        return self.stepper.gradient(self.at.step, batch, self.stop)
                except failures.OutOfMemory as error:
                    reason = str(error).partition(";")[0]
                    if not self.stepper.halve(batch):
                        raise
                self.started.optimisers.drop_gradients()
                machine.release(self.stepper.device)
                now = f"from here {self.stepper.micro_batch} rows are computed at a time, which changes no loss"
                self.display.note(f"Step {self.at.step + 1:,}: {reason}; {now}.")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A block that does not change the weights: where it fails, the state is saved first."""
        try:
            with failures.explain_out_of_memory(ADVICE):
                yield
        except failures.OutOfMemory as error:
            raise failures.OutOfMemory(self._refuse(str(error))) from error
        except Exception as error:
            error.add_note(self._refuse("See above."))
            raise

    def _count(self, gradient: Gradient) -> None:
        at = self.at
        at.step += 1
        at.sums = gradient.sums if at.sums is None else at.sums + gradient.sums
        self.gradient_norm = gradient.norm
        self.display.advance(at.step)

    def _rewind(self, gradient: Gradient) -> None:
        """Goes back to a checkpoint before a loss spike and skips batches; the step is not made."""
        spiked, loss = self.at.step, gradient.sums.means()["loss"]
        with self.pace.paused():
            try:
                before = checkpoint.read(self.run.directory, self.at.spikes.target(spiked))
                self.started = rewind(self.started, before, self.data)
            except UserError as error:
                raise UserError(self._refuse(str(error))) from None
            self.at = self.started.progressed
            self._record({"rewound_from": spiked, "spike_loss": loss})
            self.saved = -1
            self._save_state()
        self.display.advance(self.at.step)
        self.display.note(f"Step {spiked:,}: {self.at.spikes.sentence(self.at.step, loss)}")

    def _between(self) -> None:
        """Metrics, validation, samples and checkpoints that are due after a step; not counted as training time."""
        s, last = self.settings, self.at.step == self.at.plan.steps
        if last or self.at.step % s.log_every == 0:
            self._log()
        if not last:
            self._plan(self.budget.steps(self.at.step, self.at.plan.steps))
        known = {*self.pace.lasted}
        with self.pace.paused():
            if self._due(s.evaluate_every):
                with self.pace.timed("validation"):
                    self._evaluate()
            if self._due(s.sample_every):
                with self.pace.timed("sample"):
                    self._sample()
            if self._due(s.save_every) or (self.at.spikes.due(self.at.step) and not last):
                with self.pace.timed("state"), self._tolerating(f"The state of step {self.at.step:,}"):
                    self._save_state()
        if {*self.pace.lasted} - known - {"state"}:
            self._expectation()

    def _expectation(self) -> None:
        """Shows how long validation, samples and checkpoints take, when first measured, and the time left."""
        took = ", ".join(f"a {name} took {format_seconds(seconds)}" for name, seconds in self.pace.lasted.items())
        left = self.budget.left(self.at.step, self.at.plan.steps)
        self.display.note(
            f"Step {self.at.step:,}: {took}; with what is to come, about {format_seconds(left)} are left."
        )

    def _plan(self, steps: int) -> None:
        """Changes the number of steps to what fits into the time; recorded in the metrics and in checkpoints."""
        if steps != self.at.plan.steps:
            self.at.plan = self.at.plan.changed(self.at.step, steps)
            self._record({"planned_steps": steps})
            self.display.expect(steps)
            self.left.total = self.settings.whole_steps(steps)

    def _due(self, every: int) -> bool:
        """Whether something with this interval is due now; the last step is handled by `finish`."""
        return bool(every) and self.at.step % every == 0 and self.at.step < self.at.plan.steps

    def _log(self) -> None:
        """Writes a line of metrics from the sums since the last one; reading them waits for the device."""
        at = self.at
        assert at.sums is not None
        units, means = float(at.sums.weight), at.sums.means()
        rate = units / self.pace.lap()
        at.seconds, at.sums = self.pace.seconds, None
        figures = {
            **means,
            **self.started.optimisers.rates(at.step - 1, at.plan.ahead(at.step - 1)),
            "gradient_norm": float(self.gradient_norm),
            f"{self.run.unit}_per_second": rate,
            "flops_utilisation": rate * self.started.cost.flops_per_unit / self.peak,
            "seconds": at.seconds,
        }
        self._record(figures)
        self.display.show({**figures, "seconds_left": self.left.seconds(self.settings.whole_steps(at.step))})
        if warning := at.divergence.watch(means["loss"]):
            self.display.note(f"Step {at.step:,}: {warning}")
        for warning in self.run.watch(means) if self.run.watch else ():
            self.display.note(f"Step {at.step:,}: {warning}")

    def _evaluate(self) -> None:
        """The validation figures, and bits per byte where the run gives the bytes per element."""
        self.loader.wait()
        with self._whole(), self.started.optimisers.averaged():
            means = self.stepper.validation(self.data.validation())
        figures = {f"validation_{name}": value for name, value in means.items()}
        if means and self.run.bytes_per_unit:
            figures["bits_per_byte"] = means["loss"] / math.log(2) / self.run.bytes_per_unit
        if figures:
            self._record(figures)
            words = (f"{n.replace('_', ' ')} {value:.4g}" for n, value in figures.items() if "/" not in n)
            self.display.note(f"step {self.at.step:,}  {'  '.join(words)}")
        self.validated = self.at.step

    def _record(self, figures: dict[str, float | int]) -> None:
        skipped = self.at.spikes.skipped
        figures = figures | ({"skipped": skipped} if skipped else {})
        self.figures |= figures
        self.lines.write(self.at.step, figures)

    def _sample(self) -> None:
        if self.sample is None:
            return
        self.loader.wait()
        self.stepper.model.eval()
        with self._whole(), self.started.optimisers.averaged():
            sample = self.sample(self.at.step)
        self.stepper.model.train()
        with self._tolerating(f"The sample of step {self.at.step:,}"):
            run_directory.write_sample(self.run.directory, self.at.step, sample)
        if isinstance(sample, str):
            self.display.note(textwrap.indent(sample, "  | "))

    def _save_state(self) -> None:
        if self.saved != self.at.step:
            self.at.passed = self.pace.passed
            facts = {"described": self.started.described, "resolved": self.started.resolved(), **self.at.facts()}
            facts["length"] = self.started.length.facts()
            facts["loss_scale"] = self.stepper.scale.facts()
            rules = self.settings.spikes
            reach = rules.reach if rules.rise else 0
            held = tensors(self.started, self.data)
            checkpoint.save(self.run.directory, self.at.step, held, facts, self.settings.keep, reach)
            self.saved = self.at.step

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """A block in which a failed write does not stop the run: it is shown, and tried again when next due."""
        try:
            yield
        except (OSError, UserError) as error:
            self.display.note(f"{what} was not saved: {error} Training goes on.")

    def _stopped(self) -> NoReturn:
        self._save_state()
        self._leave({"finished": False})
        raise Interrupted(f"Stopped after step {self.at.step:,}; the state is saved. To go on:\n{self.how}")

    def _not_finite(self, batch: Batch) -> NoReturn:
        with self.pace.paused():
            reason = self.stepper.explain(self.at.step, batch)
        advice = "A lower learning rate, a longer warm-up, a smaller clip or float32 helps."
        raise failures.NotFinite(self._refuse(f"In the next step {reason}. {advice}"))

    def _refuse(self, text: str) -> str:
        """Saves the state of the last complete step; gives the text of the error with how to resume."""
        self.started.optimisers.drop_gradients()
        self._save_state()
        return f"Stopped after step {self.at.step:,}, whose state is saved. {text} To go on: {self.how}"

    def _leave(self, outcome: dict[str, Any]) -> None:
        """Writes the model, the results into recipe.json, and the report."""
        if self.save:
            self.stepper.model.eval()
            with self.started.optimisers.averaged():
                self.save(self.run.directory)
        figures = {"steps": self.at.step, "figures": self.figures}
        self._write_recipe({**outcome, **figures, "hashes": run_directory.hashes(self.run.directory)})
        write_report(self.run.directory)

    def _write_recipe(self, outcome: dict[str, Any]) -> None:
        measured = {"flops_per_second": self.peak}
        cost = dataclasses.asdict(self.started.cost)
        facts = {
            "settings": self.started.described["settings"],
            "resolved": self.started.resolved() | measured,
            "cost": cost,
        }
        facts |= {"data_fingerprint": self.started.described["data"], "unit": self.run.unit}
        facts |= {"length": self.started.length.facts()}
        run_directory.write_recipe(self.run, facts | outcome, self.started.length.steps)
