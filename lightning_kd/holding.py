"""What objects hold: the tensors in them, and the way to each, found without running their code."""

from collections.abc import Iterator, MutableMapping
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

_PLAIN = (list, tuple, dict)
_SINGLE = (str, bytes, Number, type, FunctionType, ModuleType, nn.Module)
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
                if type(x) in _OFTEN or isinstance(x, _SINGLE):
                    continue
                if some_left and any(way in left.get(owner, ()) for owner, way in node.to(name)):
                    continue
                if isinstance(x, Tensor):
                    node.tensors[name] = x
                    continue
                if id(x) not in nodes:
                    itself = [(x, ())] if type(x).__weakrefoffset__ else []
                    nodes[id(x)] = Node(x, [*node.to(name), *itself])
                    (this if type(x) in _PLAIN else level).append(nodes[id(x)])
                node.others[name] = nodes[id(x)]
    return nodes


def _things_in(of: Any) -> Iterator[tuple[Any, Any]]:
    """Returns what an object, a list, a tuple or a dict holds, each with a name; no code of its class runs."""
    if type(of) not in _PLAIN:
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
