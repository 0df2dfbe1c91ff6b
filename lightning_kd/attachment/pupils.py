"""With which student something learned: it is for no other one, which would begin with that in silence."""

import uuid
import weakref
from collections.abc import Iterable, Iterator

from torch import nn

from lightning_kd.distiller import Distiller

_NAMES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_PUPIL = "_learned_with"
"""An attribute, which copies of what has learned have, too; as a file has it."""


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


def learned_with(student: nn.Module, parts: Iterable[object]) -> None:
    """Notes with which student parts have learned."""
    for part in parts:
        setattr(part, _PUPIL, _name(student))


def learned_elsewhere(student: nn.Module, part: object) -> bool:
    """Returns whether a part has learned with another student than that."""
    return getattr(part, _PUPIL, None) not in (None, _name(student))


def _name(student: nn.Module) -> str:
    return _NAMES.setdefault(getattr(student, "_orig_mod", student), uuid.uuid4().hex)
