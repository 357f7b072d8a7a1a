"""How many steps a run makes, and what its learning rate does where that number was changed while it was resumed.

A run that is made longer or shorter keeps its warm-up and everything else that followed from its first number of steps
(how the batch grows, how often it is saved). From then on the rate is that of a run of the new length: its decay is
stretched to the new end. So that the rate does not jump, the difference between the old and the new curve at that step
fades linearly, over as many updates as the warm-up has, but over half of those that are left at most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keifu.errors import UserError
from keifu.training.optim.lr_schedules import ratio
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Change:
    """A new length: `at` are the steps done then, `steps` those of the whole run from now on, and `over` the updates
    over which the rate moves to its new curve."""

    at: int
    steps: int
    over: int


@dataclass(frozen=True)
class Length:
    """The steps that a run was begun with, and every change of them since."""

    begun: int
    changes: tuple[Change, ...] = ()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.changes[-1].steps if self.changes else self.begun

    def changed(self, at: int, steps: int, warmup: int) -> "Length":
        """The length after a change to so many steps; fewer than are done already is a `UserError`."""
        if steps < at:
            raise UserError(f"{at:,} steps are done, so the run cannot be made as short as {steps:,}: choose more.")
        return Length(self.begun, (*self.changes, Change(at, steps, max(1, min(warmup, (steps - at) // 2)))))

    def rate_share(self, settings: Settings, step: int, ahead: float = 0.0) -> float:
        """The share of the highest learning rate at which update number `step` (from 0) is made; ahead: see `Plan`."""
        past = [change for change in self.changes if change.at <= step]
        lengths = [self.begun, *(change.steps for change in past)]
        share = self._curve(settings, lengths[-1], step, ahead)
        for before, change in zip(lengths, past, strict=False):
            gap = self._curve(settings, before, change.at) - self._curve(settings, change.steps, change.at)
            share += gap * max(0.0, 1.0 - (step - change.at) / change.over)
        return max(0.0, share) if past else share

    def _curve(self, s: Settings, steps: int, step: int, ahead: float = 0.0) -> float:
        """The share at a step of a run that had so many steps from its beginning, with the warm-up of this one."""
        end = s.counted(steps) if s.decay_steps is None else s.decay_steps * steps / self.begun
        return ratio(s.schedule, s.counted(step + 1) - 1 + ahead, end, s.warmup, s.final_ratio, s.hold)

    def sentence(self, settings: Settings) -> str:
        """What the last change means."""
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
        """The changes as JSON, for a state and recipe.json."""
        return [asdict(change) for change in self.changes]


def length_of(settings: Mapping[str, Any], changes: Sequence[Mapping[str, int]]) -> Length:
    """The length of a saved run from its settings and its changes; runs saved before changes were stored have none."""
    return Length(settings["steps"], tuple(Change(**change) for change in changes))
