"""The moving average against torch's own, and what else its options say."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_kd import Distiller, Term, losses, schedules
from lightning_kd.schedules import Moment
from lightning_kd.teachers import EMA


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def bound(teacher: EMA, student: nn.Module) -> EMA:
    teacher.bind(student, ["output"])
    return teacher


@torch.no_grad()
def move(student: nn.Module) -> None:
    for parameter in student.parameters():
        parameter.add_(torch.randn_like(parameter))
    student(torch.randn(16, 6))  # in training mode: the statistics move, too


def test_it_is_torchs_average() -> None:
    student = Net()
    teacher, oracle = bound(EMA(0.9), student), AveragedModel(student, avg_fn=get_ema_avg_fn(0.9))
    oracle.n_averaged.fill_(1)  # its first update would copy
    for step in range(1, 6):
        move(student)
        teacher.update(Moment(step=step))
        oracle.update_parameters(student)
    for ours, theirs in zip(teacher.model.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_answers_as_the_average_in_eval_mode_and_without_gradient() -> None:
    student = Net()
    teacher, x = bound(EMA(0.5), student), torch.randn(7, 6)
    move(student)
    teacher.update(Moment(step=1))
    teacher.train()
    (answer,) = teacher(x)["output"]
    assert not answer.requires_grad
    torch.testing.assert_close(answer, teacher.model.eval()(x), rtol=0, atol=0)
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (EMA(0.99), [0.99] * 4),
        (EMA(0.99, warm_up=True), [2 / 11, 3 / 12, 4 / 13, 5 / 14]),
        (EMA(0.3, warm_up=True), [2 / 11, 3 / 12, 0.3, 0.3]),
        (EMA(0.99, start_step=2), [0.0, 0.0, 0.99, 0.99]),
        (EMA(0.99, start_step=2, warm_up=True), [0.0, 0.0, 2 / 11, 3 / 12]),
        (EMA(schedules.Cosine(0.5, 1.0)), [0.5, 0.5 + 0.5 * (1 - 0.5**0.5) / 2, 0.75, 0.5 + 0.5 * (1 + 0.5**0.5) / 2]),
    ],
)
def test_the_decay_of_each_step(teacher: EMA, expected: list[float]) -> None:
    moments = [Moment(progress=(step - 1) / 4, step=step) for step in range(1, 5)]
    assert [teacher.decay_at(moment) for moment in moments] == pytest.approx(expected)
    assert teacher.needs_end == isinstance(teacher.decay, schedules.Schedule)


def test_before_the_start_it_is_the_student() -> None:
    student = Net()
    teacher = bound(EMA(0.9, start_step=3), student)
    move(student)
    teacher.update(Moment(step=3))
    for ours, theirs in zip(teacher.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["average", "copy", "own"])
def test_statistics_follow_their_policy(policy: Any) -> None:
    student = Net()
    teacher = bound(EMA(0.75, buffers=policy), student)
    norm, theirs = teacher.model.stem[1], student.stem[1]
    before = norm.running_mean.clone()
    move(student)
    teacher.update(Moment(step=1))
    averaged = 0.75 * before + 0.25 * theirs.running_mean
    torch.testing.assert_close(
        norm.running_mean, {"average": averaged, "copy": theirs.running_mean, "own": before}[policy]
    )
    assert int(norm.num_batches_tracked) == (0 if policy == "own" else 1)
    x = torch.randn(32, 6)
    (answer,) = teacher(x)["output"]
    if policy == "own":
        hidden = teacher.model.stem[0](x)
        normed = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
        scaled = normed * norm.weight + norm.bias
        torch.testing.assert_close(answer, teacher.model.head(scaled.relu()), rtol=1e-4, atol=1e-4)  # no dropout
        torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * hidden.mean(0))
    else:
        torch.testing.assert_close(answer, teacher.model.eval()(x))


def test_two_take_turns_by_epochs() -> None:
    student = Net()
    teacher = bound(EMA(0.5, count=2), student)
    for epoch, (moves, rests) in enumerate([(0, 1), (1, 0), (0, 1)]):
        teacher.begin_epoch(Moment(epoch=epoch))
        assert teacher.model is teacher.copies[moves]
        before = [copy.head.weight.clone() for copy in teacher.copies]
        move(student)
        teacher.update(Moment(step=epoch + 1, epoch=epoch))
        torch.testing.assert_close(teacher.copies[moves].head.weight, (before[moves] + student.head.weight) / 2)
        assert torch.equal(teacher.copies[rests].head.weight, before[rests])


def test_small_steps_of_half_precision_weights_are_not_lost() -> None:
    student = nn.Linear(4, 4).bfloat16()
    teacher = bound(EMA(0.999), student)
    start = teacher.model.weight.clone()
    student.weight.data.add_(1.0)
    for step in range(1, 101):
        teacher.update(Moment(step=step))
    moved = student.weight.float() - start
    torch.testing.assert_close(teacher.model.weight - start, moved * (1 - 0.999**100), rtol=1e-3, atol=1e-5)
    assert teacher(torch.zeros(2, 4, dtype=torch.bfloat16))["output"][0].dtype == torch.float32


def test_what_it_remembers_is_enough() -> None:
    student = Net()
    teacher = bound(EMA(0.9, count=2), student)
    teacher.begin_epoch(Moment(epoch=1))
    move(student)
    teacher.update(Moment(step=1))
    other = bound(EMA(0.9, count=2), Net())
    other.recall(teacher.memory())
    other.begin()
    assert other.active == 1
    for ours, theirs in zip(other.copies.parameters(), teacher.copies.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_each_side_has_a_view_of_its_own() -> None:
    seen: list[Tensor] = []

    class Sees(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    student, x = Sees(6, 4), torch.ones(2, 6)
    distiller = Distiller(
        {"kd": Term(losses.KD())}, EMA(), teacher_input=lambda x: 2 * x, student_input=lambda x: (3 * x,)
    )
    distiller.attach(student)
    with distiller.watch():
        student(x)
    assert [float(each[0, 0]) for each in seen] == [2.0, 3.0]
    with torch.no_grad():
        student(x)  # neither in evaluation
    assert float(seen[-1][0, 0]) == 1.0


def test_a_student_that_cannot_be_copied_says_so() -> None:
    student = nn.Linear(4, 4)
    student.log = open  # can be copied
    bound(EMA(), student)
    student.cache = student.weight * 2  # a tensor with a history cannot
    with pytest.raises(RuntimeError) as caught:
        bound(EMA(), student)
    assert any("Linear was deep-copied, to be its own teacher" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, r"decay is a number in \[0, 1\].* got 1.5"),
        ({"decay": schedules.Linear(0.9, 2.0)}, "got 2.0"),
        ({"decay": float("nan")}, "got nan"),
        ({"buffers": "mean"}, "buffers is 'average', 'copy' or 'own', got 'mean'"),
        ({"start_step": -1}, "start_step is 0 or more"),
        ({"count": 0}, "count 1 or more"),
    ],
)
def test_what_it_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


def test_it_is_asked_after_it_was_bound() -> None:
    with pytest.raises(RuntimeError, match="not bound"):
        EMA()(torch.zeros(1))
    with pytest.raises(RuntimeError, match="has no copy of a student yet"):
        _ = EMA().model
