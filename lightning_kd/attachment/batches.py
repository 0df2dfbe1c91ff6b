"""A batch as it came: what a step does to it is done to another one."""

from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_kd.holding import MOST_COPIED, PLAIN, Made, attributes_of, copy_holders, set_attribute
from lightning_kd.overwriting import Given
from lightning_kd.watching import Arguments
from lightning_kd.wiring import describe


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the batch that a ``training_step`` was called with, its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def with_batch(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Returns the arguments of a step or hook with another batch."""
    return ((batch, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): batch})


def as_it_comes(batch: Any, made: Made | None = None) -> Any:
    """Copies what holds the tensors of a batch, and of these the integers and booleans: labels and masks, no images.

    Under ``inference_mode``, where nothing tells that a tensor was overwritten, images are copied, too.

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
    return copy_holders(batch, _own_labels, made)


def _own_labels(of: Tensor) -> Tensor:
    images = of.is_floating_point() or of.is_complex()
    if images and not of.is_inference():
        return of
    cloned = of.clone()
    for name, x in vars(of).items():
        vars(cloned).setdefault(name, x)
    return cloned


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
    if len(after) > MOST_COPIED or (ordered and len(before) != len(after) and not puts):
        return
    for name, x in after.items():
        if before.get(name) is None or (id(came), name) in added:
            if puts:
                _put(came, name, x, now)
                added.add((id(came), name))
        elif type(x) in PLAIN:
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
        set_attribute(into, name, x, like)


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
