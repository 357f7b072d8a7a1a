"""The record of a run in its directory: metrics, samples, checkpoints, the best weights, recipe.json and the report.

The loop decides when to write each of them.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from keifu.errors import UserError
from keifu.processes import current
from keifu.training.hardware.cost import Cost
from keifu.training.hardware.flops import measure_peak, peak
from keifu.training.protocols import Run, Save
from keifu.training.run import checkpoint, metrics, run_directory
from keifu.training.run.progress import Display
from keifu.training.run.report import write_report
from keifu.training.state import Sums
from keifu.training.trainer import Trainer


class Recorder:
    """Writer of the files of a run. Rank 0 writes; of a split model, all ranks write the checkpoints.

    figures: the latest value of every figure. saved: the step of the last checkpoint.
    """

    def __init__(
        self, trainer: Trainer, cost: Cost, run: Run, save: Save | None, display: Display, lines: metrics.RunMetrics
    ):
        self.trainer, self.cost, self.run, self.save = trainer, cost, run, save
        self.display, self.lines = display, lines
        self.settings, self.state, self.figures = trainer.settings, trainer.state, lines.latest
        self.peak = peak(trainer.device, trainer.dtype)
        self.peak_trials = 3  # how often the peak may be measured again
        self.saved = self.state.step if run.resume else -1
        if run.resume and current().is_main:  # a killed run may not have removed them
            self._remove_old_states(self.state.step)
        self.keeps_best = self.settings.keep_best and current().is_replicated  # a split model keeps its last weights
        self.best = checkpoint.read_best(run.directory) if self.keeps_best else None
        self.recorded = run_directory.recorded(run.directory)
        if lines.damaged:
            display.note(f"{lines.path} is damaged in line {', '.join(map(str, lines.damaged))}, which is left out.")
        self._write_recipe({})
        run_directory.keep_tokenizers(run)

    def write(self, figures: Mapping[str, float | int]) -> None:
        """Write a line of metrics for the current step."""
        skipped = self.state.spikes.skipped
        line = {**figures, **({"skipped": skipped} if skipped else {})}
        self.figures |= line
        if not self.lines.path.exists():
            self.display.note(f"{self.run.directory} was taken away while the run wrote there: it is written anew.")
            run_directory.restore(self.run.directory, self.recorded)
        self.lines.write(self.state.step, line)

    def log(self, gradient_norm: float) -> None:
        """Write a line of metrics from the sums since the last line. This waits for the device."""
        state, means = self.state, self.state.sums.means()
        rate = float(state.sums["weight"]) / state.clock.lap()
        share = self._share_of_peak(rate)
        state.sums = Sums()
        figures = {
            **means,
            **state.optimizers.rates(state.step - 1, state.length),
            "gradient_norm": gradient_norm,
            f"{self.run.unit}_per_second": rate,
            **({} if share is None else {"flops_utilisation": share}),
            "seconds": state.clock.seconds,
        }
        self.write(figures)
        self.display.show({**figures, "seconds_left": state.clock.left(state.step, state.length.steps)})
        warnings = [state.divergence.watch(means["loss"]), *(self.run.watch(means) if self.run.watch else ())]
        for warning in filter(None, warnings):
            self.display.note(f"Step {state.step:,}: {warning}")

    def _share_of_peak(self, rate: float) -> float | None:
        """Return the used share of the device's peak FLOP/s. If it exceeds 1, measure the peak again.

        Return None if the new peak is exceeded too: other work slowed the machine down during the measurement.
        """
        flops_per_second = rate * self.cost.flops_per_unit
        if flops_per_second > self.peak and self.peak_trials:
            self.peak_trials -= 1
            with self.state.clock.paused():
                self.peak = max(self.peak, measure_peak(self.trainer.device, self.trainer.dtype))
        return flops_per_second / self.peak if flops_per_second <= self.peak else None

    def validated(self, means: Mapping[str, float]) -> None:
        """Write validation figures, and store the weights if they are the best ones so far."""
        figures = {f"validation_{name}": value for name, value in means.items()}
        if self.run.bytes_per_unit:
            figures["bits_per_byte"] = means["loss"] / math.log(2) / self.run.bytes_per_unit
        if self.keeps_best and (self.best is None or means["loss"] < self.best.figures[checkpoint.LOSS]):
            self.best = checkpoint.Best(self.state.step, figures)
            if current().is_main:
                checkpoint.keep_best(self.run.directory, self.trainer.model, self.best)
        self.write(figures)
        words = (f"{n.replace('_', ' ')} {value:.4g}" for n, value in figures.items() if "/" not in n)
        self.display.note(f"step {self.state.step:,}  {'  '.join(words)}")

    def _restore_best(self) -> None:
        """Load the weights and figures with the lowest validation loss, if the last ones are worse."""
        if self.best is None:
            return
        losses = (line[checkpoint.LOSS] for line in metrics.read(self.run.directory) if checkpoint.LOSS in line)
        first, last = next(losses, None), self.figures.get(checkpoint.LOSS, math.nan)
        lowest = self.best.figures[checkpoint.LOSS]
        worse = lowest < last
        if worse and current().is_main:
            checkpoint.restore_best(self.run.directory, self.trainer.model)
        self.figures |= self.best.figures if worse else {}
        before = "" if first is None else f"{first:.4g} before and "
        note = f"Validation loss: {before}{last:.4g} after the training."
        best_step = f" The model kept is that of step {self.best.step:,}, with {lowest:.4g}."
        self.display.note(note + best_step * worse)

    def write_sample(self, sample: str | bytes) -> None:
        """Write a sample, and show it if it is text."""
        run_directory.write_sample(self.run.directory, self.state.step, sample)
        if isinstance(sample, str):
            self.display.note(textwrap.indent(sample, "  | "))

    def bytes_to_save(self) -> int:
        """Return the bytes on this process of a checkpoint of the current step, unless it exists, and of the model if
        it is written."""
        weights = sum(tensor.nbytes for tensor in checkpoint.model_tensors(self.trainer.model).values())
        state = sum(tensor.nbytes for tensor in self.state.tensors().values()) if self.saved != self.state.step else 0
        return state + (weights if self.save else 0)

    def save_state(self) -> None:
        """Save a checkpoint of the current step, unless it exists."""
        state, is_replicated = self.state, current().is_replicated
        if self.saved != state.step:
            facts = {"resolved": self.trainer.resolved(), **state.facts()}
            save = checkpoint.save if is_replicated else current().save
            if current().is_main or not is_replicated:
                save(self.run.directory, state.step, state.tensors(), facts, self._remove_old_states)
            self.saved = state.step

    def try_to_save_state(self) -> None:
        """Save a checkpoint. A failed write does not stop the run."""
        with self.tolerating("state"):
            self.save_state()

    def _remove_old_states(self, step: int) -> None:
        """Remove old checkpoints after the one of `step` is saved."""
        reach = self.settings.spikes.reach if self.settings.spikes.rise else 0
        checkpoint.remove_old(self.run.directory, step, self.settings.keep, reach, self._has_state)

    def _has_state(self, step: int) -> bool:
        """Return whether a run saves a checkpoint at this step even if it is never interrupted."""
        every = self.settings.save_every
        return step == self.state.length.steps or bool(every and step % every == 0) or self.state.spikes.due(step)

    @contextmanager
    def tolerating(self, name: str, what: str = "saved") -> Iterator[None]:
        """Run a block whose failure does not stop the run, such as a full disk, or a prompt of samples that is longer
        than the context. The failure is reported, and the block is tried again when next due."""
        try:
            yield
        except (OSError, UserError) as error:
            self.display.note(f"The {name} of step {self.state.step:,} was not {what}: {error} Training goes on.")

    def close(self, is_finished: bool) -> None:
        """Write the model, the results into recipe.json, and the report."""
        with self.state.optimizers.averaged():
            if is_finished:
                self._restore_best()
            if self.save and (current().is_main or not current().is_replicated):
                self.trainer.model.eval()
                self.save(self.run.directory)
        current().flush()
        if current().is_main:
            hashes = run_directory.hashes(self.run.directory)
            figures = {"steps": self.state.step, "figures": self.figures, "hashes": hashes}
            self._write_recipe({"finished": is_finished, **figures})
            write_report(self.run.directory)
        current().barrier()

    def _write_recipe(self, outcome: dict[str, Any]) -> None:
        length, described = self.state.length, self.state.described
        facts = {
            "settings": described["settings"],
            "resolved": self.trainer.resolved() | {"flops_per_second": self.peak},
            "cost": self.cost._asdict(),
            "data_fingerprint": described["data"],
            "unit": self.run.unit,
            "length": length.facts()["length"],
        }
        run_directory.write_recipe(self.run, facts | outcome, length.scheduled)
