"""What a network is given: of each input shape and type, as a checkpoint keeps them, and examples of that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = list[tuple[list[int], str]]
"""Of each input, its shape without the batch, and the name of its type; ``list[...]`` of images that detectors take."""


def dtype_name(name: str) -> str:
    """The name of a type of tensors, or of a list of them, as it came.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(getattr(torch, _of_items(name)), torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return name


def _of_items(name: str) -> str:
    return name.removeprefix("list[").removesuffix("]")


def inputs_of(network: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Inputs:
    """What a network was given: tensors or lists of them, in the order of its forward; empty, if it was something else.

    The targets that detectors take in training, a list of dicts, are no inputs, nor is what is as it is by default.

    Example:
        >>> inputs_of(nn.ReLU(), (torch.zeros(8, 3, 32, 32),), {})
        [([3, 32, 32], 'float32')]
        >>> inputs_of(nn.ReLU(), (), {"input": torch.zeros(8, 3)})
        [([3], 'float32')]
        >>> inputs_of(nn.ReLU(), ([torch.zeros(3, 60, 80), torch.zeros(3, 64, 64)], [{}, {}]), {})
        [([3, 60, 80], 'list[float32]')]
    """
    if named:
        signature = inspect.signature(network.forward)
        default = {name: each.default for name, each in signature.parameters.items()}
        bound = signature.bind(*arguments, **{k: v for k, v in named.items() if v is not default.get(k)})
        arguments = bound.args
        if bound.kwargs:
            return []
    found: Inputs = []
    for given in arguments:
        several = list(given) if isinstance(given, list | tuple) else []
        if isinstance(given, Tensor):
            found.append((list(given.shape[1:]), _name(given)))
        elif several and all(isinstance(each, Tensor) for each in several):
            found.append((list(several[0].shape), f"list[{_name(several[0])}]"))
        elif not (several and found and all(isinstance(each, dict) for each in several)):
            return []
    return found


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def random_inputs(inputs: Inputs, batch: int, model: nn.Module) -> tuple[Any, ...]:
    """Tensors of those shapes and types, the same in every call; images in a list are in [0, 1].

    Floating-point ones are of the type of the model's weights, whatever the precision in which it was trained.
    """
    generator = torch.Generator().manual_seed(0)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    made: list[Any] = []
    for shape, name in inputs:
        dtype: torch.dtype = getattr(torch, _of_items(name))
        if dtype.is_floating_point and floating is not None:
            dtype = floating
        if name.startswith("list["):
            made.append(list(torch.rand(batch, *shape, generator=generator).to(dtype)))
            continue
        noise = torch.randn(batch, *shape, generator=generator)
        if dtype == torch.bool:  # of a mask neither all nor nothing
            made.append(noise > (noise.mean(-1, keepdim=True) if shape else 0))
            continue
        made.append(noise.to(dtype) if dtype.is_floating_point else noise.abs().to(dtype))
    return tuple(made)
