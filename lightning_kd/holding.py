"""What objects hold: the tensors in them, and the way to each; and copies of the objects without the tensors."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from itertools import islice
from numbers import Number
from types import FunctionType, ModuleType, NoneType
from typing import Any

from torch import Tensor, nn

Place = tuple[Any, ...]
"""The way from an object to something that it holds: attributes, indices and keys."""

Left = MutableMapping[Any, set[Place]]
"""Where others have put tensors into objects, by all the objects on the way; it refers to them weakly."""

PLAIN = (list, tuple, dict)
SINGLE = (str, bytes, Number, type, FunctionType, ModuleType, nn.Module)
"""What holds no tensors that count."""

MOST_COPIED = 10_000
"""Things in a list or dict that is copied with what is in them; of more, only the list or dict itself."""

_COPIED = (list, dict, deque)
_OFTEN = {str, int, float, bool, NoneType}  # of which a batch may hold many: isinstance of Number takes 0.3 us
_OF_PYTHON = ("__dict__", "__weakref__")
_MISSING = object()
_DEEP, _WIDE, _MOST = 4, 1_000, 10_000


@dataclass(eq=False)
class Node:
    """An object, a list, a tuple or a dict, and what it holds by name: tensors, and others of its kind."""

    of: Any
    ways: list[tuple[Any, Place]]
    """To it, from all objects before it that can be referred to weakly."""
    tensors: dict[Any, Tensor] = field(default_factory=dict)
    others: "dict[Any, Node]" = field(default_factory=dict)
    known: bool = False
    """Whether it was looked into."""

    def to(self, name: Any) -> list[tuple[Any, Place]]:
        """Returns the ways to something in it."""
        return [(owner, (*way, name)) for owner, way in self.ways]


NOTHING = Node((), [], known=True)


def look_into(leaves: list[Any], left: Left) -> dict[int, Node]:
    """Returns the list and all that is in it, the nearest first, by its id; a node keeps what it is of alive."""
    root = Node(leaves, [(left, ())])  # which is there for what is in no object that can be referred to weakly
    nodes, count = {id(leaves): root}, 0
    level = [root]
    for _ in range(1 + _DEEP):
        this, level = level, []
        for node in this:  # which grows
            if count > _MOST:
                break
            node.known = True
            some_left = any(owner in left for owner, _ in node.ways)
            for name, x in islice(_things_in(node.of), None if node is root else _WIDE):
                count += node is not root
                if type(x) in _OFTEN or isinstance(x, SINGLE):
                    continue
                if some_left and any(way in left.get(owner, ()) for owner, way in node.to(name)):
                    continue
                if isinstance(x, Tensor):
                    node.tensors[name] = x
                    continue
                if id(x) not in nodes:
                    itself = [(x, ())] if type(x).__weakrefoffset__ else []
                    nodes[id(x)] = Node(x, [*node.to(name), *itself])
                    (this if type(x) in PLAIN else level).append(nodes[id(x)])
                node.others[name] = nodes[id(x)]
    return nodes


def _things_in(of: Any) -> Iterator[tuple[Any, Any]]:
    """Returns what an object, a list, a tuple or a dict holds, each with a name; no code of its class runs."""
    if type(of) not in PLAIN:
        yield from (((".", name), x) for name, x in attributes_of(of))
    if issubclass(type(of), dict):
        for key, x in dict.items(of):
            yield ("[]", key if isinstance(key, (str, int)) else id(key)), x
    for kind in (list, tuple):
        if issubclass(type(of), kind):
            yield from ((("[]", index), x) for index, x in enumerate(kind.__iter__(of)))


def attributes_of(of: Any) -> Iterator[tuple[str, Any]]:
    """Returns the attributes that an object has of its own, in a ``__dict__`` or in slots; no code of its class runs.

    Example:
        >>> class Scan:
        ...     __slots__ = ("image", "mask")
        >>> scan = Scan()
        >>> scan.image = 1
        >>> list(attributes_of(scan))
        [('image', 1)]
    """
    yield from _own(of, "__dict__", {}).items()
    for kind in type(of).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            called = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            if name not in _OF_PYTHON and (x := _own(of, called, _MISSING)) is not _MISSING:
                yield called, x


def _own(of: Any, name: str, default: Any) -> Any:
    try:
        return object.__getattribute__(of, name)
    except AttributeError:
        return default


Made = dict[int, tuple[Any, Any]]
"""What was copied, which stays alive as long as its id stands for it, and the copy."""


def _itself(of: Tensor) -> Tensor:
    return of


def copy_holders(value: Any, of_tensor: Callable[[Tensor], Tensor] = _itself, made: Made | None = None) -> Any:
    """Copies lists, tuples, dicts, and objects with tensors in such or in their attributes; not the tensors.

    Of objects of objects is copied what their own ``__copy__`` copies.

    Args:
        value: What may hold tensors.
        of_tensor: What stands for a tensor in the copy.
        made: Where to note what was copied.

    Example:
        >>> import torch
        >>> output = {"logits": torch.zeros(2), "levels": [torch.ones(1)]}
        >>> copied = copy_holders(output)
        >>> output["logits"], _ = None, output["levels"].pop()
        >>> copied
        {'logits': tensor([0., 0.]), 'levels': [tensor([1.])]}
    """
    made = {} if made is None else made
    if value is None or isinstance(value, SINGLE):  # of which there may be many
        return value
    if isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_fields")):
        items = tuple(copy_holders(x, of_tensor, made) for x in value)
        if all(x is y for x, y in zip(items, value, strict=True)):
            return value
        if type(value) is tuple:
            return items
        named: Any = tuple.__new__(type(value), items)
        getattr(named, "__dict__", {}).update(getattr(value, "__dict__", {}))
        return named
    if id(value) not in made:
        copied = of_tensor(value) if isinstance(value, Tensor) else _shallow(value)
        made[id(value)] = value, copied
        if copied is not value and not isinstance(value, Tensor):
            _fill(copied, of_tensor, made)
    return made[id(value)][1]


def _shallow(of: Any) -> Any:
    """Returns a copy of what holds tensors, and everything else itself."""
    own = hasattr(type(of), "__copy__") and not hasattr(type(of), "__array_interface__")
    holds = own or isinstance(of, _COPIED) or any(_holds(x) for _, x in attributes_of(of))
    # Where a copy is deleted, too, what it was copied from may be closed.
    if not holds or hasattr(type(of), "__del__"):
        return of
    try:
        copied = copy.copy(of) if own or isinstance(of, _COPIED) else _bare(of)
    except Exception:  # an object that is the only one of its kind
        return of
    if getattr(of, "__dict__", None) is of:  # keys are attributes
        copied.__dict__ = copied
    return copied


def _bare(of: Any) -> Any:
    """Returns a copy of an object, without asking it: some look every attribute up in what they do not have yet."""
    try:
        copied = object.__new__(type(of))
    except TypeError:  # one that is not written in Python
        return copy.copy(of)
    for name, x in attributes_of(of):
        set_attribute(copied, name, x, like=of)
    return copied


def _fill(copied: Any, of_tensor: Callable[[Tensor], Tensor], made: Made) -> None:
    if isinstance(copied, (list, deque)) and len(copied) <= MOST_COPIED:
        for index, x in enumerate(list(copied)):
            copied[index] = copy_holders(x, of_tensor, made)
    if isinstance(copied, dict) and len(copied) <= MOST_COPIED:
        for key, x in list(dict.items(copied)):
            dict.__setitem__(copied, key, copy_holders(x, of_tensor, made))
    own = type(copied) not in PLAIN and getattr(copied, "__dict__", None) is not copied
    for name, x in list(attributes_of(copied)) if own else ():
        if isinstance(x, Tensor) or type(x) in PLAIN:
            set_attribute(copied, name, copy_holders(x, of_tensor, made), like=copied)


def set_attribute(of: Any, name: str, x: Any, like: Any) -> None:
    """Sets an attribute where another object of the kind has it, whatever its class says of setting."""
    if name in getattr(like, "__dict__", {}):
        vars(of)[name] = x
    else:
        object.__setattr__(of, name, x)


def _holds(x: Any, deep: int = 2) -> bool:
    """Whether a tensor, or a list or dict with tensors among the first things in it."""
    if type(x) in PLAIN and deep:
        return any(_holds(y, deep - 1) for y in islice(x.values() if isinstance(x, dict) else x, 100))
    return isinstance(x, Tensor)
