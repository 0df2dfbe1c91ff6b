"""How a task is told which networks meet, and how the teacher's is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_kd.task import TaskAdapter
from lightning_kd.teachers import Frozen, Teacher
from lightning_kd.teachers.base import made_by


def introduce(
    task: TaskAdapter, student: nn.Module, teacher: Teacher, teacher_input: Callable[..., Any] | None = None
) -> None:
    """Tells a task which networks meet; nothing, where the teacher is not one network.

    Args:
        task: The task.
        student: The student.
        teacher: The teacher.
        teacher_input: Makes the teacher's arguments out of the student's.
    """
    asked = teacher.root(student)
    if asked is None:
        return
    called = AsTaught(teacher, teacher_input) if isinstance(teacher, Frozen) else teacher_input
    object.__setattr__(task, "as_taught", called)  # past nn.Module's registration: it is nothing that a checkpoint has
    task.meet(student, asked)


class AsTaught(nn.Module):
    """Makes what a frozen teacher's model is called with out of what the student is called with, as in training.

    Args:
        teacher: The teacher.
        teacher_input: Makes its arguments out of the student's.
    """

    def __init__(self, teacher: Frozen, teacher_input: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.made = nn.ModuleList(each for each in (teacher_input, teacher.input) if isinstance(each, nn.Module))
        """So that their buffers come along to a device."""
        self._teacher = [teacher]
        self._teacher_input = [teacher_input]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...] | dict[str, Any]:
        """Returns positional arguments, or keyword arguments."""
        (teacher,), (makes,) = self._teacher, self._teacher_input
        args, kwargs = teacher.arguments(*made_by(makes, args, kwargs))
        return kwargs or args
