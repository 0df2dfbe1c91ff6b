"""With which student something learned: it is for no other one, which would begin with that in silence."""

import weakref
from collections.abc import Iterator

from torch import nn

from lightning_kd.distiller import Distiller

_OF: weakref.WeakKeyDictionary[object, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def learns(distiller: Distiller) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that a fit changes, by the name of their term: projectors, and losses that learn or store."""
    for name, term in distiller.named_terms():
        yield from ((name, part) for part in term.parts() if hasattr(part, "build") or _has_parameters(part))
    if distiller.teacher_learner is not None:
        yield "the teacher", distiller.teacher_learner


def learned_with(student: nn.Module, *parts: object) -> None:
    """Notes with which student parts have learned."""
    _OF.update(dict.fromkeys(parts, weakref.ref(_uncompiled(student))))


def forget(*parts: object) -> None:
    """Forgets that: what they are now comes from a checkpoint."""
    for part in parts:
        _OF.pop(part, None)


def learned_elsewhere(student: nn.Module, part: object) -> bool:
    """Returns whether a part has learned with another student than that."""
    return part in _OF and _OF[part]() is not _uncompiled(student)


def _uncompiled(student: nn.Module) -> nn.Module:
    plain: nn.Module = getattr(student, "_orig_mod", student)
    return plain


def _has_parameters(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())
