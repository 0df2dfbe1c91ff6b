"""A batch as it came: what a step does to it is done to another one."""

import copy
from collections.abc import Iterator, Mapping
from itertools import islice
from numbers import Number
from typing import Any

from torch import Tensor, nn

from lightning_kd.overwriting import overwritten, tensors_in, versions_of
from lightning_kd.wiring import describe

_PLAIN = (list, tuple, dict)
_WIDE = 10_000
"""Things in a list or dict that is copied with what is in them; of more, only the list or dict itself."""


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the batch that a ``training_step`` was called with, its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def as_it_comes(batch: Any, made: dict[int, Any] | None = None) -> Any:
    """Copies what holds the tensors of a batch, and of these the integers and booleans: labels and masks, no images.

    That are lists, tuples and dicts and objects with tensors in such or in their attributes; in objects of objects
    nothing is copied.

    Args:
        batch: The batch.
        made: Copies that were made of others in it.

    Example:
        >>> import torch
        >>> batch = {"x": torch.zeros(2), "y": torch.tensor([3, 255])}
        >>> came = as_it_comes(batch)
        >>> batch.pop("y").clamp_(max=9), came["y"], came["x"] is batch["x"]
        (tensor([3, 9]), tensor([  3, 255]), True)
    """
    made = {} if made is None else made
    if isinstance(batch, Tensor):
        return batch if batch.is_floating_point() or batch.is_complex() else batch.clone()
    if isinstance(batch, tuple) and (type(batch) is tuple or hasattr(batch, "_fields")):
        items = [as_it_comes(x, made) for x in batch]
        return tuple(items) if type(batch) is tuple else type(batch)(*items)
    if id(batch) not in made:
        copied = made[id(batch)] = _shallow(batch)
        if copied is not batch:
            _fill(copied, made)
    return made[id(batch)]


def _shallow(of: Any) -> Any:
    """Returns a copy of what holds tensors, and everything else itself."""
    if of is None or isinstance(of, (str, bytes, Number)):  # of which there may be many
        return of
    holds = isinstance(of, (list, dict)) or any(_holds(x) for _, x in _attributes(of))
    # A module has its parameters; and where a copy is deleted, too, so is what it was copied from.
    if not holds or isinstance(of, (nn.Module, type)) or hasattr(type(of), "__del__"):
        return of
    try:
        return copy.copy(of)
    except Exception:  # an object that is the only one of its kind
        return of


def _fill(copied: Any, made: dict[int, Any]) -> None:
    if isinstance(copied, list) and len(copied) <= _WIDE:
        for index, x in enumerate(list.__iter__(copied)):
            list.__setitem__(copied, index, as_it_comes(x, made))
    if isinstance(copied, dict) and len(copied) <= _WIDE:
        for key, x in list(dict.items(copied)):
            dict.__setitem__(copied, key, as_it_comes(x, made))
    for name, x in _attributes(copied) if type(copied) not in _PLAIN else ():
        if isinstance(x, Tensor) or type(x) in _PLAIN:
            object.__setattr__(copied, name, as_it_comes(x, made))


def _attributes(of: Any) -> list[tuple[str, Any]]:
    slots = [name for kind in type(of).__mro__ for name in _as_tuple(vars(kind).get("__slots__", ()))]
    held = [(name, getattr(of, name)) for name in slots if name[:2] != "__" and hasattr(of, name)]
    return [*getattr(of, "__dict__", {}).items(), *held]


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _holds(x: Any, deep: int = 3) -> bool:
    """Whether a tensor, or a list or dict with tensors in it."""
    if type(x) in _PLAIN and deep:
        return any(_holds(y, deep - 1) for y in _some(x))
    return isinstance(x, Tensor)


def _some(x: Any) -> Iterator[Any]:
    return islice(iter(x.values() if isinstance(x, dict) else x), _WIDE)


class Came:
    """The arguments of a step as they came, for others that are called with them, too."""

    def __init__(self, arguments: Any) -> None:
        self._kept = as_it_comes(arguments)
        self._versions = versions_of(self._kept)

    def again(self, step: str) -> Any:
        """Returns them.

        Raises:
            ValueError: If a step has overwritten one that was not copied.
        """
        written = next((x for x in tensors_in(self._kept) if overwritten(x, self._versions)), None)
        if written is not None:
            raise ValueError(
                f"{step} overwrites its batch ({describe(written)}) in place, which the peers' {step} is called with, "
                "too. Let it make something new: x = x / 255 and not x.div_(255)."
            )
        return as_it_comes(self._kept)
