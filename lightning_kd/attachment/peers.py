"""Peers: where each runs, what its steps and hooks are called with, and what of the module is its own."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_kd.attachment.batches import Came, with_batch
from lightning_kd.distiller import Distiller
from lightning_kd.watching import Arguments

_LOOP = ("on_{}_start", "on_{}_epoch_start", "on_{}_batch_start", "on_{}_batch_end", "on_{}_epoch_end", "on_{}_end")
_TRAIN, _VALIDATE, _TEST = ([hook.format(loop) for hook in _LOOP] for loop in ("train", "validation", "test"))
_VALIDATE, _TEST = [*_VALIDATE, "validation_step"], [*_TEST, "test_step"]
_OPTIMIZE = ["on_before_zero_grad", "on_after_backward", "on_before_optimizer_step"]
HOOKS = {
    "fit": ["on_fit_start", *_TRAIN, *_OPTIMIZE, *_VALIDATE, "on_fit_end"],
    "validate": _VALIDATE,
    "test": _TEST,
}
"""What is called of the peers' modules, too, right after the student's; what a batch or the trainer's loop needs once
(the batch's transfer, the optimizer's step, the schedulers') is the student's alone."""

ENDS = {
    "training_step": "on_train_batch_end",
    "validation_step": "on_validation_batch_end",
    "test_step": "on_test_batch_end",
}
"""The hook that gets what a step had and returned."""


@dataclass
class Peer:
    """One of the networks that learn: where it runs, and what it learns from the others."""

    name: str
    module: LightningModule
    network: nn.Module
    distiller: Distiller
    strangers: bool = False
    """Whether its module's ``configure_optimizers`` has returned parameters that are not the module's."""
    begun: Any = None
    """The batch that its hook has had, and that its step is to have."""
    ended: Any = None
    """What its step returned, and the batch that it had: of the hook that gets both, if it has one."""

    def end(self, step: str, output: Any, batch: Any) -> None:
        """Remembers that a step is over."""
        self.ended = (output, batch) if is_overridden(ENDS[step], self.module) else None


ArgumentsOf = Callable[[Peer], Arguments]
"""Gives a peer the arguments of its own step or hook."""


def arguments_of_all(peers: list[Peer], hook: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentsOf:
    """Returns what gives a peer the arguments of its own step or hook, when the student's is over.

    Its batch is the one that its own hook has had before, or as it came, or of a step that is over its own.
    """
    begun: dict[str, Any] = {}
    for peer in peers if hook in ENDS or hook.endswith("batch_start") else []:
        begun[peer.name] = peer.begun if hook in ENDS else None
        peer.begun = None
    came = Came((args, kwargs)) if any(batch is None for batch in begun.values()) else None

    def arguments_of(peer: Peer) -> Arguments:
        if begun.get(peer.name) is not None:
            return with_batch(begun[peer.name], args, kwargs)
        if came is not None:
            found: Arguments = came.again(hook)
            return found
        if hook in ENDS.values() and peer.ended is not None:
            ended, peer.ended = peer.ended, None
            return (*ended, *args[2:]), kwargs
        return args, kwargs

    return arguments_of


def tied_parts(pl_module: LightningModule, student: nn.Module, name: str, peer: nn.Module) -> dict[int, Any]:
    """Returns the peer's parts for those of the student that the module has elsewhere, too: tied weights, aliases.

    Raises:
        ValueError: If the peer has none of that name.
    """

    def parts_of(network: nn.Module) -> dict[str, Any]:
        named = (network.named_modules, network.named_parameters, network.named_buffers)
        return {path: part for each in named for path, part in each(remove_duplicate=False) if path}

    parts, found = parts_of(peer), {}
    names: dict[int, list[str]] = {}
    for path, part in parts_of(student).items():
        names.setdefault(id(part), []).append(path)
    inside = {id(part) for part in student.modules()}
    for path, owner in pl_module.named_modules():
        held = {**owner._modules, **owner._parameters, **owner._buffers} if id(owner) not in inside else {}
        for key, part in held.items():
            known = names.get(id(part), [])
            learns = not isinstance(part, nn.Module) or any(True for _ in part.parameters())
            if not known or not learns:
                continue
            if not any(name in parts for name in known):
                raise ValueError(
                    f"{'.'.join(filter(None, (path, key)))} of {type(pl_module).__name__} is {known[0]!r} of "
                    f"the student, and {name}, a {type(peer).__name__}, has none: in its copy of the module the "
                    "student's would be there. Give a peer that has it, or let the module find it in the student."
                )
            found[id(part)] = next(parts[name] for name in known if name in parts)
    return found


def log_as(peer: Peer) -> None:
    """Puts the peer's name in front of what its module logs."""
    log = peer.module.log

    @functools.wraps(log)
    def log_with_name(name: str, *args: Any, **kwargs: Any) -> None:
        log(f"{peer.name}/{name}", *args, **kwargs)

    peer.module.log = log_with_name  # type: ignore[method-assign]
