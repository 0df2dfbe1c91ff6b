"""Several networks that see the same images, as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class SideBySide(nn.Module):
    """Calls each of its networks with what it is called with.

    Two teachers of different kinds and a student for each are then one teacher and one student, whose terms name layers
    by the networks' names: ``resnet.layer1``.

    Args:
        networks: By name.

    Returns:
        ``forward(...)`` returns what each returned, by its name.

    Raises:
        ValueError: If there is no network.

    Example:
        >>> import torch
        >>> both = SideBySide({"a": nn.Linear(2, 3), "b": nn.Linear(2, 1)})
        >>> {name: tuple(each.shape) for name, each in both(torch.zeros(4, 2)).items()}
        {'a': (4, 3), 'b': (4, 1)}
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("networks is empty: give at least one, by name.")
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns what each network returned, by its name."""
        return {name: network(*args, **kwargs) for name, network in self.named_children()}
