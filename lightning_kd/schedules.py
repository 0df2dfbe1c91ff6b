"""Schedules: how a number changes over a run, as a function of the fraction of the run that is done.

A schedule is called with a number from 0 (first step) to 1 (end of the run), so that it means the same
for every length of training.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """Where in a run a step is.

    Args:
        progress: Fraction of the run that is done, from 0 to 1.
        step: Optimizer steps that were made.
        epoch: The current epoch.
        epoch_progress: Fraction of the run that was done when the current epoch began.
    """

    progress: float = 0.0
    step: int = 0
    epoch: int = 0
    epoch_progress: float = 0.0


class Schedule(ABC):
    """A number that changes over the run."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Returns the value when the fraction ``progress`` of the run is done."""

    def at(self, moment: Moment) -> float:
        """Returns the value at a moment of the run."""
        return self(moment.progress)


class _Ramp(Schedule):
    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        if not 0.0 < until <= 1.0:
            raise ValueError(f"until is the fraction of the run at which the end is reached, in (0, 1]; got {until}.")
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ValueError(f"start and end are finite numbers; got {start} and {end}.")
        self.start = start
        self.end = end
        self.until = until

    def __call__(self, progress: float) -> float:
        if progress >= self.until:  # exactly: start + (end - start) is not always end
            return self.end
        return self.start + (self.end - self.start) * self._shape(max(progress / self.until, 0.0))

    def _shape(self, x: float) -> float:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.start}, {self.end}, until={self.until})"


class Linear(_Ramp):
    """From ``start`` to ``end`` in a straight line, then constant.

    Args:
        start: Value at the first step.
        end: Value from ``until`` on.
        until: Fraction of the run at which the end is reached.

    Raises:
        ValueError: If ``until`` is not in (0, 1], or an end is not finite.

    Example:
        >>> Linear(8.0, 1.0)(0.5)
        4.5
    """

    def _shape(self, x: float) -> float:
        return x


class Cosine(_Ramp):
    """From ``start`` to ``end`` along half a cosine, then constant.

    Args:
        start: Value at the first step.
        end: Value from ``until`` on.
        until: Fraction of the run at which the end is reached.

    Raises:
        ValueError: If ``until`` is not in (0, 1], or an end is not finite.

    Example:
        >>> round(Cosine(100.0, 0.0)(0.5), 6)
        50.0
    """

    def _shape(self, x: float) -> float:
        return (1.0 - math.cos(math.pi * x)) / 2.0
