"""What a schedule is, and how any function becomes one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_kd.numbers import is_number


@dataclass(frozen=True)
class Moment:
    """Where in a run a step is.

    Args:
        progress: Fraction of the run that is done, from 0 to 1; NaN where the run does not say how long it is.
        step: Optimizer steps that were made.
        epoch: The current epoch.
        epoch_progress: Fraction of the run that was done when the current epoch began; NaN where the run does not
            say how many epochs it has.
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


class Custom(Schedule):
    """What a function of the fraction of the run returns.

    Args:
        function: ``function(progress) -> value``. A named one, so that the schedule pickles.

    Raises:
        TypeError: If it cannot be called.

    Example:
        >>> import math
        >>> Custom(math.sqrt)(0.25)
        0.5
    """

    def __init__(self, function: Callable[[float], float]) -> None:
        given: object = function  # what a caller without a type checker may pass
        if not callable(given):
            raise TypeError(
                f"a schedule is one of schedules.* or a function of the fraction of the run; got {given!r}."
            )
        self.function = function

    def __call__(self, progress: float) -> float:
        """Returns what the function returns."""
        value: object = self.function(progress)
        try:
            return float(value)  # type: ignore[arg-type]  # of a tensor, too
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"a schedule is a function of the fraction of the run that returns a number; {self!r} returned "
                f"{value!r}."
            ) from error

    def __repr__(self) -> str:
        return f"Custom({getattr(self.function, '__qualname__', self.function)})"


def factor(name: str, given: Any) -> float | Schedule:
    """Returns a weight as a number or a schedule; a function of the fraction of the run becomes one.

    Raises:
        ValueError: If it is none of these, negative or not finite.
    """
    weight = Custom(given) if callable(given) and not isinstance(given, (Schedule, type)) else given
    ends = (weight(0.0), weight(1.0)) if isinstance(weight, Schedule) else (weight,)
    if not all(is_number(end) and end >= 0.0 for end in ends):
        goes = f", which goes from {ends[0]} to {ends[-1]}" if isinstance(weight, Schedule) else ""
        raise ValueError(
            f"{name} is a finite number that is not negative, one of schedules.*, or a function of the fraction of the "
            f"run; got {weight!r}{goes}."
        )
    checked: float | Schedule = weight
    return checked


def finite(**values: float) -> None:
    """Refuses what is no finite number."""
    if not all(map(is_number, values.values())):
        said = " and ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"the values of a schedule are finite numbers; got {said}.")


def fraction(name: str, value: float) -> float:
    """Returns a fraction of the run that lies after its begin, or refuses it."""
    if not (is_number(value) and 0.0 < value <= 1.0):
        raise ValueError(f"{name} is a fraction of the run, in (0, 1], not a number of steps; got {value!r}.")
    return value
