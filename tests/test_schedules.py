import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import optim

from lightning_kd import schedules
from lightning_kd.schedules import Moment

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
        (schedules.Constant(3.0), [3.0] * 5),
        (schedules.Exponential(16.0, 1.0), [16.0, 8.0, 4.0, 2.0, 1.0]),
        (schedules.Exponential(1.0, 4.0, until=0.5), [1.0, 2.0, 4.0, 4.0, 4.0]),
        (schedules.Step(8.0, gamma=0.5, milestones=[0.25, 0.75]), [8.0, 4.0, 4.0, 2.0, 2.0]),
        (schedules.Step(8.0, gamma=0.5, milestones=0.25), [8.0, 4.0, 2.0, 1.0, 0.5]),
        (schedules.Step(8.0, gamma=0.5, milestones=[]), [8.0] * 5),
        (schedules.Piecewise([(0.25, 4.0), (0.75, 2.0)]), [4.0, 4.0, 3.0, 2.0, 2.0]),
        (schedules.Piecewise([(0.25, 4.0), (0.75, 2.0)], interpolate=False), [4.0, 4.0, 4.0, 2.0, 2.0]),
        (schedules.WarmUp(schedules.Linear(8.0, 0.0), until=0.5), [0.0, 3.0, 4.0, 2.0, 0.0]),
        (schedules.WarmUp(schedules.Constant(4.0), until=0.5, start=2.0), [2.0, 3.0, 4.0, 4.0, 4.0]),
        (schedules.ByEpoch(schedules.Linear(8.0, 0.0)), [8.0, 6.0, 4.0, 2.0, 0.0]),
        (schedules.Custom(math.exp), [1.0, math.exp(0.25), math.exp(0.5), math.exp(0.75), math.e]),
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


ALL: list[tuple[schedules.Schedule, dict[str, Any]]] = [
    (schedules.Constant(3.0), {"value": 3.0}),
    (schedules.Linear(8.0, 1.0, until=0.5), {"start": 8.0, "end": 1.0, "until": 0.5}),
    (schedules.Cosine(8.0, 1.0), {"start": 8.0, "end": 1.0}),
    (schedules.Exponential(8.0, 1.0), {"start": 8.0, "end": 1.0}),
    (schedules.Step(8.0, 0.1, [0.5, 0.75]), {"start": 8.0, "gamma": 0.1, "milestones": [0.5, 0.75]}),
    (schedules.Step(8.0, 0.1, 0.25), {"start": 8.0, "gamma": 0.1, "milestones": 0.25}),
    (schedules.Piecewise([(0.0, 4.0), (0.5, 2.0)]), {"points": [[0.0, 4.0], [0.5, 2.0]]}),
    (
        schedules.WarmUp(schedules.Constant(2.0)),
        {"schedule": {"class_path": "lightning_kd.schedules.Constant", "init_args": {"value": 2.0}}},
    ),
    (
        schedules.ByEpoch(schedules.Constant(2.0)),
        {"schedule": {"class_path": "lightning_kd.schedules.Constant", "init_args": {"value": 2.0}}},
    ),
    (schedules.Custom(math.cos), {"function": "math.cos"}),
]


def test_all_are_tried() -> None:
    assert {type(s).__name__ for s, _ in ALL} == set(schedules.__all__) - {"Moment", "Schedule"}


@pytest.mark.parametrize(("schedule", "arguments"), ALL, ids=repr)
def test_it_pickles_and_comes_out_of_a_configuration(schedule: schedules.Schedule, arguments: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=schedules.Schedule)
    spec = {"class_path": f"lightning_kd.schedules.{type(schedule).__name__}", "init_args": arguments}
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before jsonargparse 4.49
    built = make(parser.parse_object({"schedule": spec})).schedule
    for copy in (built, pickle.loads(pickle.dumps(schedule))):
        assert repr(copy) == repr(schedule)
        assert "\n" not in repr(copy)
        assert [copy(x / 7) for x in range(8)] == [schedule(x / 7) for x in range(8)]


@given(start=st.floats(1e-3, 1e3), end=st.floats(1e-3, 1e3), x=st.floats(0.0, 0.9))
def test_equal_parts_of_an_exponential_have_equal_factors(start: float, end: float, x: float) -> None:
    schedule = schedules.Exponential(start, end)
    assert schedule(0.0) == start
    assert schedule(1.0) == end
    assert schedule(x + 0.1) / schedule(x) == pytest.approx((end / start) ** 0.1)


def test_steps_are_those_of_torch() -> None:
    optimizer = optim.SGD([{"params": []}], lr=8.0)
    peer = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 6, 9], gamma=0.1)
    for step in range(10):
        for milestones in ([0.3, 0.6, 0.9], 0.3):
            assert schedules.Step(8.0, 0.1, milestones)(step / 10) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


@pytest.mark.parametrize("parts", [3, 7, 10, 30, 49])
def test_every_fraction_is_met_by_the_step_that_makes_it(parts: int) -> None:
    schedule = schedules.Step(1.0, gamma=2.0, milestones=1 / parts)
    assert [schedule(step / parts) for step in range(parts)] == [2.0**step for step in range(parts)]


def test_by_epoch_changes_where_an_epoch_begins() -> None:
    schedule = schedules.ByEpoch(schedules.Linear(8.0, 0.0))
    moments = [Moment(step / 8, step, step // 2, (step // 2) / 4) for step in range(8)]
    assert [schedule.at(moment) for moment in moments] == [8.0, 8.0, 6.0, 6.0, 4.0, 4.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"how many epochs it has. Set max_epochs"):
        schedule.at(Moment(epoch_progress=math.nan))


def test_a_warm_up_goes_by_step_into_what_goes_by_epoch() -> None:
    schedule = schedules.WarmUp(schedules.ByEpoch(schedules.Linear(8.0, 0.0)), until=0.5)
    assert schedule.at(Moment(progress=0.4, epoch=1, epoch_progress=0.25)) == pytest.approx(6.0 * 0.8)
    assert schedule.at(Moment(progress=0.7, epoch=2, epoch_progress=0.5)) == 4.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.Constant(math.nan), "finite numbers; got value=nan"),
        (lambda: schedules.Constant("4"), "finite numbers; got value='4'"),  # type: ignore[arg-type]
        (lambda: schedules.Exponential(0.0, 1.0), "between positive numbers"),
        (lambda: schedules.Exponential(1.0, -1.0), "between positive numbers"),
        (lambda: schedules.Step(1.0, math.inf), "gamma=inf"),
        (lambda: schedules.Step(1.0, milestones=[0.5, 30]), "a milestone is a fraction of the run.*got 30"),
        (lambda: schedules.Step(1.0, milestones=[0.5, 0.5]), "in rising order"),
        (lambda: schedules.Step(1.0, milestones=0.0), "milestones is a fraction of the run"),
        (lambda: schedules.Piecewise([]), "points is empty"),
        (lambda: schedules.Piecewise([(0.0, 1.0), (20, 2.0)]), r"fractions in \[0, 1\]"),
        (lambda: schedules.Piecewise([(0.5, 1.0), (0.0, 2.0)]), "in rising order"),
        (lambda: schedules.Piecewise([(0.5, math.nan)]), "finite numbers"),
        (lambda: schedules.WarmUp(schedules.Constant(1.0), until=0.0), "until is a fraction"),
        (lambda: schedules.WarmUp(schedules.Constant(1.0), start=math.inf), "start=inf"),
    ],
)
def test_mistakes_are_told_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_function_has_to_return_a_number() -> None:
    with pytest.raises(TypeError, match=r"returns a number; Custom\(.*\) returned None"):
        schedules.Custom(lambda progress: None)(0.5)  # type: ignore[arg-type, return-value]


def test_what_cannot_be_called_is_no_schedule() -> None:
    with pytest.raises(TypeError, match=r"or a function of the fraction of the run; got 4\.0"):
        schedules.Custom(4.0)  # type: ignore[arg-type]
