"""From one value to another: in a straight line, along a cosine, or by a constant factor."""

import math

from lightning_kd.schedules.base import Schedule, finite, fraction


class Constant(Schedule):
    """One value, all along.

    Args:
        value: The value.

    Raises:
        ValueError: If it is not finite.

    Example:
        >>> Constant(4.0)(0.7)
        4.0
    """

    def __init__(self, value: float) -> None:
        finite(value=value)
        self.value = value

    def __call__(self, progress: float) -> float:
        """Returns the value."""
        return self.value

    def __repr__(self) -> str:
        return f"Constant({self.value})"


class _Ramp(Schedule):
    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        finite(start=start, end=end)
        self.start = start
        self.end = end
        self.until = fraction("until", until)

    def __call__(self, progress: float) -> float:
        if progress >= self.until:  # exactly: start + (end - start) is not always end
            return self.end
        return self._between(max(progress / self.until, 0.0))

    def _between(self, x: float) -> float:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.start}, {self.end}, until={self.until})"


class Linear(_Ramp):
    """From ``start`` to ``end`` in a straight line, then constant.

    With ``x = progress / until``: ``start + (end - start) * x``.

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

    def _between(self, x: float) -> float:
        return self.start + (self.end - self.start) * x


class Cosine(_Ramp):
    """From ``start`` to ``end`` along half a cosine, then constant.

    With ``x = progress / until``: ``start + (end - start) * (1 - cos(pi * x)) / 2``.

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

    def _between(self, x: float) -> float:
        return self.start + (self.end - self.start) * (1.0 - math.cos(math.pi * x)) / 2.0


class Exponential(_Ramp):
    """From ``start`` to ``end`` by the same factor in each equal part of the run, then constant.

    With ``x = progress / until``: ``start * (end / start) ** x``.

    Args:
        start: Value at the first step, positive.
        end: Value from ``until`` on, positive.
        until: Fraction of the run at which the end is reached.

    Raises:
        ValueError: If ``until`` is not in (0, 1], or an end is not a positive finite number.

    Example:
        >>> Exponential(8.0, 2.0)(0.5)
        4.0
    """

    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        super().__init__(start, end, until)
        if start <= 0.0 or end <= 0.0:
            raise ValueError(f"an exponential goes between positive numbers, so neither end is 0; got {start}, {end}.")

    def _between(self, x: float) -> float:
        return float(self.start * (self.end / self.start) ** x)
