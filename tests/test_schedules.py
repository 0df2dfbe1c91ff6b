import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kd import schedules

NUMBERS = st.floats(-1e6, 1e6)
FRACTIONS = st.floats(0.0, 1.0, exclude_min=True)
KINDS = [schedules.Linear, schedules.Cosine]


@pytest.mark.parametrize("kind", KINDS)
@given(start=NUMBERS, end=NUMBERS, until=FRACTIONS, beyond=st.floats(1.0, 10.0))
def test_it_starts_at_the_start_and_stays_at_the_end(
    kind: type, start: float, end: float, until: float, beyond: float
) -> None:
    schedule = kind(start, end, until)
    assert schedule(0.0) == schedule(-1.0) == start
    assert schedule(until) == schedule(max(until, 1.0) * beyond) == end


@pytest.mark.parametrize("kind", KINDS)
@given(start=NUMBERS, end=NUMBERS, x=st.floats(0.0, 1.0), y=st.floats(0.0, 1.0))
def test_it_moves_one_way_and_stays_between(kind: type, start: float, end: float, x: float, y: float) -> None:
    schedule = kind(start, end)
    rounding = 1e-12 * max(abs(start), abs(end))
    low, high = min(start, end), max(start, end)
    early, late = schedule(min(x, y)), schedule(max(x, y))
    assert low - rounding <= early <= high + rounding
    assert (late - early) * math.copysign(1.0, end - start) >= -rounding


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.Linear(8.0, 0.0), [8.0, 6.0, 4.0, 2.0, 0.0]),
        (schedules.Linear(0.0, 1.0, until=0.5), [0.0, 0.5, 1.0, 1.0, 1.0]),
        (schedules.Cosine(2.0, 0.0), [2.0, 1.0 + math.sqrt(0.5), 1.0, 1.0 - math.sqrt(0.5), 0.0]),
        (schedules.Cosine(0.0, 2.0, until=0.5), [0.0, 1.0, 2.0, 2.0, 2.0]),
    ],
)
def test_values(schedule: schedules.Schedule, values: list[float]) -> None:
    assert [schedule(x / 4) for x in range(5)] == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("until", [0.0, -0.5, 1.5, math.nan])
def test_until_is_a_fraction(kind: type, until: float) -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\], not a number of steps; got"):
        kind(1.0, 0.0, until)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [(math.nan, 1.0), (1.0, math.inf)])
def test_ends_are_numbers(kind: type, ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        kind(*ends)


def test_repr_says_the_ends() -> None:
    assert repr(schedules.Cosine(8.0, 1.0, 0.5)) == "Cosine(8.0, 1.0, until=0.5)"
