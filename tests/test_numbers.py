from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from lightning_kd.tasks import Classification, Detection, Segmentation

from lightning_kd import losses, schedules, teachers
from lightning_kd.metrics import BoundaryF1
from lightning_kd.models import CifarResNet
from lightning_kd.numbers import is_number, is_whole
from lightning_kd.teachers.label_noise import LabelNoise
from lightning_kd.teachers.router import Router

NO_NUMBERS = ["2", "x", None, True, torch.tensor(1.0), [1], float("nan"), float("inf"), 1j]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number(value: Any) -> None:
    assert not is_number(value)
    assert not is_whole(value)


def test_what_is_one() -> None:
    numpy = torch.ones(1).numpy()
    assert all(map(is_number, (0, -1, 2.5, Fraction(1, 3), numpy[0], numpy.size)))
    assert all(map(is_whole, (0, -1, numpy.astype(int)[0])))
    assert not is_whole(2.0)


TAKES_A_NUMBER: dict[str, Callable[[Any], Any]] = {
    "p ": lambda x: losses.AT(p=x),
    "beta ": lambda x: losses.QFL(beta=x),
    "beta is": lambda x: losses.KD(beta=x),
    "ratio": lambda x: losses.MGD(ratio=x),
    "inner": lambda x: losses.ALoss(inner=x),
    "memory": lambda x: losses.CRD(memory=x),
    "1 negative": lambda x: losses.CRD(memory=9, negatives=x),
    "momentum": lambda x: losses.CRD(momentum=x),
    "temperature": lambda x: losses.KD(temperature=x),
    "values of a schedule": lambda x: schedules.Linear(x, 1.0),
    "until": lambda x: schedules.Linear(0.0, 1.0, until=x),
    "every": lambda x: teachers.PastSelf(every=x),
    "decay": lambda x: teachers.EMA(decay=x),
    "start_step": lambda x: teachers.EMA(start_step=x),
    "count 1": lambda x: teachers.EMA(count=x),
    "balance": lambda x: Router(2, 3, balance=x),
    "two classes": LabelNoise,
    "positive scale": lambda x: LabelNoise(3, scale=x),
    "label_smoothing": lambda x: Classification(3, label_smoothing=x),
    "num_classes": Classification,
    "num_classes ": Detection,
    "num_classes is": lambda x: Segmentation(num_classes=x),
    "tolerance": lambda x: BoundaryF1(3, tolerance=x),
    "depth": lambda x: CifarResNet(depth=x),
}


@pytest.mark.parametrize("named", TAKES_A_NUMBER)
def test_text_in_place_of_a_number_is_refused_by_the_arguments_name(named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named.strip()) as caught:
        TAKES_A_NUMBER[named]("2")
    assert "'2'" in str(caught.value), "what came"
