"""Frozen: a trained model that stands still."""

import os
from collections.abc import Callable, Collection
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_kd.copying import unshare
from lightning_kd.sharding import is_sharded
from lightning_kd.taps import Record, Taps
from lightning_kd.teachers.base import Teacher, in_type_of, made_by
from lightning_kd.teachers.weights import load_weights


class Frozen(Teacher):
    """A trained model that stands still: eval mode and no gradient on every call, whatever is called around it.

    Args:
        model: The trained model, a plain module or a LightningModule.
        checkpoint: File with the model's weights: a state dict or a Lightning checkpoint, of the model itself
            or of a module that holds it (a common prefix of the keys, ``module.`` say, is taken off). It is
            loaded with ``weights_only=True``.
        mode: ``"train"`` lets the model use and update its BatchNorm statistics of the batch and its dropout,
            an explicit choice of some recipes; ``"eval"`` is the rule.
        input: Makes the model's arguments out of those that the teacher is called with, ``Renormalize(...)`` say: it
            returns a tensor, a tuple of positional arguments or a dict of keyword arguments. Paths stay the model's.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint's keys do not fit the model.

    Example:
        >>> import torch
        >>> teacher = Frozen(torch.nn.Linear(4, 3))
        >>> teacher.bind(torch.nn.Linear(4, 3), ["output"])
        >>> teacher(torch.zeros(2, 4))["output"][0].requires_grad
        False
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        input: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("eval", "train"):
            raise ValueError(f"mode is 'eval' or 'train', got {mode!r}.")
        if isinstance(model, LightningModule) and type(model).forward is LightningModule.forward:
            parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
            raise ValueError(
                f"The teacher {type(model).__name__} has no forward() to call. Pass the network inside of it, one of "
                f"{', '.join(f'teacher.{name}' for name in parts) or 'its submodules'}."
            )
        self.model = model
        self.mode = mode
        self.input = input
        if checkpoint is not None:
            load_weights(model, checkpoint)
        self._taps: Taps | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # What stands still needs no copy: weight averaging deep-copies all that it finds around a student.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None}

    def root(self, student: nn.Module) -> nn.Module:
        """Returns the model."""
        return self.model

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares to answer for the given module paths; see ``Teacher.bind``.

        Raises:
            ValueError: If a path is unknown, or if the teacher shares parameters with the student: it would
                not stand still.
        """
        shared = _places(self.model) & _places(student)
        if shared:
            raise ValueError(
                f"The frozen teacher ({type(self.model).__name__}) shares {len(shared)} parameters with the student "
                f"({type(student).__name__}), so it would change as the student learns. Pass copy.deepcopy(model)."
            )
        if self.mode == "train":
            unshare(self.model)
        self.unbind()
        # Layers behind the deepest tap may change in training mode, too: their statistics, and the random numbers.
        # A sharded model has to return, or its layers would not be sharded again.
        stop_early = self.mode == "eval" and not is_sharded(self.model)
        self._taps = Taps(self.model, paths, "the teacher", stop_early=stop_early)
        self._taps.attach()

    def unbind(self) -> None:
        """Removes the hooks from the model."""
        if self._taps is not None:
            self._taps.detach()
            self._taps = None

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Runs the model without gradient, in the floating-point type of its own weights."""
        if self._taps is None:
            raise RuntimeError("The teacher is not bound: call bind(student, paths) first.")
        self.model.train(self.mode == "train")
        with torch.no_grad():
            args, kwargs = self.arguments(args, kwargs)
            return self._taps.run(*args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what the model is called with where the teacher is called with ``args`` and ``kwargs``."""
        return in_type_of(self.model, *(made_by(self.input, args, kwargs) if self.input else (args, kwargs)))


def _places(model: nn.Module) -> set[object]:
    """Returns where a model's parameters are in memory; the parameters themselves while they are nowhere."""
    return {
        (p.device, p.data_ptr()) if not is_lazy(p) and p.device.type != "meta" and p.numel() and p.data_ptr() else id(p)
        for p in model.parameters()
    }
