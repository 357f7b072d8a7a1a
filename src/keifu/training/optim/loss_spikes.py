"""Recovery from loss spikes: go back to a checkpoint and skip batches (PaLM, section 5.1).

PaLM's authors restarted by hand, about twenty times, from a checkpoint about 100 steps before a spike, and skipped 200
to 500 batches. Here a rule does it, so that a run with spikes is as repeatable as one without.
"""

from dataclasses import dataclass, replace
from typing import Any

from keifu.errors import UserError
from keifu.ranges import Count, Natural, NotNegative, check
from keifu.training.hardware.failures import Running

MOST = 3  # rewinds in a row to the same checkpoint, before the run stops


@dataclass(frozen=True)
class SpikeSettings:
    """Settings of the recovery from loss spikes, with PaLM's numbers. The recovery is off by default.

    A step has a high loss if it exceeds the running mean by the share `rise` and by six standard deviations. A spike is
    `steps` such steps in a row. After a spike, the batch of a step has the number step + all skipped steps, also if the
    batch size grows.
    """

    rise: NotNegative = 0.0
    """The share of its running mean by which the loss rises in a spike; 0: spikes are not looked for."""
    steps: Count = 3
    """Steps in a row with such a loss that make a spike."""
    rewind: Count = 100
    """Steps before the spike that are undone, and up to half as many more: a state is saved at every half of them."""
    skip: Natural = 300
    """Batches that are left out then, those of the spike among them."""

    def __post_init__(self) -> None:
        check(self, "spikes.{}".format)
        if self.rise and self.skip < self.reach:
            reason = f"with a rewind of {self.rewind} steps, so that no batch of a spike comes again"
            raise UserError(f"spikes.skip must be at least {self.reach} {reason}, and it is {self.skip}.")

    @property
    def every(self) -> int:
        """Steps between the checkpoints that a run can go back to."""
        return max(1, self.rewind // 2)

    @property
    def reach(self) -> int:
        """The most steps from such a checkpoint to the end of a spike; a checkpoint is kept for as many steps."""
        return self.rewind + self.every + self.steps


@dataclass
class SpikeState(Running):
    """Detector of loss spikes, and counter of skipped batches. The constructor takes the rules and the values of
    `facts`.

    streak: steps with a high loss in a row. back: step of the last rewind's checkpoint. times: rewinds in a row to it.
    """

    rules: SpikeSettings
    skipped: int = 0
    streak: int = 0
    back: int = 0
    times: int = 0

    def facts(self) -> dict[str, Any]:
        """Return the constructor's arguments for a checkpoint, without the rules."""
        return {name: value for name, value in vars(self).items() if name != "rules"}

    def due(self, step: int) -> bool:
        """Return whether the checkpoint after this step has to be saved for later rewinds."""
        return bool(self.rules.rise) and step % self.rules.every == 0

    def complete(self, loss: float) -> bool:
        """Record the loss of the next step. Return whether a spike is now complete."""
        self.streak = 0 if self.take(loss, self.rules.rise) else self.streak + 1
        return self.streak == self.rules.steps

    def target(self, step: int) -> int:
        """Return the step to go back to, if a spike is complete before update number `step`. It is never before the
        last rewind's checkpoint.
        """
        first = step + 1 - self.rules.steps
        return max(self.back, (first - self.rules.rewind) // self.rules.every * self.rules.every, 0)

    def sentence(self, target: int, loss: float) -> str:
        """Return the sentence about a rewind to the step `target`."""
        batches = f"{self.rules.skip:,} batches that came next are left out, {self.skipped:,} in all"
        spike = f"the loss is {loss:.4g}, far above its running mean for {self.rules.steps} steps"
        return f"{spike}; going on from step {target:,}, where it was {self.mean:.4g}. The {batches}."

    def after(self, target: int, then: "SpikeState") -> "SpikeState":
        """Return the state after a rewind to `target`, with the batches to skip from there. then: the state saved at
        that step. Raises UserError after `MOST` rewinds to the same step.
        """
        times = self.times + 1 if self.times and target == self.back else 1
        if times > MOST:
            raise UserError(
                f"The loss has spiked again after {MOST} rewinds to step {target:,}: a lower learning rate, a longer "
                "warm-up or a smaller clip helps; where the loss may rise like that, raise spikes.rise."
            )
        return replace(then, skipped=self.skipped + self.rules.skip, back=target, times=times)
