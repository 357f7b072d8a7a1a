"""The number of steps of a run, and the learning rate after this number is changed by resuming or by a time budget.

A run that is made longer or shorter keeps its warm-up and everything else derived from its first number of steps
(batch-size warm-up, checkpoint interval). After the change, its learning rate is that of a run of the new length: the
decay ends at the new end. To avoid a jump, the difference between the old and the new curve at that step fades
linearly, over as many updates as the warm-up, but over at most half of the remaining ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from keifu.errors import UserError
from keifu.training.optim.lr_schedules import ratio
from keifu.training.settings import Settings

USEFUL = 0.02  # the least mean learning rate of a useful extension, as a share of the highest rate


class Change(NamedTuple):
    """A change of a run's length. at: steps already done. steps: the new number of steps of the whole run. over: number
    of updates over which the rate moves to its new curve.
    """

    at: int
    steps: int
    over: int


@dataclass(frozen=True)
class Length:
    """The number of steps of a run: the first number (`begun`), every change since, and the number that fits a time
    budget (`fitting`).

    The learning rate is a function of the position in a schedule of `scheduled` steps. With a time budget, the position
    advances evenly from `position` at step `since` to the schedule's end at step `fitting`. first: the first
    measurement of `fitting`.
    """

    begun: int
    changes: tuple[Change, ...] = ()
    fitting: int | None = None
    first: int | None = None
    since: int = 0
    position: float = 0.0

    @cached_property
    def scheduled(self) -> int:
        """The number of steps that the user last requested."""
        return self.changes[-1].steps if self.changes else self.begun

    @cached_property
    def steps(self) -> int:
        """The number of steps that the run makes."""
        return self.scheduled if self.fitting is None else self.fitting

    def changed(self, at: int, steps: int, warmup: int) -> "Length":
        """Return the length after a change to `steps` at step `at`. Raises UserError if more steps are already done."""
        if steps < at:
            raise UserError(f"{at:,} steps are done, so the run cannot end at step {steps:,}: choose more.")
        return Length(self.begun, (*self.changes, Change(at, steps, max(1, min(warmup, (steps - at) // 2)))))

    def fitted(self, step: int, steps: int) -> "Length":
        """Return the length if only `steps` steps fit into the time, as measured at step `step`."""
        return replace(self, fitting=steps, first=self.first or steps, since=step, position=step + self._ahead(step))

    def rate_share(self, settings: Settings, step: int) -> float:
        """Return the learning rate of update number `step` (from 0) as a share of the highest one."""
        past = [change for change in self.changes if change.at <= step]
        lengths = [self.begun, *(change.steps for change in past)]
        share = self._curve(settings, lengths[-1], step, self._ahead(step))
        for before, change in zip(lengths, past, strict=False):
            gap = self._curve(settings, before, change.at) - self._curve(settings, change.steps, change.at)
            share += gap * max(0.0, 1.0 - (step - change.at) / change.over)
        return max(0.0, share) if past else share

    def _ahead(self, step: int) -> float:
        """Return the position of a step in the schedule minus its number; 0 without a time budget."""
        stride = (self.scheduled - self.position) / max(1, self.steps - self.since)
        return self.position + (step - self.since) * stride - step if self.fitting is not None else 0.0

    def _curve(self, s: Settings, steps: int, step: int, ahead: float = 0.0) -> float:
        """Return the rate, as a share of the highest one, of a run with `steps` steps from its start and this run's
        warm-up.
        """
        end = s.counted(steps) if s.decay_steps is None else s.decay_steps * steps / self.begun
        return ratio(s.schedule, s.counted(step + 1) - 1 + ahead, end, s.warmup, s.final_ratio, s.hold)

    def mean_share(self, settings: Settings, step: int) -> float:
        """Return the mean learning rate of the updates from `step` on, as a share of the highest one."""
        shares = [self.rate_share(settings, past) for past in range(step, self.steps)]
        return sum(shares) / max(1, len(shares))

    def useful_steps(self, settings: Settings, at: int) -> int:
        """Return the smallest number of steps for an extension at step `at` whose mean rate is at least `USEFUL`."""
        steps = at
        while steps < 100 * max(1, at):
            steps += max(1, (steps - at) // 8)
            if self.changed(at, steps, settings.warmup).mean_share(settings, at) >= USEFUL:
                break
        return steps

    def sentence(self, settings: Settings) -> str:
        """Return a sentence that describes the last change and its effect on the learning rate."""
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

    def facts(self) -> dict[str, Any]:
        """Return the changes and the time budget's plan as JSON, for a checkpoint."""
        plan = {name: vars(self)[name] for name in ("first", "since", "position")}
        plan |= {"steps": self.steps, "scheduled": self.scheduled}
        return {"length": [change._asdict() for change in self.changes], "plan": plan}


def length_of(state: Mapping[str, Any]) -> Length:
    """Return the length of a saved run from its state, without a time budget's plan. Earlier versions recorded no
    changes.
    """
    changes = (Change(**change) for change in state.get("length", ()))
    return Length(state["described"]["settings"]["steps"], tuple(changes))


def with_plan(length: Length, state: Mapping[str, Any]) -> Length:
    """Return the length with the time budget's plan of a state, if the plan was for the same number of steps."""
    plan = state.get("plan", {})
    if plan.get("scheduled") != length.scheduled:
        return length
    return replace(length, fitting=plan["steps"], **{name: plan.get(name) for name in ("first", "since", "position")})
