"""Layers of a frozen teacher as a projector: the student's feature on the teacher's way to its answer."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lightning_kd.sharding import is_sharded
from lightning_kd.teachers.stillness import remember_modes, set_training
from lightning_kd.wiring import Path, find_module


class TeacherLayers(nn.Module):
    """The student's feature through the teacher's remaining layers, up to what the teacher says itself (CrossKD).

    With the teacher's layers ``g`` behind the tapped one, the term compares::

        loss(g(before(student's feature)), g(teacher's feature))

    so the term's ``student`` is where the student's feature is taken, and its ``teacher`` the last of ``layers``. The
    gradient goes through ``g`` to the student; ``g`` itself stands still, in evaluation mode, and is no part of this
    module: no checkpoint and no optimizer knows it. As for any tap, layers that a head calls once for each level of a
    pyramid are paired call by call.

    The authors' code gives each channel of the student's feature, before its activation, the teacher's mean and
    deviation. Here ``before=nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())`` comes closest: it learns both.

    Args:
        layers: Paths in the teacher, in the order in which they are called. A slice takes some of a ``Sequential`` or
            a ``ModuleList``: ``"bbox_head.cls_convs[3:]"``.
        before: What is done to the student's feature first: ``nn.Conv2d(C, C', 1)`` where the teacher's layers take
            another number of channels.

    Raises:
        ValueError: If there is no such layer, the teacher is no frozen model, or the feature does not fit its layers.

    Source:
        Wang et al., CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection, arXiv 2306.11369.

    Example:
        >>> import torch
        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        >>> projector = TeacherLayers(["1", "2"], before=nn.Conv2d(4, 8, 1))
        >>> projector.meet(teacher)
        >>> projector(torch.zeros(1, 4, 6, 6)).shape, len(projector.state_dict())
        (torch.Size([1, 5, 6, 6]), 2)
    """

    def __init__(self, layers: Sequence[str], before: nn.Module | None = None) -> None:
        super().__init__()
        given: object = layers
        if isinstance(given, str) or not layers:
            raise ValueError(
                f"layers are a list of paths in the teacher, ['head.conv.3', 'head.logits']; got {given!r}."
            )
        self.paths = [Path(layer) for layer in layers]
        self.before = before
        self._layers: list[nn.Module] = []  # in a list, so that they are no submodules
        self._overwrites = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": []}

    def meet(self, teacher: nn.Module | None) -> None:
        """Finds the layers; called before the fit, with the frozen model that teaches."""
        if teacher is None or is_sharded(teacher):
            what = "a sharded model" if teacher is not None else "no frozen model"
            raise ValueError(
                f"TeacherLayers calls layers of a model that stands still and is whole, and the teacher is {what}. "
                "Take one trained model as the teacher, or a projector of your own."
            )
        self._layers = [layer for path in self.paths for layer in _found(teacher, path)]
        self._overwrites = any(_may_overwrite(part) for layer in self._layers for part in layer.modules())

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the teacher's layers make of the student's feature."""
        if not self._layers:
            raise RuntimeError("TeacherLayers has met no teacher: use it in a Term, or call meet(teacher) first.")
        if self.before is not None:
            x = self.before(x)
        self._check_channels(x)
        if self._overwrites:
            x = x.clone()  # what the student computed stays what it is
        restore = remember_modes(part for layer in self._layers for part in layer.modules())
        try:
            return self._through(x)
        finally:
            restore()  # a layer that the student has, too, is in the student's mode there

    def _through(self, x: Tensor) -> Tensor:
        feature = x
        for layer in self._layers:
            set_training(layer, False)  # as the teacher is, whatever is called around it
            own = {name: value.detach() for name, value in layer.named_parameters()}
            # BatchNorm may have float32 between layers of half precision, which it takes; they do not take float32.
            dtype = min((value.dtype for value in own.values()), key=lambda each: each.itemsize, default=x.dtype)
            try:
                x = functional_call(layer, own, (x.to(dtype),))
            except Exception as error:
                error.add_note(
                    f"The student's feature {tuple(feature.shape)} went through the teacher's layers "
                    f"{[path.text for path in self.paths]}, each called with what the one before returned. Name every "
                    "layer on that way; where the first takes other channels, give TeacherLayers(..., before=...)."
                )
                raise
        return x

    def _check_channels(self, x: Tensor) -> None:
        """Refuses what the first of the layers does not take, where it is one that says so."""
        first = self._layers[0]
        while isinstance(first, nn.Sequential) and len(first):
            first = first[0]
        if next(first.children(), None) is not None:
            return  # what it does before it calls a layer of its own, it alone knows: a pool, say
        for name, dim in (("in_channels", 1), ("in_features", -1)):
            wanted = getattr(first, name, None)
            if isinstance(wanted, int) and x.shape[dim] != wanted:
                raise ValueError(
                    f"the student's feature {tuple(x.shape)} does not fit the teacher's layer "
                    f"{self.paths[0].text!r}, which takes {wanted} channels: give "
                    f"TeacherLayers(..., before=nn.Conv2d({x.shape[dim]}, {wanted}, 1)), or tap another layer."
                )


def _may_overwrite(part: nn.Module) -> bool:
    """Tells whether a layer may work in place; torch's own say so, and of others nobody knows what they do."""
    return bool(getattr(part, "inplace", False)) or not type(part).__module__.startswith("torch.nn.")


def _found(teacher: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Yields the layer of a path, or those that its slice takes."""
    found: Any = find_module(teacher, path.module, "the teacher")
    for selector in path.selectors:
        if not isinstance(selector, slice) or not isinstance(found, (nn.Sequential, nn.ModuleList)):
            raise ValueError(
                f"{path.text!r} names no layers: a slice takes some of a Sequential or a ModuleList, and the teacher's "
                f"{path.module!r} is a {type(found).__name__}. Everything else is a name of named_modules()."
            )
        found = found[selector]
    yield from found if path.selectors else [found]
