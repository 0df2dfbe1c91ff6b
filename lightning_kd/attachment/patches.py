"""What is changed on somebody else's module for the length of a fit, and undone after it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_kd.copying import lend


class Patches:
    """Changes, each with how it is undone; undone in reverse order, once.

    Example:
        >>> module, patches = nn.Linear(2, 2), Patches()
        >>> patches.replace(module, "forward", lambda x: 0)
        >>> module(None)
        0
        >>> patches.undo()
        >>> "forward" in vars(module)
        False
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def add(self, undo: Callable[[], Any]) -> None:
        """Remembers how a change that was made is undone."""
        self._undo.append(undo)

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of the instance, which hides that of its class; copies of the instance have its own."""
        had = vars(module).get(name)
        self.add(lend(module, {name: had}))

        def undo() -> None:
            if had is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, had)

        setattr(module, name, value)
        self.add(undo)

    def undo(self) -> None:
        """Undoes all of them, the latest first."""
        while self._undo:
            self._undo.pop()()
