"""What is written in place: tensors that are not what they were, and two that are one."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain, zip_longest
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_kd.wiring import describe


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Finds the tensors whose overwriting can be told, in what a module returned."""
    if isinstance(value, Tensor):
        if not value.is_inference():  # these have no version
            yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, field.name, None) for field in fields(value)])


def versions_of(value: Any) -> dict[int, int]:
    """Returns how often each of the tensors in there was written, by its id: it must live as long as this is used."""
    return {id(tensor): tensor._version for tensor in tensors_in(value)}


def overwritten(value: Any, versions: Mapping[int, int]) -> bool:
    """Tells whether a tensor in there was written since ``versions_of`` saw it."""
    return any(versions.get(id(tensor), tensor._version) != tensor._version for tensor in tensors_in(value))


def one_memory(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors are one, of which one may be detached."""
    where = [(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in (a, b)]
    return where[0] == where[1]


Place = tuple[Any, ...]
"""The way to something: which argument, then names."""

_DEEP = 4
"""How far into objects tensors are looked for: the batch of a graph library has them in an object in an object."""


class Given:
    """What a student is called with, to be told from what others leave of it.

    Args:
        arguments: Of the call. Tensors are also found in objects that pytrees do not look into.
        left: Places in such objects that do not count, since others made them in an earlier call.
    """

    def __init__(self, arguments: Any, left: Collection[Place] = ()) -> None:
        self.arguments = arguments
        self._leaves = tree_leaves(arguments)
        self._held = {place: x for place, x in _held_in(enumerate(self._leaves)) if place not in left}
        self.tensors = [*(x for x in self._leaves if isinstance(x, Tensor)), *self._held.values()]
        self._versions = versions_of(self.tensors)

    def overwritten(self) -> Any:
        """Returns something of it that was written in place; None where nothing was."""
        return next((x for x in self.tensors if overwritten(x, self._versions)), None)

    def exchanged(self) -> Any:
        """Returns something of it that is no longer where it was; None where everything is."""
        now = zip_longest(self._leaves, tree_leaves(self.arguments))
        held = dict(_held_in(enumerate(self._leaves))) if self._held else {}
        lost = (x for place, x in self._held.items() if not _is_there(x, held.get(place)))
        exchanged = (after if before is None else before for before, after in now if before is not after)
        return next(chain(exchanged, lost), None)

    def added(self) -> set[Place]:
        """Returns the places where something is that was not there."""
        return {place for place, _ in _held_in(enumerate(self._leaves))} - self._held.keys()


def _is_there(before: Tensor, after: Tensor | None) -> bool:
    if before is after or after is None:
        return before is after
    plain = all(x.layout == torch.strided and not x.is_nested for x in (before, after))
    return plain and one_memory(before, after)  # x = x.detach() is no other


def _held_in(named: Iterable[tuple[Any, Any]], depth: int = _DEEP) -> Iterator[tuple[Place, Tensor]]:
    """Finds the tensors in objects and unregistered mappings, each with the way to it."""
    for name, owner in named:
        if isinstance(owner, (Tensor, nn.Module, type, str, Number)) or not depth:
            continue
        for kind, part in enumerate(_parts(owner)):
            yield from (((name, kind, key), value) for key, value in part.items() if isinstance(value, Tensor))
            yield from (((name, kind, *way), value) for way, value in _held_in(part.items(), depth - 1))


def _parts(owner: Any) -> list[dict[Any, Any]]:
    """Returns what a mapping and an object hold by name; of a mapping that is an object, too, both."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(owner).__mro__]
    names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
    parts = [dict(getattr(owner, "__dict__", {})) | {name: getattr(owner, name, None) for name in names}]
    if isinstance(owner, Mapping):
        with contextlib.suppress(Exception):  # of one that computes its items, and cannot
            first, again = dict(owner.items()), dict(owner.items())
            parts.append({name: x for name, x in first.items() if again.get(name) is x})
    return parts


def refuse_overwriting_teacher(given: Given) -> None:
    """Raises ``ValueError`` where the teacher has written into what the student is called with next."""
    if (x := given.overwritten()) is not None:
        raise ValueError(
            f"the teacher overwrites its input ({describe(x)}), which the student is called with next. Give it its "
            "own: teacher_input=lambda x: x.clone()."
        )
    if (x := given.exchanged()) is not None:
        raise ValueError(
            f"the teacher exchanges what it is given: {describe(x)} is no longer in the object that the student is "
            "called with next, which would begin with what the teacher left there. Give the teacher an object of its "
            "own: teacher_input=lambda batch: (copy.copy(batch),)."
        )


def refuse_overwriting_input(name: str, given: Given) -> None:
    """Raises ``ValueError`` where a function of inputs has written into what it was given, or exchanged parts of it."""
    x = given.exchanged()
    if x is None:
        x = given.overwritten()
    if x is not None:
        raise ValueError(
            f"{name} changes what it is given ({describe(x)}) in place, which is the other side's input and the batch "
            "of training_step, too. Let it return something new: x + noise and not x.add_(noise)."
        )
