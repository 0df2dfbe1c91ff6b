"""Frozen: a trained model that stands still."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_kd.copying import unshare
from lightning_kd.sharding import is_sharded
from lightning_kd.taps import Record, Taps
from lightning_kd.teachers.base import Teacher, in_type_of, made_by, own_type
from lightning_kd.teachers.precision import Precision, checked, context, convert, type_of_weights
from lightning_kd.teachers.stillness import Shared, refuse_restless, remember_modes, set_training
from lightning_kd.teachers.weights import load_weights
from lightning_kd.wiring import describe


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
        precision: What the model runs in, whatever the Trainer's precision, in Lightning's words: ``"bf16-mixed"``
            (or ``"bf16"``) is autocast, ``"bf16-true"`` converts the model's weights, in place, when a fit begins: half
            the memory. BatchNorm stays as it is. Unless given: the type of its weights, under the Trainer's autocast.
        channels_last: Whether its weights and images have their channels last in memory, in which convolutions in half
            precision are faster on a GPU. The weights are so in place.
        compile: Whether it is compiled during a fit; a dict is what ``torch.compile`` gets, ``{"mode":
            "max-autotune"}`` say.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If the model is no network, the checkpoint no file, or compile neither a bool nor a dict.
        ValueError: If the checkpoint's keys do not fit the model, or there is no such mode or precision.

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
        precision: Precision | None = None,
        channels_last: bool = False,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        super().__init__()
        given: object = model  # what a caller without a type checker may pass
        hint = f" Did you mean {given.__name__}(...)?" if isinstance(given, type) else ""
        if isinstance(given, Teacher):
            hint = " That is a teacher already: give it as it is, without Frozen."
        if hint or not isinstance(given, nn.Module):
            raise TypeError(f"Frozen holds a trained network, got {describe(given)}.{hint}")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode is 'eval' or 'train', got {mode!r}.")
        if isinstance(model, LightningModule) and type(model).forward is LightningModule.forward:
            parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
            raise ValueError(
                f"The teacher {type(model).__name__} has no forward() to call. Pass the network inside of it, one of "
                f"{', '.join(f'teacher.{name}' for name in parts) or 'its submodules'}."
            )
        options: object = compile
        if not isinstance(options, (bool, Mapping)):
            raise TypeError(
                "compile is True, False or a dict of what torch.compile takes, {'mode': 'max-autotune'} say; got "
                f"{options!r}."
            )
        self.model = model
        self.mode = mode
        self.input = input
        self.precision = checked(precision)
        self.channels_last = channels_last
        self.compile_options = {} if compile is True else compile
        if checkpoint is not None:
            load_weights(model, checkpoint)
        self._taps: Taps | None = None
        self._compiled = False
        self._prepared = False
        self._shared: Shared | None = None
        self._restore: Callable[[], None] | None = None
        self._called = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # What stands still needs no copy: weight averaging deep-copies all that it finds around a student.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None, "_compiled": False, "_shared": None, "_restore": None}

    @property
    def still(self) -> nn.Module:
        """The model."""
        return self.model

    def root(self, student: nn.Module) -> nn.Module:
        """Returns the model."""
        return self.model

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares to answer for the given module paths; see ``Teacher.bind``.

        Raises:
            ValueError: If a path is unknown, if the teacher shares with the student what learns, so that it would
                not stand still, or if its weights are to change, and are sharded or shared.
        """
        self._shared = Shared(self.model, student, self.mode)
        self._called = False
        if self.mode == "train":
            unshare(self.model)
        self.unbind()
        shared = set(self._shared.modules)
        self._restore = remember_modes(part for part in self.model.modules() if part not in shared)
        self._prepare()
        if self.compile_options is not False and self.model._compiled_call_impl is None:
            self.model.compile(**self.compile_options)  # before the hooks, with which it is compiled then
            self._compiled = True
        # Layers behind the deepest tap may change in training mode, too: their statistics, and the random numbers.
        # A sharded model has to return, or its layers would not be sharded again.
        whole = is_sharded(self.model) or bool((self.compile_options or {}).get("fullgraph"))  # which nothing may leave
        stop_early = self.mode == "eval" and not whole
        self._taps = Taps(self.model, paths, "the teacher", stop_early=stop_early)
        self._taps.attach()

    def _prepare(self) -> None:
        """Brings the weights into the type and the order that were asked for."""
        dtype = type_of_weights(self.precision)
        if is_sharded(self.model) and (dtype or self.channels_last):
            raise ValueError(
                f"The frozen teacher ({type(self.model).__name__}) is sharded (fully_shard), and a '-true' precision "
                "and channels_last change its weights. Give fully_shard an mp_policy, or take a '-mixed' precision."
            )
        if dtype and self._shared is not None and self._shared.parameters:
            raise ValueError(
                f"The frozen teacher ({type(self.model).__name__}) shares weights with the student, and a '-true' "
                "precision changes them. Take a '-mixed' precision, or pass copy.deepcopy(model)."
            )
        if dtype:
            convert(self.model, dtype)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self._prepared = True

    def unbind(self) -> None:
        """Removes the hooks from the model, and puts its training modes back."""
        if self._taps is not None:
            self._taps.detach()
            self._taps = None
        if self._compiled:
            self.model._compiled_call_impl = None
            self._compiled = False
        if self._restore is not None:
            self._restore()
            self._restore = None

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Runs the model without gradient, in the floating-point type of its own weights."""
        if self._taps is None or self._shared is None:
            raise RuntimeError(
                "The teacher is not bound: call bind(student, paths) first. If another Distiller had the same teacher, "
                "it has ended that: give each a Frozen of its own, of one model."
            )
        if self._called:  # the first call may be a rehearsal, before a user's hooks say what is in which mode
            self._shared.check()
        restore = remember_modes(self._shared.modules)  # a dropout or an augmentation that the student has, too
        set_training(self.model, self.mode == "train")
        try:
            with torch.no_grad(), self.context():
                args, kwargs = self.arguments(args, kwargs)
                record = self._taps.run(*args, **kwargs)
            if not self._called and self.mode == "eval":
                refuse_restless(self.model)
            self._called = True
            return record
        finally:
            restore()

    def context(self) -> AbstractContextManager[object]:
        """Returns the context in which the model is called: its precision."""
        if not self._prepared:  # tests come without a fit, and bind nothing
            self._prepare()
        return self._running()

    @contextmanager
    def _running(self) -> Iterator[None]:
        with context(self.precision, self.model), own_type(self.model, type_of_weights(self.precision)):
            yield

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what the model is called with where the teacher is called with ``args`` and ``kwargs``."""
        if not self._prepared:
            self._prepare()
        args, kwargs = made_by(self.input, args, kwargs)
        args, kwargs = in_type_of(self.model, args, kwargs, type_of_weights(self.precision))
        if self.channels_last:
            args, kwargs = tree_map(_channels_last, (args, kwargs))
        return args, kwargs


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x
