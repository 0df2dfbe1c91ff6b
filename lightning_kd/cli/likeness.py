"""Whether two networks say the same: what is compared of what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TINY = 1e-6
"""Differences are relative to the largest value of an output, or to this, where that is smaller."""
SAME = 1e-3
"""Largest relative difference between what is still one network, computed at another size or once more."""

Outputs = list[Tensor]


def outputs(value: Any) -> Outputs:
    """All tensors in what a network returned, in order; those of an object of the network's own by its attributes.

    Example:
        >>> len(outputs({"logits": torch.zeros(2), "levels": (torch.zeros(3), None)}))
        2
    """
    leaves = torch.utils._pytree.tree_leaves(value)
    return [tensor for leaf in leaves for tensor in ([leaf] if isinstance(leaf, Tensor) else _held(leaf))]


def _held(value: Any) -> Iterator[Tensor]:
    """The tensors that an object holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        held = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    for each in torch.utils._pytree.tree_leaves(dict(held)):
        if isinstance(each, Tensor):
            yield each


def difference(expected: Outputs, received: Outputs) -> float:
    """Largest difference relative to the largest value of each output; infinity, where they are of other shapes."""
    if [each.shape for each in expected] != [each.shape for each in received]:
        return float("inf")
    return max(map(distance, expected, received), default=0.0)


def distance(expected: Tensor, received: Tensor) -> float:
    """Largest difference relative to the largest value; infinity, where one is no number and the other not the same."""
    expected, received = expected.double(), received.double()  # also what was decided, True and False
    numbers = expected.isfinite()
    if not torch.allclose(expected[~numbers], received[~numbers], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    differing = (expected - received)[numbers].abs().nan_to_num(nan=float("inf"))
    return float(differing.amax() / expected[numbers].abs().amax().clamp(min=TINY)) if len(differing) else 0.0


def unmatched(expected: Outputs, received: Outputs) -> float:
    """Largest distance of something found to the next that the other found: equal scores may come in any order."""
    mine, theirs = (torch.cat([each.flatten(1) if each.ndim > 1 else each[:, None] for each in found], dim=1).double()
                    for found in (expected, received))  # fmt: skip
    if not len(mine) or not len(theirs):
        return 0.0 if len(mine) == len(theirs) else float("inf")
    scale = torch.cat([mine, theirs]).abs().amax(0).clamp(min=1.0)
    apart = torch.cdist(mine / scale, theirs / scale, p=float("inf")).nan_to_num(nan=float("inf"))
    return float(torch.maximum(apart.amin(0).amax(), apart.amin(1).amax()))
