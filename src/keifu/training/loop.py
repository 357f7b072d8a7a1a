"""The training loop: steps, and between them metrics, validation, samples and checkpoints; for every model.

The data make the batches, the objective computes the loss. All randomness in a step is a function of the seed and the
step, so a run that was stopped and resumed ends with the same bits as one that was not.
"""

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from keifu.errors import UserError
from keifu.memory import keep_freed, release
from keifu.processes import current
from keifu.threads import follow_load
from keifu.training.hardware import failures
from keifu.training.hardware.flops import measure_peak, peak
from keifu.training.hardware.precision import deterministic, tensor_float32
from keifu.training.loader import Loader, prefetches
from keifu.training.pace import Budget, Pace, TimeLeft, busy
from keifu.training.protocols import Batch, Data, Objective, OnPolicy, Run, Sample, Save
from keifu.training.run import best, checkpoint, metrics
from keifu.training.run import directory as run_directory
from keifu.training.run.progress import Display, format_seconds, number
from keifu.training.run.report import REPORT, write_report
from keifu.training.settings import Settings, as_chosen
from keifu.training.setup import Setup, set_up
from keifu.training.signals import Interrupted, StopRequest
from keifu.training.state import Sums
from keifu.training.trainer import Gradient


@dataclass(frozen=True)
class Summary:
    """The result of a finished run: its steps, its seconds of training, and the last figures (see metrics.jsonl)."""

    directory: Path
    steps: int
    seconds: float
    figures: dict[str, float | int] = field(default_factory=dict)


def train(
    model: nn.Module, objective: Objective, data: Data, settings: Settings, run: Run, sample: Sample | None = None,
    save: Save | None = None, largest: Batch | None = None,
) -> Summary:  # fmt: skip
    """Trains a model, on the device where its parameters are, and write a run directory.

    `sample`: called with the number of steps done, gives a text or a PNG picture. `save`: writes the model into the
    directory. `largest`: the batch to measure memory on; unset: the first one. Data that are `OnPolicy` need it, since
    memory is measured before the weights of a resumed run are loaded. Ctrl-C raises `Interrupted` after the state is
    saved. A number that is not finite, or too little memory, is a `UserError`, raised before the step is made and
    after the state before it is saved.
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
        setup = set_up(model, objective, data, settings, run, display.note, largest)
        state = setup.trainer.state
        display.expect(state.length.steps)
        sinks = metrics.sinks(run.directory, settings.tensorboard, settings.wandb, setup.described)
        with metrics.Metrics(run.directory, sinks, state.step, state.spikes.skipped) as lines:
            loop = _Loop(setup, data, run, sample, save, display, lines, lambda: current().broadcast(stop.wanted))
            try:
                loop.make_steps()
                return loop.finish()
            finally:
                loop.loader.close()


class _Loop:
    """A run of a trainer in a directory: its steps, and what comes between them."""

    def __init__(
        self, setup: Setup, data: Data, run: Run, sample: Sample | None, save: Save | None, display: Display,
        lines: metrics.Metrics, stop: Callable[[], bool],
    ):  # fmt: skip
        self.trainer, self.cost, self.described, evaluate_every = setup
        self.state, self.settings = self.trainer.state, self.trainer.settings
        self.data, self.run, self.sample, self.save = data, run, sample, save
        self.display, self.lines, self.stop = display, lines, stop
        s, state, device = self.settings, self.state, self.trainer.device
        self.pace = Pace(state.seconds, state.passed, state.lasted)
        self.left = TimeLeft(s.whole_steps(state.step), s.whole_steps(state.length.steps))
        self.every = {"validation": evaluate_every, "sample": s.sample_every, "state": s.save_every}
        self.budget = Budget(None if s.minutes is None else 60 * s.minutes, self.pace, state.step, self.every)
        self.peak = peak(device, self.trainer.dtype)
        self.peak_trials = 3  # how often it may be measured again
        self.short = False  # whether the display has shown that few steps fit into the minutes
        self.figures, self.validated, self.gradient_norm = lines.latest, lines.validated, math.nan
        self.saved = state.step if run.resume else -1
        if run.resume and current().is_main:  # a kill may have come before these were removed
            self._remove_old_states(state.step)
        self.best = best.read(run.directory) if self._keeps_best() else None
        self.on_policy = isinstance(data, OnPolicy)
        self.record = run_directory.recorded(run.directory)
        self.loader = Loader(data.batch, device, prefetches(device) and not self.on_policy)
        if lines.damaged:
            where = ", ".join(map(str, lines.damaged))
            display.note(f"{lines.path} is damaged in line {where}, which is left out.")
        self._write_recipe({})
        run_directory.keep_tokenizers(run)

    def make_steps(self) -> None:
        """Make all remaining steps."""
        self.trainer.model.train()
        if self.state.spikes.due(self.state.step):
            self._save_state()
        if not self.state.step:  # the model as it begins; it also shows how long both take
            with self.pace.paused():
                self._make(["validation", "sample"] if self.validated is None else ["sample"])
        self._estimate()
        while self.state.step < self.state.length.steps:
            gradient = self._gradient()
            if gradient is None:
                self._stopped()
            elif self.settings.spikes.rise and self.state.spikes.complete(gradient.sums.means()["loss"]):
                self._rewind(gradient)
            else:
                self.trainer.update(gradient)
                self.gradient_norm = gradient.norm
                self.display.advance(self.state.step)
                self._between()

    def finish(self) -> Summary:
        """Make the last validation, sample and checkpoint, and write the model and the report."""
        state = self.state
        if self.validated != state.step:
            self._evaluate()
            self._sample()
        self._save_state()
        self._leave({"finished": True})
        report = self.run.directory / REPORT
        planned = state.length.scheduled
        if self.settings.minutes is not None and state.step < planned / 10:
            self.display.note(
                f"Out of time: {state.step:,} of {planned:,} steps were made{busy()}. The model has learned next to "
                f"nothing; give more --minutes. See {report}."
            )
        else:
            self.display.note(f"Done: {number(state.step, 'step')} in {format_seconds(state.seconds)}. See {report}.")
        return Summary(self.run.directory, state.step, state.seconds, self.figures)

    def _gradient(self) -> Gradient | None:
        """Return the gradient of the next step, checked to be finite; None where a stop was requested.

        The check is the only point in a step where the host waits for the device. An overflow in float16 is computed
        again with a lower loss scale.
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
        """Return the batch of the next step; the one after it is prefetched, unless it depends on the weights."""
        index = self.state.step + self.state.spikes.skipped
        more = self.state.step + 1 < self.state.length.steps and not self.on_policy
        return self.loader.get(index, index + 1 if more else None)

    def _fitting_gradient(self, batch: Batch) -> Gradient | None:
        """Return the gradient; where it does not fit into memory, with half as many rows at a time, down to one."""
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
            self.display.note(f"Step {step + 1:,}: {reason}; {now}.")
            stopped = alone and self.stop()
        return None

    @contextmanager
    def _saving_on_failure(self) -> Iterator[None]:
        """Run a block that does not change the weights: where it fails, the state is saved first."""
        try:
            with failures.explain_out_of_memory():
                yield
        except failures.OutOfMemory as error:
            raise failures.OutOfMemory(self._refuse(str(error))) from error
        except Exception as error:
            if current().world_size == 1 and self.stop():  # Ctrl-C also ends a compiler that the step was waiting for
                self._stopped()
            error.add_note(self._refuse("See above."))
            raise

    def _rewind(self, gradient: Gradient) -> None:
        """Goes back to a checkpoint before a loss spike and skips batches; the step is not made."""
        state = self.state
        spiked, loss = state.step, gradient.sums.means()["loss"]
        with self.pace.paused():
            try:
                current().flush()  # the state to go back to may be the one that is being written
                current().barrier()
                state.rewind(checkpoint.read(self.run.directory, state.spikes.target(spiked)))
            except UserError as error:
                raise UserError(self._refuse(str(error))) from None
            self._record({"rewound_from": spiked, "spike_loss": loss})
            self.saved = -1
            self._save_state()
        self.display.advance(state.step)
        self.display.note(f"Step {spiked:,}: {state.spikes.sentence(state.step, loss)}")

    def _between(self) -> None:
        """Metrics, validation, samples and checkpoints that are due after a step; not counted as training time."""
        step, steps = self.state.step, self.state.length.steps
        if step == steps or step % self.settings.log_every == 0:
            self._log()
        if step == steps:
            return  # the rest is made by `finish`
        if self.settings.minutes is not None:
            self._fit(current().broadcast(self.budget.steps(step, steps)))
        due = [name for name, every in self.every.items() if every and step % every == 0]
        if self.settings.spikes.rise and self.state.spikes.due(step) and "state" not in due:
            due.append("state")
        if due:
            with self.pace.paused():
                self._make(due)

    def _make(self, due: list[str]) -> None:
        """Make what is due, and measure how long it takes."""
        work = {"validation": self._evaluate, "sample": self._sample, "state": self._save_state_or_tell}
        for name in due:
            with self.pace.timed(name):
                work[name]()

    def _estimate(self) -> None:
        """Show what the rest of the run is estimated to take, with the validations and samples in it."""
        done, whole = self.state.step, self.settings.whole_steps
        steps = max(done, self.state.length.steps)
        extra = self.budget.left(done, steps)
        note = self.cost.sentence(steps - done, self.run.unit, whole(steps) - whole(done), extra, self.on_policy)
        self.display.note(note)

    def _fit(self, steps: int) -> None:
        """Change the number of steps to what fits into the time; recorded in the metrics and in checkpoints."""
        if steps != self.state.length.steps:
            planned = self.state.length.scheduled
            if steps < planned / 2 and not self.short:
                self.short = True
                minutes = f"{self.settings.minutes:g}"
                self.display.note(f"Only {steps:,} of {planned:,} steps fit into {minutes} minutes{busy()}.")
            self.trainer.optimizers.length = self.state.length.fitted(self.state.step, steps)
            self._record({"planned_steps": steps})
            self.display.expect(steps)
            self.left.total = self.settings.whole_steps(steps)

    def _log(self) -> None:
        """Write a line of metrics from the sums since the last one; reading them waits for the device."""
        state = self.state
        units, means = float(state.sums["weight"]), state.sums.means()
        rate = units / self.pace.lap()
        share = self._share_of_peak(rate)
        state.seconds, state.sums = self.pace.seconds, Sums()
        figures = {
            **means,
            **self.trainer.optimizers.rates(state.step - 1),
            "gradient_norm": float(self.gradient_norm),
            f"{self.run.unit}_per_second": rate,
            **({} if share is None else {"flops_utilisation": share}),
            "seconds": state.seconds,
        }
        self._record(figures)
        self.display.show({**figures, "seconds_left": self.left.seconds(self.settings.whole_steps(state.step))})
        if warning := state.divergence.watch(means["loss"]):
            self.display.note(f"Step {state.step:,}: {warning}")
        for warning in self.run.watch(means) if self.run.watch else ():
            self.display.note(f"Step {state.step:,}: {warning}")

    def _share_of_peak(self, rate: float) -> float | None:
        """Return the share of the device's peak that is used. A peak that is exceeded is measured again.

        None if it is exceeded after that too: other work was slowing the machine down.
        """
        used = rate * self.cost.flops_per_unit
        if used > self.peak and self.peak_trials:
            self.peak_trials -= 1
            with self.pace.paused():
                self.peak = max(self.peak, measure_peak(self.trainer.device, self.trainer.dtype))
        return used / self.peak if used <= self.peak else None

    def _evaluate(self) -> None:
        """Return the validation figures, and bits per byte where the run gives the bytes per element."""
        self.loader.wait()
        with self._saving_on_failure(), self.trainer.optimizers.averaged():
            means = self.trainer.validation(self.data.validation())
            figures = {f"validation_{name}": value for name, value in means.items()}
            if means and self.run.bytes_per_unit:
                figures["bits_per_byte"] = means["loss"] / math.log(2) / self.run.bytes_per_unit
            if means and self._keeps_best() and (self.best is None or means["loss"] < self.best.loss):
                self.best = best.Best(self.state.step, figures)
                if current().is_main:
                    best.keep(self.run.directory, self.trainer.model, self.state.step, figures)
        if figures:
            self._record(figures)
            words = (f"{n.replace('_', ' ')} {value:.4g}" for n, value in figures.items() if "/" not in n)
            self.display.note(f"step {self.state.step:,}  {'  '.join(words)}")
        self.validated = self.state.step

    def _keeps_best(self) -> bool:
        """Return whether the weights with the lowest validation loss are kept; a split model keeps its last ones."""
        return self.settings.keep_best and current().is_replicated

    def _restore_best(self) -> None:
        """Load the weights with the lowest validation loss, with their figures, if the last ones are worse."""
        if self.best is None:
            return
        validated = (line[best.LOSS] for line in metrics.read(self.run.directory) if best.LOSS in line)
        first, last = next(validated, None), self.figures.get(best.LOSS, math.nan)
        worse = self.best.loss < last
        if worse and current().is_main:
            best.restore(self.run.directory, self.trainer.model)
        self.figures |= self.best.figures if worse else {}
        before = "" if first is None else f"{first:.4g} before and "
        note = f"Validation loss: {before}{last:.4g} after the training."
        kept = f" The model kept is that of step {self.best.step:,}, with {self.best.loss:.4g}."
        self.display.note(note + kept * worse)

    def _record(self, figures: dict[str, float | int]) -> None:
        skipped = self.state.spikes.skipped
        figures = figures | ({"skipped": skipped} if skipped else {})
        self.figures |= figures
        if not self.lines.path.exists():
            self.display.note(f"{self.run.directory} was taken away while the run wrote there: it is written anew.")
            run_directory.restore(self.run.directory, self.record)
        self.lines.write(self.state.step, figures)

    def _sample(self) -> None:
        if self.sample is None or not current().is_replicated or not current().is_main:
            return  # a split model is not sampled from
        self.loader.wait()
        self.trainer.model.eval()
        with self._saving_on_failure(), self.trainer.optimizers.averaged():
            sample = self.sample(self.state.step)
        self.trainer.model.train()
        with self._tolerating(f"The sample of step {self.state.step:,}"):
            run_directory.write_sample(self.run.directory, self.state.step, sample)
        if isinstance(sample, str):
            self.display.note(textwrap.indent(sample, "  | "))

    def _save_state(self) -> None:
        state = self.state
        if self.saved != state.step:
            state.passed, state.lasted = self.pace.passed, dict(self.pace.lasted)
            facts = {"described": self.described, "resolved": self.trainer.resolved(), **state.facts()}
            save = checkpoint.save if current().is_replicated else current().save
            if current().is_main or not current().is_replicated:
                save(self.run.directory, state.step, state.tensors(), facts, self._remove_old_states)
            self.saved = state.step

    def _remove_old_states(self, step: int) -> None:
        """Remove the states that are not kept beside that of a step."""
        reach = self.settings.spikes.reach if self.settings.spikes.rise else 0
        checkpoint.remove_old(self.run.directory, step, self.settings.keep, reach, self._has_state)

    def _has_state(self, step: int) -> bool:
        """Whether the state after so many steps is saved, however often the run is stopped."""
        every, last = self.every["state"], self.state.length.steps
        return step == last or bool(every and step % every == 0) or self.state.spikes.due(step)

    def _save_state_or_tell(self) -> None:
        with self._tolerating(f"The state of step {self.state.step:,}"):
            self._save_state()

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """Run a block in which a failed write does not stop the run: it is shown, and tried again when next due."""
        try:
            yield
        except (OSError, UserError) as error:
            self.display.note(f"{what} was not saved: {error} Training goes on.")

    def _stopped(self) -> NoReturn:
        self._save_state()
        self._leave({"finished": False})
        how = run_directory.how_to_resume(self.run)
        raise Interrupted(f"Stopped after step {self.state.step:,}; the state is saved. To go on:\n{how}")

    def _not_finite(self, batch: Batch) -> NoReturn:
        with self.pace.paused():
            reason = self.trainer.explain(self.state.step, batch)
        if current().is_replicated:  # another process may know more; exchanges of a split model would hang
            reason = next((each for each in current().gather(reason) if each != failures.NOT_AGAIN), reason)
        advice = "A lower learning rate, a longer warm-up, a smaller clip or float32 helps."
        raise failures.NotFinite(self._refuse(f"In the next step {reason}. {advice}"))

    def _refuse(self, text: str) -> str:
        """Save the state of the last complete step; return the text of the error with how to resume."""
        self.trainer.optimizers.drop_gradients()
        if current().is_replicated:  # other processes may not come to save theirs
            self._save_state()
        how, kept = run_directory.how_to_resume(self.run), "saved" if self.saved == self.state.step else "not saved"
        return f"Stopped after step {self.state.step:,}, whose state is {kept}. {text} To go on: {how}"

    def _leave(self, outcome: dict[str, Any]) -> None:
        """Write the model, the results into recipe.json, and the report."""
        with self.trainer.optimizers.averaged():
            if outcome["finished"]:
                self._restore_best()
            if self.save and (current().is_main or not current().is_replicated):
                self.trainer.model.eval()
                self.save(self.run.directory)
        current().flush()
        if current().is_main:
            figures = {"steps": self.state.step, "figures": self.figures}
            self._write_recipe({**outcome, **figures, "hashes": run_directory.hashes(self.run.directory)})
            write_report(self.run.directory)
        current().barrier()

    def _write_recipe(self, outcome: dict[str, Any]) -> None:
        length = self.state.length
        facts = {
            "settings": self.described["settings"],
            "resolved": self.trainer.resolved() | {"flops_per_second": self.peak},
            "cost": asdict(self.cost),
            "data_fingerprint": self.described["data"],
            "unit": self.run.unit,
            "length": length.facts()["length"],
        }
        run_directory.write_recipe(self.run, facts | outcome, length.scheduled)
