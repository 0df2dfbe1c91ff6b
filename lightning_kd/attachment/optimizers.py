"""Brings parameters into optimizers that somebody else made."""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer

from lightning_kd.attachment.guest import GUEST


def optimizers_of(result: Any) -> Iterator[Optimizable]:
    """Finds the optimizers in whatever ``configure_optimizers`` returned: what has an optimizer's methods is one."""
    if isinstance(result, Optimizable):
        yield result
    elif isinstance(result, Mapping):
        yield from optimizers_of(result.get("optimizer"))
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from optimizers_of(item)


def adopt_groups(optimizers: list[Optimizable], others: list[Optimizable]) -> None:
    """Adds the parameters of other optimizers to groups that correspond, or all to the first where none do."""
    ours = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    have = {id(p) for _, group in ours for p in group["params"]}
    groups = [group["params"] for optimizer in others for group in optimizer.param_groups]
    theirs = [[p for p in params if id(p) not in have] for params in groups]
    if len(ours) != len(theirs):
        settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for _, group in ours]
        if any(setting != settings[0] for setting in settings):
            raise ValueError(
                f"configure_optimizers makes {len(ours)} groups with different settings for the student and "
                f"{len(theirs)} for a peer, so that they do not correspond. Make as many for every network."
            )
        adopt(optimizers, [p for params in theirs for p in params])
        return
    for (optimizer, group), params in zip(ours, theirs, strict=True):
        _extend(optimizer, group, params)


def adopt(optimizers: list[Optimizable], parameters: list[nn.Parameter]) -> None:
    """Adds to the first optimizer, in its first group that is not empty, the parameters that no optimizer has.

    A group of their own would not do: schedulers that exist by now have counted the groups.
    """
    have = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in parameters if id(p) not in have]
    optimizer = optimizers[0]
    group = next((g for g in optimizer.param_groups if g["params"]), optimizer.param_groups[0])
    _extend(optimizer, group, missing)


def _extend(optimizer: Optimizable, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    if type(optimizer).__name__ == "Muon" and (odd := [tuple(p.shape) for p in parameters if p.ndim != 2]):
        raise ValueError(
            f"Muon optimizes matrices only, and a term or peer learns parameters of the shapes {odd}. Take another "
            "optimizer, or give the term a projector= that learns nothing."
        )
    if parameters and any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer shares its parameters out among the processes when it is made, and what a term or "
            "peer learns would be nobody's. Take the plain optimizer, or ModelParallelStrategy (FSDP2), which shares "
            "out what optimizers remember, too."
        )
    sample = group["params"][0] if group["params"] else None
    if "param_names" in group:
        group["param_names"].extend(f"{GUEST}.{len(group['params']) + i}" for i in range(len(parameters)))
    group["params"].extend(parameters)
    # Adagrad, for one, makes its state at construction, a constant.
    if sample is not None and sample in optimizer.state:
        for parameter in parameters:
            optimizer.state[parameter] = {
                key: torch.full_like(parameter, value.flatten()[0].item())
                if isinstance(value, torch.Tensor) and value.shape == sample.shape
                else copy.deepcopy(value)
                for key, value in optimizer.state[sample].items()
            }


def keep_names(strategy: Strategy, pl_module: LightningModule, name: str, guest: nn.Module) -> None:
    """Lets a strategy save optimizers when a guest has left the module, in which it looks for the parameters' names."""
    optimizer_state = strategy.optimizer_state

    @functools.wraps(optimizer_state)
    def with_guest(optimizer: Optimizer) -> Any:
        pl_module.add_module(name, guest)
        try:
            return optimizer_state(optimizer)
        finally:
            delattr(pl_module, name)

    strategy.optimizer_state = with_guest  # type: ignore[method-assign]


def forget_names(strategy: Strategy) -> None:
    """Takes that back, since a guest comes again."""
    vars(strategy).pop("optimizer_state", None)
