"""The training loop of every model: steps, and between them metrics, validations, samples and checkpoints.

The data make the batches and the objective computes the loss. All random numbers of a step depend only on the seed and
the step, so a run that is stopped and resumed ends with the same bits as an uninterrupted one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from torch import nn

from keifu.errors import UserError
from keifu.memory import keep_freed, release
from keifu.processes import current
from keifu.threads import follow_load
from keifu.training.hardware import failures
from keifu.training.hardware.precision import deterministic, tensor_float32
from keifu.training.loader import Loader, own_rows, prefetches
from keifu.training.pace import busy
from keifu.training.protocols import Batch, Data, Objective, OnPolicy, Run, Sample, Save
from keifu.training.recorder import Recorder
from keifu.training.run import checkpoint, metrics, outcome, run_directory
from keifu.training.run.progress import Display, format_bytes, format_seconds, number
from keifu.training.run.report import REPORT
from keifu.training.settings import Settings, as_chosen
from keifu.training.setup import set_up
from keifu.training.signals import Interrupted, LeftAtOnce, StopRequest
from keifu.training.trainer import Gradient

LARGE = 1e9  # bytes that take some seconds to write
LEAST = 10  # a run that a time limit stops before this many steps has learned nothing


class Summary(NamedTuple):
    """Result of a finished run: its steps, its seconds of training, and the last figures (see metrics.jsonl)."""

    directory: Path
    steps: int
    seconds: float
    figures: dict[str, float | int]


def train(
    model: nn.Module, objective: Objective, data: Data, settings: Settings, run: Run, sample: Sample | None = None,
    save: Save | None = None, largest: Batch | None = None,
) -> Summary:  # fmt: skip
    """Train a model on the device of its parameters, and write a run directory.

    sample: called with the number of steps done; returns a text or a PNG picture. save: writes the model into the
    directory. largest: the batch to measure memory with; unset: the first one. `OnPolicy` data require it, since memory
    is measured before a resumed run's weights are loaded.

    Ctrl-C saves the state and raises `Interrupted`. Raises UserError for a number that is not finite, or too little
    memory; the failed step is not applied, and the state before it is saved.
    """
    follow_load()
    settings = as_chosen(settings)
    device = next(model.parameters()).device
    with (
        run_directory.owned(run.directory),
        Display(settings.steps, run.unit) as display,
        StopRequest(display.note) as stop,
        tensor_float32(device, settings.precision),
        deterministic(device, settings.deterministic),
        keep_freed(device),
    ):
        run_directory.claim_directory(run)
        current().barrier()
        at_once = stop.at_once if current().world_size == 1 else nullcontext  # several processes stop together
        with at_once():
            trainer, cost = set_up(model, objective, data, settings, run, display.note, largest)
        state = trainer.state
        display.expect(state.length.steps)
        sinks = metrics.sinks(run.directory, settings.tensorboard, settings.wandb, state.described)
        with closing(metrics.RunMetrics(run.directory, sinks, state.step, state.spikes.skipped)) as lines:
            recorder = Recorder(trainer, cost, run, save, display, lines)
            loop = _Loop(recorder, data, sample, lambda: current().broadcast(stop.wanted), at_once)
            with closing(loop.loader):
                loop.make_steps()
                return loop.finish()


class _Loop:
    """Loop over the steps of a run, the work between steps, and the reaction to a failed step."""

    def __init__(
        self, recorder: Recorder, data: Data, sample: Sample | None, stop: Callable[[], bool],
        at_once: Callable[[], AbstractContextManager[None]],
    ):  # fmt: skip
        self.recorder, self.data, self.sample, self.stop, self.at_once = recorder, data, sample, stop, at_once
        self.trainer, self.run, self.note = recorder.trainer, recorder.run, recorder.display.note
        self.state, self.settings = self.trainer.state, self.trainer.settings
        s, device = self.settings, self.trainer.device
        self.chosen = {"validation": s.evaluate_every, "sample": s.sample_every, "state": s.save_every}
        self.limit = None if s.minutes is None else 60 * s.minutes
        self.state.clock.start(self.state.step, self.chosen, self.limit, s.whole_steps)
        self._set_intervals()
        self.short = False  # whether a note has said that few steps fit into the time limit
        self.validated, self.gradient_norm = recorder.lines.validated, math.nan
        self.on_policy = isinstance(data, OnPolicy)
        self.loader = Loader(partial(own_rows, data), device, prefetches(device) and not self.on_policy)

    def make_steps(self) -> None:
        """Train until the last step."""
        state = self.state
        self.trainer.model.train()
        if state.spikes.due(state.step):
            self.recorder.save_state()
        if not state.step:  # evaluate the untrained model, which also measures the time of both
            self._estimate()
            self._make(["validation", "sample"] if self.validated is None else ["sample"])
            if self.limit and not self.on_policy:
                fitting = state.clock.fitting(0, state.length.steps, self.recorder.cost.step_seconds)
                self._fit(current().broadcast(fitting))
                self._set_intervals()
        elif self.validated != state.step and self._is_due("validation"):  # the run was stopped in this validation
            self._make(["validation"])
        self._estimate()
        while state.step < state.length.steps:
            gradient = self._gradient()
            if gradient is None:
                self._stopped()
            elif self.settings.spikes.rise and state.spikes.complete(gradient.sums.means()["loss"]):
                self._rewind(gradient)
            else:
                self.trainer.update(gradient)
                self.gradient_norm = gradient.norm
                self.recorder.display.advance(state.step)
                self._between()

    def finish(self) -> Summary:
        """Run the last validation, sample and checkpoint, and write the model and the report."""
        state = self.state
        if self.validated != state.step:
            self._evaluate()
            if state.clock.skips("sample"):
                self.note("No last sample is made: it would take too much of the time.")
            else:
                self._sample()
        self.recorder.save_state()
        self.recorder.close(is_finished=True)
        if sentence := outcome.learned(metrics.read(self.run.directory), self.recorder.figures, language="en"):
            self.note(sentence)
        report, seconds = self.run.directory / REPORT, state.clock.seconds
        planned, least = state.length.first or state.length.steps, 0 if self.on_policy else LEAST
        if self.limit and state.step < max(planned / 10, least):
            done = f"Out of time: {number(state.step, 'step')} of {planned:,} made{busy()}."
            self.note(f"{done} The model has learned next to nothing; give more --minutes. See {report}.")
        else:
            self.note(f"Done: {number(state.step, 'step')} in {format_seconds(seconds)}. See {report}.")
        return Summary(self.run.directory, state.step, seconds, self.recorder.figures)

    def _gradient(self) -> Gradient | None:
        """Return the gradient of the next step, checked to be finite; None if a stop was requested.

        The check is the only point of a step where the host waits for the device. After an overflow in float16 the
        gradient is computed again with a lower loss scale.
        """
        with self._saving_on_failure():
            batch = self._batch()
            gradient = self._fitting_gradient(batch)
        while gradient is not None and not failures.is_finite(gradient.norm + gradient.sums["total"]):
            if not (failures.is_finite(gradient.sums["total"]) and self.state.scale.lower()):
                self._not_finite(batch)
            self.trainer.optimizers.drop_gradients()
            with self._saving_on_failure():
                gradient = self._fitting_gradient(batch)
        return gradient

    def _batch(self) -> Batch:
        """Return the batch of the next step, and prefetch the one after it, unless that depends on the new weights."""
        index = self.state.step + self.state.spikes.skipped
        if self.on_policy:  # rollouts take long, and later ones are made again from the weights and the seed
            with self._leaving_on_stop(), self.at_once():
                return self.loader.get(index, None)
        return self.loader.get(index, index + 1 if self.state.step + 1 < self.state.length.steps else None)

    def _fitting_gradient(self, batch: Batch) -> Gradient | None:
        """Return the gradient; None if a stop was requested. While it does not fit into memory, halve the micro-batch,
        down to one row.
        """
        trainer, step = self.trainer, self.state.step
        current().begin_step(step)
        alone, stopped = current().world_size == 1, self.stop()
        while not stopped:
            try:
                with failures.explain_out_of_memory():
                    return trainer.gradient(step, batch, self.stop if alone else lambda: False)
            except failures.OutOfMemory as error:
                reason = str(error).partition(";")[0]
                if not trainer.halve(batch):
                    raise
            trainer.drop_gradients()
            release(trainer.device)
            now = f"from here {trainer.micro_batch} rows are computed at a time, which changes no loss"
            self.note(f"Step {step + 1:,}: {reason}; {now}.")
            stopped = alone and self.stop()
        return None

    @contextmanager
    def _saving_on_failure(self) -> Iterator[None]:
        """Run a block that does not change the weights. If it fails, save the state first."""
        try:
            with failures.explain_out_of_memory():
                yield
        except failures.OutOfMemory as error:
            raise failures.OutOfMemory(self._refuse(str(error))) from error
        except Exception as error:
            if current().world_size == 1 and self.stop():  # Ctrl-C also kills a compiler that the step waits for
                self._stopped()
            error.add_note(self._refuse("See above."))
            raise

    def _rewind(self, gradient: Gradient) -> None:
        """Go back to a checkpoint before a loss spike and skip batches. The current step is not applied."""
        state, recorder = self.state, self.recorder
        spiked, loss = state.step, gradient.sums.means()["loss"]
        with state.clock.paused():
            try:
                current().flush()  # that checkpoint may still be being written
                current().barrier()
                state.rewind(checkpoint.read(self.run.directory, state.spikes.target(spiked)))
            except UserError as error:
                raise UserError(self._refuse(str(error))) from None
            recorder.write({"rewound_from": spiked, "spike_loss": loss})
            recorder.saved = -1
            recorder.save_state()
        recorder.display.advance(state.step)
        self.note(f"Step {spiked:,}: {state.spikes.sentence(state.step, loss)}")

    def _between(self) -> None:
        """Write metrics, and run the validations, samples and checkpoints that are due after a step."""
        step, steps = self.state.step, self.state.length.steps
        if step == steps or step % self.settings.log_every == 0:
            self.recorder.log(float(self.gradient_norm))
        if step == steps:
            return  # `finish` does the rest
        if self.limit:
            self._fit(current().broadcast(self.state.clock.steps(step, steps)))
        due = [name for name in self.chosen if self._is_due(name)]
        if self.settings.spikes.rise and self.state.spikes.due(step) and "state" not in due:
            due.append("state")
        self._make(due)

    def _is_due(self, name: str) -> bool:
        """Return whether a validation, sample or checkpoint is due after this step."""
        every = self.state.clock.interval(name, self.state.length.steps)
        return bool(every) and self.state.step % every == 0

    def _make(self, due: list[str]) -> None:
        """Run the due validations, samples and checkpoints. Their time is measured and does not count as
        training time."""
        work = {"validation": self._evaluate, "sample": self._sample, "state": self.recorder.try_to_save_state}
        for name in due:
            with self.state.clock.paused(name):
                work[name]()

    def _set_intervals(self) -> None:
        """Set the steps between validations, samples and checkpoints, in proportion to the steps that fit a
        time limit."""
        length = self.state.length
        ratio = (length.first or length.scheduled) / length.scheduled
        chosen = self.chosen.items()
        self.state.clock.every = {name: max(1, round(every * ratio)) if every else 0 for name, every in chosen}

    def _estimate(self) -> None:
        """Show an estimate of the remaining time, with validations and samples."""
        step, whole = self.state.step, self.settings.whole_steps
        steps = max(step, self.state.length.steps)
        cost, extra = self.recorder.cost, self.state.clock.left(step, steps)
        between = bool(self.state.clock.lasted)  # they were measured
        done = whole(steps) - whole(step)
        self.note(cost.sentence(steps - step, self.run.unit, done, extra, self.on_policy, between))

    def _fit(self, steps: int) -> None:
        """Change the number of steps to the number that fits the time limit, and record it in the metrics."""
        length = self.state.length
        if steps == length.steps:
            return
        planned = length.first or length.scheduled
        if steps < planned / 2 and not self.short:
            self.short = length.first is not None
            self.note(f"Only {steps:,} of {planned:,} steps fit into {format_seconds(self.limit or 0)}{busy()}.")
        self.state.length = length.fitted(self.state.step, steps)
        self.recorder.write({"planned_steps": steps})
        self.recorder.display.expect(steps)

    def _evaluate(self) -> None:
        """Compute the validation figures."""
        self.loader.wait()
        with self._leaving_on_stop(), self._saving_on_failure(), self.state.optimizers.averaged(), self.at_once():
            means = self.trainer.validation(self.data.validation())
        if means:
            with self.state.optimizers.averaged():
                self.recorder.validated(means)
        self.validated = self.state.step

    def _sample(self) -> None:
        if self.sample is None or not current().is_replicated or not current().is_main:
            return  # a split model is not sampled from
        self.loader.wait()
        self.trainer.model.eval()
        with self._leaving_on_stop(), self._saving_on_failure(), self.recorder.tolerating("sample", "made"):
            with self.state.optimizers.averaged(), self.at_once():
                sample = self.sample(self.state.step)
            self.recorder.write_sample(sample)
        self.trainer.model.train()

    @contextmanager
    def _leaving_on_stop(self) -> Iterator[None]:
        """Run a block; if a stop request leaves it, save the state and end the run."""
        try:
            yield
        except LeftAtOnce:
            self._stopped()

    def _stopped(self) -> NoReturn:
        if (size := self.recorder.bytes_to_save()) > LARGE:
            self.note(f"{format_bytes(size)} are being written: the state, and the model.")
        self.recorder.save_state()
        self.recorder.close(is_finished=False)
        how = run_directory.how_to_resume(self.run)
        raise Interrupted(f"Stopped after step {self.state.step:,}; the state is saved. To go on:\n{how}")

    def _not_finite(self, batch: Batch) -> NoReturn:
        with self.state.clock.paused():
            reason = self.trainer.explain(self.state.step, batch)
        if current().is_replicated:  # another process may know more; a split model's communication would hang
            reason = next((text for text in current().gather(reason) if text != failures.NOT_AGAIN), reason)
        advice = "A lower learning rate, a longer warm-up, a smaller clip or float32 helps."
        raise failures.NotFinite(self._refuse(f"In the next step {reason}. {advice}"))

    def _refuse(self, text: str) -> str:
        """Save the state of the last complete step. Return the error's text followed by how to resume."""
        self.state.optimizers.drop_gradients()
        if current().is_replicated:  # a split model's state needs all processes, which may not come
            self.recorder.save_state()
        how = run_directory.how_to_resume(self.run)
        kept = "saved" if self.recorder.saved == self.state.step else "not saved"
        return f"Stopped after step {self.state.step:,}, whose state is {kept}. {text} To go on: {how}"
