"""Values that are given at points of the run: in steps, or with straight lines between them."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from lightning_kd.schedules.base import Schedule, finite, fraction


class Step(Schedule):
    """Times ``gamma`` at each milestone: ``start * gamma ** (milestones passed)``.

    Args:
        start: Value at the first step.
        gamma: Factor at each milestone.
        milestones: Fractions of the run in rising order; a single number means every such fraction.

    Raises:
        ValueError: If a number is not finite, or a milestone not in (0, 1], or they do not rise.

    Example:
        >>> [Step(8.0, gamma=0.5, milestones=[0.5, 0.75])(x) for x in (0.0, 0.5, 0.9)]
        [8.0, 4.0, 2.0]
        >>> [Step(8.0, gamma=0.5, milestones=0.25)(x) for x in (0.2, 0.25, 0.8)]
        [8.0, 4.0, 1.0]
    """

    def __init__(self, start: float, gamma: float = 0.5, milestones: Sequence[float] | float = 0.5) -> None:
        finite(start=start, gamma=gamma)
        self.start = start
        self.gamma = gamma
        self.milestones = milestones
        if isinstance(milestones, Sequence):
            self._passed = [fraction("a milestone", milestone) for milestone in milestones]
        else:  # each a quotient of whole numbers where the step is 1/n, as the fractions of the run are
            count = 1.0 / fraction("milestones", milestones)
            self._passed = [k / count for k in range(1, int(count + 1e-9) + 1)]
        _rising(self._passed)

    def __call__(self, progress: float) -> float:
        """Returns the value after the milestones that were passed."""
        return self.start * self.gamma ** bisect_right(self._passed, progress)

    def __repr__(self) -> str:
        return f"Step({self.start}, gamma={self.gamma}, milestones={self.milestones})"


class Piecewise(Schedule):
    """Through points of the run: in straight lines between them, or constant from each to the next.

    Before the first point it has the first value, after the last one the last.

    Args:
        points: Pairs ``(fraction of the run, value)``, in rising order of the fractions.
        interpolate: Whether straight lines connect the points; else each value holds until the next point.

    Raises:
        ValueError: If there is no point, a fraction is not in [0, 1], they do not rise, or a value is not finite.

    Example:
        >>> points = [(0.0, 4.0), (0.5, 2.0), (1.0, 1.0)]
        >>> [Piecewise(points)(x) for x in (0.0, 0.25, 0.5, 0.75)]
        [4.0, 3.0, 2.0, 1.5]
        >>> [Piecewise(points, interpolate=False)(x) for x in (0.0, 0.25, 0.5, 0.75)]
        [4.0, 4.0, 2.0, 2.0]
    """

    def __init__(self, points: Sequence[tuple[float, float]], interpolate: bool = True) -> None:
        self.points = [(float(x), float(value)) for x, value in points]
        self.interpolate = interpolate
        if not self.points:
            raise ValueError(
                "points is empty: give pairs (fraction of the run, value), such as [(0.0, 4.0), (0.5, 2.0)]."
            )
        self._at = [x for x, _ in self.points]
        if not all(0.0 <= x <= 1.0 for x in self._at):
            raise ValueError(f"points are pairs (fraction of the run, value), fractions in [0, 1]; got {self.points}.")
        for _, value in self.points:
            finite(value=value)
        _rising(self._at)

    def __call__(self, progress: float) -> float:
        """Returns the value at a point, or between two."""
        i = bisect_right(self._at, progress) - 1  # the last point that was passed
        if not self.interpolate or i < 0 or i + 1 == len(self.points):
            return self.points[max(i, 0)][1]
        (x, value), (next_x, next_value) = self.points[i : i + 2]
        return value + (next_value - value) * (progress - x) / (next_x - x)

    def __repr__(self) -> str:
        return f"Piecewise({self.points}, interpolate={self.interpolate})"


def _rising(fractions: Sequence[float]) -> None:
    if any(a >= b for a, b in pairwise(fractions)):
        raise ValueError(f"fractions of the run are given in rising order, each once; got {list(fractions)}.")
