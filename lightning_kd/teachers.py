"""Teachers: where the other side's knowledge comes from."""

import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from lightning_kd.taps import Record, Taps


class Teacher(nn.Module):
    """What a distiller asks of a teacher: to be bound to paths, and to answer a call of the student.

    A teacher is called with exactly the arguments that the student was called with, and returns for each
    path it was bound to what was captured there. It is never a submodule of what is trained, so that it
    reaches no checkpoint, no optimizer and no gradient synchronisation.
    """

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares to answer for the given module paths.

        Args:
            student: The student, for teachers that are made from it.
            paths: Module paths in the teacher; ``"output"`` is what it returns.

        Raises:
            ValueError: If a path is unknown.
        """
        raise NotImplementedError

    def unbind(self) -> None:
        """Removes everything that ``bind`` left in the teacher's model."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Returns the captured outputs by path."""
        raise NotImplementedError


class Frozen(Teacher):
    """A trained model that stands still: eval mode and no gradient on every call, whatever is called around it.

    Args:
        model: The trained model, a plain module or a LightningModule.
        checkpoint: File with the model's weights: a state dict or a Lightning checkpoint, of the model itself
            or of a module that holds it (a common prefix of the keys, ``module.`` say, is taken off). It is
            loaded with ``weights_only=True``.
        mode: ``"train"`` lets the model use and update its BatchNorm statistics of the batch and its dropout,
            an explicit choice of some recipes; ``"eval"`` is the rule.

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
        if checkpoint is not None:
            load_weights(model, checkpoint)
        self._taps: Taps | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # What stands still needs no copy: weight averaging deep-copies all that it finds around a student.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None}

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
        self.unbind()
        # Layers behind the deepest tap may change in training mode, too: their statistics, and the random numbers.
        self._taps = Taps(self.model, paths, "the teacher", stop_early=self.mode == "eval")
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
        args, kwargs = self.to_own_type(args, kwargs)
        with torch.no_grad():
            return self._taps.run(*args, **kwargs)

    def to_own_type(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with their floating-point tensors in the type of the model's weights."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

        def convert(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype else x

        if dtype is not None:
            args, kwargs = tree_map(convert, (args, kwargs))
        return args, kwargs


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Loads a checkpoint's weights into a model, strictly, whatever common prefix its keys have.

    Args:
        model: The model to fill.
        checkpoint: A file with a state dict, or a Lightning checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no state dict, or if keys or shapes do not fit the model.
    """
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(
            f"No checkpoint at {os.fspath(checkpoint)!r} (looked from {os.getcwd()!r}). Train the model first, or "
            "give the path of its weights."
        )
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{os.fspath(checkpoint)!r} could not be read as a checkpoint of plain tensors (weights_only=True): {error}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{os.fspath(checkpoint)!r} holds no state dict.")
    wanted = model.state_dict()
    first = next(iter(wanted), "")
    prefixes = sorted({key.removesuffix(first) for key in state if key == first or key.endswith("." + first)})
    # Strictly: within a prefix nothing may be missing or too much; beside it the file may hold what it likes.
    found = {
        prefix: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in prefixes
    }
    fitting = [prefix for prefix, own in found.items() if not _misfits(wanted, own)]
    if len(fitting) > 1:
        raise ValueError(
            f"{os.fspath(checkpoint)!r} holds more than one set of weights for {type(model).__name__}, under "
            f"{', '.join(map(repr, fitting))}. Save the one that is meant: torch.save(model.state_dict(), path)."
        )
    if not fitting:
        closest = min(found.values(), key=lambda own: len(_misfits(wanted, own)), default=dict(state))
        misfits = _misfits(wanted, closest)
        raise ValueError(
            f"{os.fspath(checkpoint)!r} does not fit {type(model).__name__}: {'; '.join(misfits[:5])}"
            f"{f'; and {len(misfits) - 5} more' if len(misfits) > 5 else ''}. Its keys are "
            f"{', '.join(list(state)[:5])}, .... Is it the checkpoint of another architecture?"
        )
    model.load_state_dict(found[fitting[0]], strict=True)


def _misfits(wanted: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> list[str]:
    """Says what keeps the tensors of a file from being a model's."""
    # Files from before torch 0.4.1 do not count batches, and torch loads them all the same.
    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
    missing = [f"it lacks {key}" for key in needed if key not in have]
    shapes = [
        f"{key} is {tuple(have[key].shape)} and not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in have and have[key].shape != value.shape
    ]
    return missing + shapes + [f"it has {key}, which the model has not" for key in have if key not in wanted]


def _places(model: nn.Module) -> set[object]:
    """Returns where a model's parameters are in memory; the parameters themselves while they are nowhere."""
    return {
        (p.device, p.data_ptr()) if not is_lazy(p) and p.device.type != "meta" and p.numel() and p.data_ptr() else id(p)
        for p in model.parameters()
    }
