"""A guest in a user's module: parameters that are trained there and that no state dict shows."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_kd.distiller import Distiller

GUEST = "_distillation"
"""The submodule that holds the terms' parameters in the user's module during a fit."""


class Guest(nn.Module):
    """Holds what learns in the user's module: its parameters are trained there, and in no state dict."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner
        self.register_load_state_dict_post_hook(_forgive_guest)  # type: ignore[no-untyped-call]  # torch's own gap

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guest":
        # Weight averaging copies the module that is trained: what learns, and not the teacher.
        for part in self.learner.modules():
            if isinstance(part, Distiller):
                memo[id(part.teacher)] = part.teacher
        return Guest(copy.deepcopy(self.learner, memo))

    def __getstate__(self) -> dict[str, Any]:
        # Pickled with the module that is trained: likewise.
        return {**self.__dict__, "_modules": {"learner": nn.ParameterList(self.learner.parameters())}}

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Returns nothing of its own."""
        return {} if destination is None else destination


@contextmanager
def without_guests(module: nn.Module) -> Iterator[None]:
    """Lets a module be the user's own for a while: ``module.parameters()`` are those that it has without a fit."""
    guests = {name: part for name, part in module._modules.items() if name.startswith(GUEST)}
    for name in guests:
        del module._modules[name]
    try:
        yield
    finally:
        module._modules.update(guests)


def _forgive_guest(module: nn.Module, incompatible: Any) -> None:
    """Keeps strict loading of the user's module strict about the user's own keys only."""
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(part.startswith(GUEST) for part in key.split("."))
    ]
