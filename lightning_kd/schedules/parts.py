"""Schedules around schedules."""

import math

from lightning_kd.schedules.base import Moment, Schedule, finite, fraction


class WarmUp(Schedule):
    """In a straight line from ``start`` into another schedule.

    With ``x = min(progress / until, 1)``: ``start + (schedule - start) * x``.

    Args:
        schedule: What is warmed up.
        until: Fraction of the run from which on it is followed.
        start: Value at the first step.

    Raises:
        ValueError: If ``until`` is not in (0, 1], or ``start`` is not finite.

    Example:
        >>> from lightning_kd.schedules import Constant
        >>> [WarmUp(Constant(4.0), until=0.5)(x) for x in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 2.0, 4.0, 4.0]
    """

    def __init__(self, schedule: Schedule, until: float = 0.1, start: float = 0.0) -> None:
        finite(start=start)
        self.schedule = schedule
        self.until = fraction("until", until)
        self.start = start

    def __call__(self, progress: float) -> float:
        """Returns the value on the way into the schedule, or the schedule's."""
        return self._into(self.schedule(progress), progress)

    def at(self, moment: Moment) -> float:
        """Returns the value at a moment, at which the schedule may have its own sense of the time."""
        return self._into(self.schedule.at(moment), moment.progress)

    def _into(self, value: float, progress: float) -> float:
        if progress >= self.until:
            return value
        return self.start + (value - self.start) * max(progress / self.until, 0.0)

    def __repr__(self) -> str:
        return f"WarmUp({self.schedule!r}, until={self.until}, start={self.start})"


class ByEpoch(Schedule):
    """A schedule whose value changes only where an epoch begins.

    It is ``schedule(epoch / max_epochs)``: with ``Linear(8.0, 0.0)`` over four epochs 8, 6, 4 and 2.

    Args:
        schedule: What is followed.

    Example:
        >>> from lightning_kd.schedules import Linear
        >>> ByEpoch(Linear(8.0, 0.0)).at(Moment(progress=0.49, epoch=1, epoch_progress=0.25))
        6.0
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, progress: float) -> float:
        """Returns the schedule's value when an epoch begins at that fraction of the run."""
        return self.schedule(progress)

    def at(self, moment: Moment) -> float:
        """Returns the schedule's value at the begin of the current epoch.

        Raises:
            ValueError: If the run does not say how many epochs it has.
        """
        if math.isnan(moment.epoch_progress):
            raise ValueError(
                f"{self!r} changes by epoch, and the run does not say how many epochs it has. Set max_epochs of the "
                "Trainer, or change by step."
            )
        return self.schedule(moment.epoch_progress)

    def __repr__(self) -> str:
        return f"ByEpoch({self.schedule!r})"
