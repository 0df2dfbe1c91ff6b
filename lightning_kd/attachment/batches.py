"""A batch as it came: what a step does to it is done to another one."""

import copy
from collections import UserDict, deque
from collections.abc import Mapping
from itertools import islice
from numbers import Number
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_kd.holding import attributes_of
from lightning_kd.overwriting import Given
from lightning_kd.watching import Arguments
from lightning_kd.wiring import describe

_PLAIN = (list, tuple, dict)
_KNOWN = (list, dict, deque)
_SINGLE = (str, bytes, Number, nn.Module, type)
_WIDE = 10_000
"""Things in a list or dict that is copied with what is in them; of more, only the list or dict itself."""


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the batch that a ``training_step`` was called with, its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def with_batch(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Returns the arguments of a step or hook with another batch."""
    return ((batch, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): batch})


Made = dict[int, tuple[Any, Any]]
"""What was copied in a batch, which stays alive as long as its id stands for it, and the copy."""


def as_it_comes(batch: Any, made: Made | None = None) -> Any:
    """Copies what holds the tensors of a batch, and of these the integers and booleans: labels and masks, no images.

    That are lists, tuples and dicts and objects with tensors in such or in their attributes; of objects of objects
    what their own ``__copy__`` copies. Under ``inference_mode``, where nothing tells that a tensor was overwritten,
    images are copied, too.

    Args:
        batch: The batch.
        made: Where to note what was copied.

    Example:
        >>> import torch
        >>> batch = {"x": torch.zeros(2), "y": torch.tensor([3, 255])}
        >>> came = as_it_comes(batch)
        >>> batch.pop("y").clamp_(max=9), came["y"], came["x"] is batch["x"]
        (tensor([3, 9]), tensor([  3, 255]), True)
    """
    made = {} if made is None else made
    if batch is None or isinstance(batch, _SINGLE):  # of which there may be many
        return batch
    if isinstance(batch, tuple) and (type(batch) is tuple or hasattr(batch, "_fields")):
        items = [as_it_comes(x, made) for x in batch]
        return tuple(items) if type(batch) is tuple else type(batch)(*items)
    if id(batch) not in made:
        copied = _shallow(batch)
        made[id(batch)] = batch, copied
        if copied is not batch and not isinstance(batch, Tensor):
            _fill(copied, made)
    return made[id(batch)][1]


def _shallow(of: Any) -> Any:
    """Returns a copy of what holds tensors, and everything else itself."""
    if isinstance(of, Tensor):
        images = of.is_floating_point() or of.is_complex()
        if images and not of.is_inference():
            return of
        cloned = of.clone()
        for name, x in vars(of).items():
            vars(cloned).setdefault(name, x)
        return cloned
    own = hasattr(type(of), "__copy__") and not hasattr(type(of), "__array_interface__")
    holds = own or isinstance(of, _KNOWN) or any(_holds(x) for _, x in attributes_of(of))
    # Where a copy is deleted, too, what it was copied from may be closed.
    if not holds or hasattr(type(of), "__del__"):
        return of
    try:
        copied = copy.copy(of)
    except Exception:  # an object that is the only one of its kind
        return of
    if getattr(of, "__dict__", None) is of:  # keys are attributes
        copied.__dict__ = copied
    return copied


def _fill(copied: Any, made: Made) -> None:
    if isinstance(copied, (list, deque)) and len(copied) <= _WIDE:
        for index, x in enumerate(list(copied)):
            copied[index] = as_it_comes(x, made)
    if isinstance(copied, dict) and len(copied) <= _WIDE:
        for key, x in list(dict.items(copied)):
            dict.__setitem__(copied, key, as_it_comes(x, made))
    own = type(copied) not in _PLAIN and getattr(copied, "__dict__", None) is not copied
    for name, x in list(attributes_of(copied)) if own else ():
        if isinstance(x, Tensor) or type(x) in _PLAIN:
            _set(copied, name, as_it_comes(x, made), like=copied)


def _set(of: Any, name: str, x: Any, like: Any) -> None:
    """Sets an attribute where another object of the kind has it, whatever its class says of setting."""
    if name in getattr(like, "__dict__", {}):
        vars(of)[name] = x
    else:
        object.__setattr__(of, name, x)


def _holds(x: Any, deep: int = 2) -> bool:
    """Whether a tensor, or a list or dict with tensors among the first things in it."""
    if type(x) in _PLAIN and deep:
        return any(_holds(y, deep - 1) for y in islice(x.values() if isinstance(x, dict) else x, 100))
    return isinstance(x, Tensor)


def add_new(came: Any, now: Any, made: Made, added: set[tuple[int, Any]], deep: int = 3) -> None:
    """Puts into a batch as it came what is new in it now: where it had nothing, or None.

    Into a list only where that is the one that came, with all that was in it.

    Args:
        came: A copy of the batch, or of a list, tuple or dict in it.
        now: The same of the batch that a step has had.
        made: What was copied of the batch.
        added: What was put there, which is put there again.
        deep: How far lists, tuples and dicts are followed.
    """
    if came is now or type(came) is not type(now) or not deep:
        return
    before, after = _by_name(came), _by_name(now)
    ordered = isinstance(came, (list, tuple))
    puts = not ordered or (isinstance(came, list) and len(came) <= len(now) and _still(came, now, made, added))
    if len(after) > _WIDE or (ordered and len(before) != len(after) and not puts):
        return
    for name, x in after.items():
        if before.get(name) is None or (id(came), name) in added:
            if puts:
                _put(came, name, x, now)
                added.add((id(came), name))
        elif type(x) in _PLAIN:
            copied = made.get(id(x), (x, before[name]))[1]  # its own, wherever it is now
            add_new(copied, x, made, added, deep - 1)


def _still(came: list[Any], now: list[Any], made: Made, added: set[tuple[int, Any]]) -> bool:
    """Whether a list is the one that was copied, and what was in it is where it was."""

    def is_copy(copied: Any, of: Any) -> bool:
        return copied is of or made.get(id(of), (None, None))[1] is copied

    there = (x is None or (id(came), i) in added or is_copy(x, now[i]) for i, x in enumerate(came))
    return is_copy(came, now) and all(there)


def _by_name(of: Any) -> Mapping[Any, Any]:
    """Returns what there is by its key, its index or as an attribute."""
    if isinstance(of, (dict, UserDict)):
        return of
    return dict(enumerate(of) if isinstance(of, (list, tuple)) else attributes_of(of))


def _put(into: Any, name: Any, x: Any, like: Any) -> None:
    if isinstance(into, (dict, UserDict)):
        into[name] = x
    elif isinstance(into, list):
        into[name : name + 1] = [x]  # or behind the last
    else:
        _set(into, name, x, like)


class Came:
    """The arguments of a step as they came, for others that are called with them, too."""

    def __init__(self, arguments: Any) -> None:
        self._kept = as_it_comes(arguments)
        self._given = Given(self._kept, WeakIdKeyDictionary())

    def again(self, step: str) -> Any:
        """Returns them.

        Raises:
            ValueError: If a step has overwritten one that was not copied.
        """
        if (written := self._given.overwritten()) is not None:
            raise ValueError(
                f"{step} overwrites its batch ({describe(written)}) in place, which the peers' {step} is called with, "
                "too. Let it make something new: x = x / 255 and not x.div_(255)."
            )
        return as_it_comes(self._kept)
