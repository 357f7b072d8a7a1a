"""The number of steps of a run, and its learning rate when that number is changed on resuming.

A run that is made longer or shorter keeps its warm-up and everything else that was derived from its first number of
steps (batch-size warm-up, checkpoint interval). From then on its learning rate is that of a run of the new length: the
decay is stretched to the new end. So that the rate does not jump, the difference between the old and the new curve at
that step fades linearly, over as many updates as the warm-up has, but at most over half of the remaining ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keifu.errors import UserError
from keifu.training.optim.lr_schedules import ratio
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Change:
    """A change of the length: `at`: steps done then; `steps`: the new number of steps of the whole run; `over`: the
    updates over which the rate moves to its new curve."""

    at: int
    steps: int
    over: int


@dataclass(frozen=True)
class Length:
    """The number of steps that a run started with, and every change of it since."""

    begun: int
    changes: tuple[Change, ...] = ()

    @property
    def steps(self) -> int:
        """The current number of steps of the whole run."""
        return self.changes[-1].steps if self.changes else self.begun

    def changed(self, at: int, steps: int, warmup: int) -> "Length":
        """The length after a change to `steps` at step `at`; fewer steps than are already done is a `UserError`."""
        if steps < at:
            raise UserError(f"{at:,} steps are done, so the run cannot be made as short as {steps:,}: choose more.")
        return Length(self.begun, (*self.changes, Change(at, steps, max(1, min(warmup, (steps - at) // 2)))))

    def rate_share(self, settings: Settings, step: int, ahead: float = 0.0) -> float:
        """The learning rate of update number `step` (from 0) as a share of the highest one; ahead: see `pace.Plan`."""
        past = [change for change in self.changes if change.at <= step]
        lengths = [self.begun, *(change.steps for change in past)]
        share = self._curve(settings, lengths[-1], step, ahead)
        for before, change in zip(lengths, past, strict=False):
            gap = self._curve(settings, before, change.at) - self._curve(settings, change.steps, change.at)
            share += gap * max(0.0, 1.0 - (step - change.at) / change.over)
        return max(0.0, share) if past else share

    def _curve(self, s: Settings, steps: int, step: int, ahead: float = 0.0) -> float:
        """The same for a run that has had `steps` steps from its start, with the warm-up of this one."""
        end = s.counted(steps) if s.decay_steps is None else s.decay_steps * steps / self.begun
        return ratio(s.schedule, s.counted(step + 1) - 1 + ahead, end, s.warmup, s.final_ratio, s.hold)

    def sentence(self, settings: Settings) -> str:
        """A sentence that describes the last change and its effect on the learning rate."""
        last = self.changes[-1]
        before = Length(self.begun, self.changes[:-1])
        then = settings.learning_rate * self.rate_share(settings, last.at)
        now = settings.learning_rate * self._curve(settings, last.steps, last.at + last.over)
        how = "longer" if last.steps > before.steps else "shorter"
        return (
            f"The run is made {how}, from {before.steps:,} to {last.steps:,} steps. Its warm-up of {settings.warmup:,} "
            f"stays, and its decay ends at the new end: the learning rate goes from {then:.3g} to {now:.3g} over "
            f"{last.over:,} {'update' if last.over == 1 else 'updates'}."
        )

    def facts(self) -> list[dict[str, int]]:
        """The changes as JSON, for a checkpoint and recipe.json."""
        return [asdict(change) for change in self.changes]


def length_of(settings: Mapping[str, Any], changes: Sequence[Mapping[str, int]]) -> Length:
    """The length of a saved run, from its settings and its changes (none in checkpoints of earlier versions)."""
    return Length(settings["steps"], tuple(Change(**change) for change in changes))
