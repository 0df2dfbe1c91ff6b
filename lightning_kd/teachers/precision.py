"""The precision that a trained model runs in, whatever the student's is."""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Precision = Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "bf16", "16"]

_TYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def checked(precision: Precision | None) -> Precision | None:
    """Returns a precision that there is.

    Raises:
        ValueError: If there is no such precision.
    """
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(
            f"A teacher's precision is one of {', '.join(map(repr, get_args(Precision)))}, or None for that of its "
            f"weights and of the Trainer's autocast; got {precision!r}."
        )
    return precision


def type_of_weights(precision: Precision | None) -> torch.dtype | None:
    """Returns the type that weights and inputs have in a ``"-true"`` precision; None in others."""
    return _TYPES[precision.removesuffix("-true")] if precision and precision.endswith("-true") else None


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model's floating-point tensors a type, in place; BatchNorm keeps its own, whose small steps count."""
    for part in model.modules():
        if isinstance(part, _BatchNorm) and dtype != torch.float32:
            continue
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)


def context(precision: Precision | None, model: nn.Module) -> AbstractContextManager[object]:
    """Returns the context in which a model runs; a precision that is given does not care for the Trainer's autocast."""
    if precision is None:
        return nullcontext()
    device_type = next((tensor.device.type for tensor in chain(model.parameters(), model.buffers())), "cpu")
    if type_of_weights(precision) is not None:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=_TYPES[precision.removesuffix("-mixed")])
