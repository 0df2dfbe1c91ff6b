"""Stillness: what would move a frozen teacher, and how it is told."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def set_training(model: nn.Module, training: bool) -> None:
    """Sets the mode of a model; programs of ``torch.export`` stay in the one in which they were exported."""
    try:
        model.train(training)
    except NotImplementedError:
        if training:
            raise
        for part in model.modules():
            part.training = False


def remember_modes(parts: Iterable[nn.Module]) -> Callable[[], None]:
    """Returns a function that puts training modes back as they are now."""
    # What torch.jit.freeze made has none.
    modes = [(part, part.training) for part in parts if hasattr(part, "training")]

    def restore() -> None:
        for part, training in modes:
            part.training = training

    return restore


def refuse_restless(model: nn.Module) -> None:
    """Refuses a model that is in training mode, wholly or in part, after a call before which it was told not to be."""
    restless = [
        repr(name) if name else "itself"
        for name, part in model.named_modules()
        if part.training and not isinstance(part, torch.fx.GraphModule)  # whose mode decides nothing
    ]
    if restless:
        more = f" and {len(restless) - 4} more" if len(restless) > 4 else ""
        raise ValueError(
            f"the frozen teacher ({type(model).__name__}) does not stand still: its forward() or train() turns the "
            f"training mode of {', '.join(restless[:4])}{more} on, with its dropout and new BatchNorm statistics. Take "
            "that out of it, or say teachers.Frozen(model, mode='train') if it is meant."
        )


class Shared:
    """What a teacher and a student both have: modules, whose mode is the student's, and what does not learn.

    Args:
        model: The teacher's model.
        student: The student.
        mode: The teacher's mode.

    Raises:
        ValueError: If something of it would move the teacher.
    """

    def __init__(self, model: nn.Module, student: nn.Module, mode: Literal["eval", "train"]) -> None:
        ours = {id(part) for part in model.modules()}
        self.modules = [part for part in student.modules() if id(part) in ours]
        weights, buffers = set(map(_place, model.parameters())), set(map(_place, model.buffers()))
        self.parameters = [p for p in student.parameters() if _place(p) in weights]
        self._holders = {
            name: part
            for name, part in student.named_modules()
            if any(_place(buffer) in buffers for buffer in part.buffers(recurse=False))
        }
        self._names = f"The frozen teacher ({type(model).__name__})", f"the student ({type(student).__name__})"
        if mode == "train" and self._holders:
            raise ValueError(
                f"{self._names[0]} shares buffers with {self._names[1]}, and with mode='train' it changes them. Pass "
                "copy.deepcopy(model)."
            )
        self._refuse_learning()

    def check(self) -> None:
        """Refuses what learns by now, or changes its statistics in training mode; reads no numbers."""
        self._refuse_learning()
        moving = [name or "itself" for name, part in self._holders.items() if part.training]
        if moving:
            raise ValueError(
                f"{self._names[0]} shares buffers with {self._names[1]}, in {', '.join(map(repr, moving[:4]))}, which "
                "is in training mode there, so it would change with them. Call eval() on what both have when a "
                "training epoch starts, or pass copy.deepcopy(model)."
            )

    def _refuse_learning(self) -> None:
        learning = [p for p in self.parameters if p.requires_grad]
        if learning:
            raise ValueError(
                f"{self._names[0]} shares {len(learning)} parameters with {self._names[1]} that learn, so it would "
                "change with them. Pass copy.deepcopy(model), or freeze what both have before the fit: "
                "requires_grad_(False)."
            )


def refuse_taught(teacher: nn.Module, part: nn.Module) -> None:
    """Refuses what learns with the student and has weights of the teacher, which would learn with it."""
    theirs = {_place(p): name for name, p in teacher.named_parameters()}
    taught = [theirs[_place(p)] for p in part.parameters() if p.requires_grad and _place(p) in theirs]
    if taught:
        more = f" and {len(taught) - 4} more" if len(taught) > 4 else ""
        raise ValueError(
            "it has weights of the teacher that would learn with the student: "
            f"{', '.join(name.removeprefix('model.') for name in taught[:4])}{more}. To send the student's feature "
            "through layers of the teacher as they are, take projector=projectors.TeacherLayers([...]); to begin from "
            "them, a copy.deepcopy of each."
        )


def _place(t: Tensor) -> object:
    """Returns where a tensor is in memory; itself while it is nowhere."""
    there = not is_lazy(t) and t.device.type != "meta" and t.numel() and t.data_ptr()
    return (t.device, t.data_ptr()) if there else id(t)
