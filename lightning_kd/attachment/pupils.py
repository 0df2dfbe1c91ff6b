"""With which student something learned: it is for no other one, which would begin with that in silence."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_kd.distiller import Distiller

_MARK = "_learned_with"


class _Pupil:
    """A student, as what learned with it knows it: in a copy of both it is the copied one, too. A file has none."""

    def __init__(self, *students: nn.Module) -> None:
        self.students = weakref.WeakSet(students)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pupil:
        made = _Pupil(*self.students)
        for student in self.students:
            with suppress(Exception):  # some cannot be copied
                made.students.add(copy.deepcopy(student, memo))  # once, and to be forgotten where nobody else has it
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def learns(distiller: Distiller) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that a fit changes, by the name of their term: projectors, and losses that learn or store."""
    for name, term in distiller.named_terms():
        for part in term.parts():
            yield from ((name, module) for module in _changing(part))
    if distiller.teacher_learner is not None:
        yield from (("the teacher", module) for module in _changing(distiller.teacher_learner))


def _changing(part: nn.Module) -> Iterator[nn.Module]:
    stores = hasattr(part, "build")
    for module in part.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)) or (stores and module._buffers):
            yield module


def learned_with(student: nn.Module | None, parts: Iterable[object]) -> None:
    """Notes with which student parts have learned; None for those that have learned nothing."""
    for part in parts:
        setattr(part, _MARK, _Pupil(_uncompiled(student)) if student is not None else None)


def has_learned(part: object) -> bool:
    """Returns whether a part has learned with some student."""
    return getattr(part, _MARK, None) is not None


def learned_elsewhere(student: nn.Module, part: object) -> bool:
    """Returns whether a part has learned with another student than that."""
    return has_learned(part) and _uncompiled(student) not in getattr(part, _MARK).students


def _uncompiled(student: nn.Module) -> nn.Module:
    plain: nn.Module = getattr(student, "_orig_mod", student)
    return plain
