"""What is written in place: tensors that are not what they were, and two that are one."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor
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


def refuse_overwriting_teacher(leaves: list[Any], versions: Mapping[int, int]) -> None:
    """Raises ``ValueError`` where the teacher has written into what the student is called with next."""
    for x in leaves:
        if overwritten(x, versions):
            raise ValueError(
                f"the teacher overwrites its input ({describe(x)}), which the student is called with next. Give it its "
                "own: teacher_input=lambda x: x.clone()."
            )


def refuse_overwriting_input(name: str, leaves: list[Any], versions: Mapping[int, int], given: Any) -> None:
    """Raises ``ValueError`` where a function of inputs has written into what it was given, or exchanged parts of it."""
    for x, now in zip_longest(leaves, tree_leaves(given)):
        if x is not now or overwritten(x, versions):
            raise ValueError(
                f"{name} changes what it is given ({describe(now if x is None else x)}) in place, which is the other "
                "side's input and the batch of training_step, too. Let it return something new: x + noise and not "
                "x.add_(noise)."
            )
