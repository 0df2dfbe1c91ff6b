"""What is written in place: tensors that are not what they were, and two that are one."""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_kd.holding import NOTHING, SINGLE, Left, attributes_of, look_into
from lightning_kd.wiring import describe


def tensors_in(value: Any, deep: int = 10) -> Iterator[Tensor]:
    """Finds the tensors whose overwriting can be told, in what a module returned."""
    if isinstance(value, Tensor):
        if not value.is_inference():  # these have no version
            yield value
    elif value is None or isinstance(value, SINGLE) or deep <= 0:
        return
    elif isinstance(value, (Mapping, tuple, list, deque)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item, deep - 1)
    else:
        for _, item in attributes_of(value):
            yield from tensors_in(item, deep - 4)  # objects may know each other, and many


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


class Given:
    """What a student is called with, to be told from what others leave of it.

    Tensors are found where a program keeps them: in lists, tuples, dicts and the attributes of objects. Each is looked
    into once, and nothing is computed for it. Left out are arrays, sets, attributes of a tensor, what a mapping
    computes, what is more than 4 objects deep, behind the first 1,000 things of one, or behind the nearest 10,000.

    Args:
        arguments: Of the call.
        left: Where others put tensors in earlier calls, which does not count; where they do in this one is added.
    """

    def __init__(self, arguments: Any, left: Left) -> None:
        self.arguments = arguments
        self._left = left
        self._leaves = tree_leaves(arguments)
        self._nodes = look_into(self._leaves, self._left)
        self._tensors = [x for node in self._nodes.values() for x in node.tensors.values()]
        self._versions = versions_of(self._tensors)

    def overwritten(self) -> Any:
        """Returns something of it that was written in place; None where nothing was."""
        return next((x for x in self._tensors if overwritten(x, self._versions)), None)

    def exchanged(self) -> Any:
        """Returns something of it that is no longer where it was; None where everything is."""
        for before, after in zip_longest(self._leaves, tree_leaves(self.arguments)):
            if before is not after:
                return after if before is None else before
        root, now, added = id(self._leaves), look_into(self._leaves, self._left), []
        pairs, seen = [(self._nodes[root], now[root])], set()
        for pair in pairs:  # which grows
            old, new = pair
            if pair in seen or not (old.known and new.known):
                continue
            seen.add(pair)
            for name, x in old.tensors.items():
                if not _is_there(x, new.tensors.get(name)):
                    return x
            there = {*old.tensors, *self._nodes.get(id(new.of), NOTHING).tensors}  # it may have been elsewhere
            added += [(new, name) for name in new.tensors if name not in there]
            names = {**old.others, **new.others}
            pairs += [(old.others.get(name, NOTHING), new.others.get(name, NOTHING)) for name in names]
        for owner, way in (each for node, name in added for each in node.to(name)[1:] or node.to(name)):
            self._left.setdefault(owner, set()).add(way)
        return None


def _is_there(before: Tensor, after: Tensor | None) -> bool:
    if before is after or after is None:
        return before is after
    plain = all(x.layout == torch.strided and not x.is_nested for x in (before, after))
    return plain and one_memory(before, after)  # x = x.detach() is no other


def refuse_overwriting_teacher(given: Given) -> None:
    """Raises ``ValueError`` where the teacher has written into what the student is called with next."""
    if (x := given.overwritten()) is not None:
        raise ValueError(
            f"the teacher overwrites its input ({describe(x)}), which the student is called with next. Give it its "
            "own: teacher_input=lambda x: x.clone(), or (copy.deepcopy(x),) of an object."
        )
    if (x := given.exchanged()) is not None:
        raise ValueError(
            f"the teacher exchanges what it is given: {describe(x)} is no longer in the object that the student is "
            "called with next, which would begin with what the teacher left there. Give the teacher an object of its "
            "own: teacher_input=lambda batch: (copy.copy(batch),), or copy.deepcopy(batch) if it writes into its lists."
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
