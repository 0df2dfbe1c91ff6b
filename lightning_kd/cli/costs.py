"""What a network costs, whoever trained it: parameters, operations, time, bytes."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def count(model: nn.Module, example: tuple[Any, ...]) -> dict[str, float]:
    """Parameters, floating-point operations for the example (none, if it is empty), and bytes on disk.

    A multiply-add is two operations, as ``torch.utils.flop_counter`` counts.
    """
    model.eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    found: dict[str, float] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "size_bytes": file.getbuffer().nbytes,
    }
    if not example:
        return found
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*example)
    return found | {"flops": counter.get_total_flops()}


def architecture(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Any]:
    """What else decides the costs than the settings of a network: data say its classes, and how large images are.

    Example:
        >>> architecture(nn.Linear(2, 1, bias=False), (torch.zeros(1, 2),))
        {'class': 'Linear', 'weights': {'weight': '[1, 2] torch.float32'}, 'inputs': ['[1, 2] torch.float32']}
    """
    return {
        "class": type(model).__name__,
        "weights": {name: _shape(value) for name, value in model.state_dict().items()},
        "inputs": [_shape(leaf) for leaf in tree_leaves(example)],
    }


def _shape(value: Any) -> str:
    """Of a tensor; a state dict may hold something else, too."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def latency_ms(models: Mapping[str, tuple[nn.Module, tuple[Any, ...]]], rounds: int = 60) -> dict[str, float]:
    """Median time of one call of each model on its example, on this machine, in milliseconds.

    The models take turns, so that what else the machine does hits all of them alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 5):
            for name, (model, example) in models.items():
                model.eval()
                start = time.perf_counter()
                model(*example)
                if turn >= 5:  # the first calls allocate
                    taken[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in taken.items()}
