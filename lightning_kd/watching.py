"""The calls of a student, watched: before each one its teacher answers."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_kd.copying import lend
from lightning_kd.holding import Left, copy_holders
from lightning_kd.overwriting import Given, refuse_overwriting_input, refuse_overwriting_teacher, versions_of
from lightning_kd.recomputation import Recomputation
from lightning_kd.taps import Record, Taps
from lightning_kd.teachers.base import Teacher, labels_asked, made_by, refuse_answer, values_at
from lightning_kd.wiring import OUTPUT, Path, describe

ANSWER = "teacher"
"""By this name ``student_input`` may ask for what the teacher's forward returned."""

LabelsOf = Callable[[Mapping[str, bool]], Mapping[str, Any]]
"""Gives what there is of a batch, by name, of what is asked for; True is what somebody cannot do without."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a call: positional, and by keyword."""


@dataclass
class Call:
    """What was captured of one call of the student, and of the teacher on the same arguments."""

    student: Record
    teacher: Record
    versions: dict[int, int] = field(default_factory=dict)
    """Of what the teacher answered, when it did."""


class Watcher:
    """Watches a student: asks the teacher before each call, and captures what both computed.

    Args:
        student: The model whose calls are watched.
        paths: Module paths in the student.
        teacher: A teacher that is bound.
        student_input: Makes the student's arguments out of those that it is called with.
        teacher_input: Makes the teacher's out of the same.
    """

    def __init__(
        self,
        student: nn.Module,
        paths: Iterable[str],
        teacher: Teacher,
        student_input: Callable[..., Any] | None,
        teacher_input: Callable[..., Any] | None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.student_input = student_input
        self.teacher_input = teacher_input
        asked = labels_asked(student_input)
        self._asks_teacher = asked.pop(ANSWER, None) is not None
        self._asked = merged(asked, labels_asked(teacher_input), teacher.labels)
        self._taps = Taps(student, paths, "the student")
        self._recomputation = Recomputation()
        self._calls: list[Call] | None = None
        self._labels: Callable[[], Mapping[str, Any]] = dict
        self._depth = 0
        self._left: Left = WeakIdKeyDictionary()
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Puts the hooks in place."""
        self._taps.attach()
        self._undo = [
            self.student.register_forward_pre_hook(_eager(self._before), with_kwargs=True).remove,
            self.student.register_forward_hook(_eager(self._after), always_call=True).remove,
            lend(self.student),
        ]

    def detach(self) -> None:
        """Takes every hook out."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._taps.detach()

    def refresh(self) -> None:
        """Watches what has taken the place of a layer since it was attached."""
        self._taps.refresh()

    @contextmanager
    def watch(self, labels: LabelsOf, read: Iterable[Path]) -> Iterator[list[Call]]:
        """Watches until the context ends; ``read`` is what is read of the student's outputs."""
        if self._calls is not None:
            raise RuntimeError("The distiller is watching already: one `with distiller.watch()` at a time.")
        calls: list[Call] = []
        self._calls = calls
        self._labels = functools.cache(lambda: labels(self._asked))  # one answer for all calls
        self._depth = 0
        try:
            yield calls
            self._taps.check(read)
        finally:
            self._calls = None
            self._labels = dict
            self._taps.close()
            self._taps.forget()

    # The teacher answers before the student runs, when no activation of the student is in memory yet.
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not self.student:  # a deep copy of it, which carries the hook along
            return None
        if self._recomputation.now():
            if self.student_input is not None:
                raise ValueError(
                    "the student is computed again in backward, by torch.utils.checkpoint around the whole of it, "
                    "and without what student_input made of its arguments. Checkpoint layers inside of the "
                    "student, or make its view in training_step."
                )
            self._recomputation.again((args, kwargs))
            return None
        if self._calls is None:  # validation
            return None
        if self._taps.recording:  # a recursive call is part of the outer one
            self._depth += 1
            return None
        if not torch.is_grad_enabled():  # nothing could be learned from it
            return None
        begun = self._recomputation.begin((args, kwargs))
        call, own = self._ask(Given((args, kwargs), self._left), self._labels() if self._asked else {})
        self._recomputation.end(begun, (args, kwargs))
        call.student = self._taps.open()
        self._calls.append(call)
        return own

    def _ask(self, given: Given, labels: Mapping[str, Any]) -> tuple[Call, Arguments | None]:
        """Returns a call with the teacher's side of it, and the arguments of the student if they are of its own."""
        given_args, given_kwargs = args, kwargs = given.arguments

        def view(name: str, make: Callable[..., Any], labels: Mapping[str, Any]) -> Arguments:
            made = made_by(make, given_args, given_kwargs, labels, learns=make is self.student_input)
            refuse_overwriting_input(name, given)
            return made

        own = None
        if self.student_input is not None and not self._asks_teacher:
            own = view("student_input", self.student_input, labels)
        asked, what = "teacher_input", "the student's arguments"
        try:
            if self.teacher_input is not None:
                args, kwargs = view("teacher_input", self.teacher_input, labels)
                what = "what teacher_input returned"
            asked = "the teacher"
            if self.teacher.labels:
                self.teacher.look(labels)
            answer = self.teacher(*args, **kwargs)
        except Exception as error:
            said = ", ".join(map(describe, (*args, *kwargs.values())))
            error.add_note(
                f"This happened when {asked} was called with {what}, {said}. "
                "teacher_input= makes the teacher's arguments out of the student's."
            )
            raise
        refuse_answer(self.teacher, answer)
        refuse_overwriting_teacher(given)
        call = Call(student={}, teacher=answer, versions=versions_of(answer))
        if self.student_input is not None and self._asks_teacher:
            said = copy_holders(values_at(self.teacher, answer, OUTPUT)[0])  # in which it may exchange something
            own = view("student_input", self.student_input, {**labels, ANSWER: said})
        return call, own

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self.student or not self._taps.recording:
            return
        if self._depth:
            self._depth -= 1
            return
        failed = output is None and sys.exc_info()[0] is not None
        self._taps.close(output)
        self.teacher.after_call(output)
        if failed and self._calls:  # who catches that may call it again, on other inputs
            self._calls.pop()
        elif self.teacher.same_call and self._calls:
            self._calls[-1].versions = versions_of(self._calls[-1].teacher)


def merged(*asked: Mapping[str, bool]) -> dict[str, bool]:
    """Returns what several ask for of a batch, and whether one of them cannot do without."""
    found: dict[str, bool] = {}
    for name, required in (each for some in asked for each in some.items()):
        found[name] = found.get(name, False) or required
    return found


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a hook out of the graph of a compiled student: the teacher is not compiled with it."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # torch's own gap
    return disabled
