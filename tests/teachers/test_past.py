import pytest
import torch
from torch import nn

from lightning_kd.schedules import Moment
from lightning_kd.teachers import PastSelf


def test_it_becomes_the_student_when_epochs_begin() -> None:
    student, teacher = nn.Linear(2, 2), PastSelf(every=2)
    teacher.bind(student, ["output"])
    weights = []
    for epoch in range(5):
        teacher.begin_epoch(Moment(epoch=epoch))
        weights.append(float(teacher.model.bias[0]))
        student.bias.data.fill_(epoch + 1.0)  # what the epoch learns
        teacher.update(Moment(step=epoch + 1, epoch=epoch))
    assert weights[1:] == [weights[0], 2.0, 2.0, 4.0]
    assert torch.equal(teacher(torch.zeros(1, 2))["output"][0], teacher.model.bias[None])


def test_every_is_a_number_of_epochs() -> None:
    with pytest.raises(ValueError, match="every is a number of epochs"):
        PastSelf(every=0)
