"""A term: where a loss is applied, and how much it weighs."""

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_kd.counts import COUNTS
from lightning_kd.losses import _check
from lightning_kd.projectors import Align, PerLevel, bridge, follow
from lightning_kd.schedules import Moment, Schedule
from lightning_kd.schedules.base import factor
from lightning_kd.sequences import Layout
from lightning_kd.teachers.stillness import remember_modes
from lightning_kd.wiring import OUTPUT, Levels, Path, describe, lazy_in

Selected = Tensor | Levels
"""What a path selects of one call of a module: a tensor, or a list of them."""


class Term(nn.Module):
    """One knowledge that is distilled: a loss, the two outputs that it compares, and its weight.

    Paths that end in a slice, ``"neck[:]"``, select levels: each level of the student is compared with the same of
    the teacher, through a projector of its own (and by a copy of the loss, where that learns), and the term is the
    sum over the levels.

    Args:
        loss: ``loss(student, teacher) -> scalar``, any module of :mod:`lightning_kd.losses` or your own. A third
            argument of its ``forward`` is taken from the batch by name: ``target`` for the labels, ``mask`` for what
            counts of a map, ``joints`` for which keypoints count.
        weight: Factor of the loss in the total, a schedule of it, or a function of the fraction of the run.
        student: Path of the output in the student: ``"output"`` is what its forward returns, ``"output.logits"``
            selects inside of it, anything else is a module path such as ``"layer3"``, or levels, ``"neck[:]"``.
        teacher: Path of the output in the teacher, likewise.
        projector: What brings the student's tensor (a list of them, where the path selects levels) to the shape
            that the loss needs. Where it is not given and the loss needs one, it is built from the shapes of a
            first batch; ``nn.Identity()`` forbids that.

    Raises:
        ValueError: If the weight is negative or not finite, a path is malformed, or the loss asks for an unknown
            alignment.
        TypeError: If the loss is not a module, or a path is no text.

    Example:
        >>> from lightning_kd import losses
        >>> Term(losses.FitNet(), weight=100.0, student="layer3", teacher="layer3").weight
        100.0
    """

    def __init__(
        self,
        loss: nn.Module,
        weight: float | Schedule | Callable[[float], float] = 1.0,
        student: str = OUTPUT,
        teacher: str = OUTPUT,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check.module(loss)
        bridge_given: object = projector  # what a caller without a type checker may pass
        if bridge_given is not None and not isinstance(bridge_given, nn.Module):
            raise TypeError(f"projector is a module that maps the student's tensor, or None; got {bridge_given!r}.")
        align: object = getattr(loss, "align", "none")
        if align not in get_args(Align):
            raise ValueError(
                f"align of {type(loss).__name__} says what the loss needs of its two tensors: "
                f"{', '.join(map(repr, get_args(Align)))}; got {align!r}."
            )
        self.loss = loss
        self.deeper = nn.ModuleList()
        """The loss once more for each level but the first, where it has parameters for the shapes of a level."""
        self.weight = factor("weight", weight)
        self.schedules: dict[str, Schedule] = {}
        """Of attributes of the loss, by their names."""
        self.student = Path(student)
        self.teacher = Path(teacher)
        self.projector = projector
        self.teacher_side: nn.Module = nn.Identity()
        plain = getattr(loss, "_orig_mod", loss)  # a compiled module's own signature says nothing
        parameters = list(inspect.signature(plain.forward).parameters.values())[2:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.labels = {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind not in variadic}
        self._built = self.projector is not None and not hasattr(loss, "build")
        self._bridged = False
        self.layouts = Layout(), Layout()
        """What is known of how the tensors of student and teacher are laid out, of the modules that are tapped."""
        self.unfreezes = False
        """Whether what the student's tensor is computed with is frozen, and learns later: then it may teach nothing."""
        self.at(Moment())

    def meet(self, teacher: nn.Module | None) -> None:
        """Tells projectors that work with layers of the teacher where they are; None where it is no frozen model."""
        for part in self.projector.modules() if self.projector is not None else ():
            if hasattr(part, "meet"):
                part.meet(teacher)  # type: ignore[operator]  # what is called so is a method

    def mirrored(self) -> "Term":
        """Returns a term of the same kind with the sides' paths exchanged; it learns for itself."""
        fixed = self.projector if isinstance(self.projector, nn.Identity) else None
        term = Term(copy.deepcopy(self.loss), self.weight, self.teacher.text, self.student.text, copy.deepcopy(fixed))
        term.schedules = self.schedules  # one schedule for both
        return term

    @property
    def needs_sample(self) -> bool:
        """Whether the term has to see a sample of both tensors before its parameters can exist."""
        aligned = getattr(self.loss, "align", "none") not in ("none", "map")  # which need no parameters
        return self._lazy or (not self._built and (aligned or hasattr(self.loss, "build")))

    @property
    def _lazy(self) -> bool:
        """Whether a projector that was given has layers that are made for what they are called with first."""
        return self.projector is not None and bool(lazy_in(self.projector))

    @property
    def projects(self) -> bool:
        """Whether it has a projector that somebody gave, so that its two sides may be one tensor."""
        return self.projector is not None and not self._bridged

    @property
    def needs_end(self) -> bool:
        """Whether something of the term changes over the run, so that it must be known how long that is."""
        return isinstance(self.weight, Schedule) or bool(self.schedules) or hasattr(self.loss, "at")

    def at(self, moment: Moment) -> None:
        """Sets what is scheduled to its values at a moment of the run: the weight, and attributes of the loss."""
        self._moment = moment
        for name, schedule in self.schedules.items():
            value = float(schedule.at(moment))
            if name == "temperature" and not 0.0 < value < math.inf:
                raise ValueError(
                    f"the schedule of the temperature gave {value} at {moment.progress:.1%} of the run (step "
                    f"{moment.step}), and temperatures are positive finite numbers: {schedule!r}."
                )
            for loss in self._losses():
                setattr(loss, name, value)
        for loss in self._losses():
            follow = getattr(loss, "at", None)
            if follow is not None:
                follow(moment)

    def _losses(self) -> Iterator[nn.Module]:
        yield self.loss
        yield from self.deeper

    @property
    def current_weight(self) -> float:
        """The weight as of now: at the run's begin, or at the moment that ``at`` was told."""
        if not isinstance(self.weight, Schedule):
            factor("weight", self.weight)  # refuses what was assigned since
            return float(self.weight)
        weight = float(self.weight.at(self._moment))
        if not 0.0 <= weight < math.inf:
            raise ValueError(
                f"the schedule of the weight gave {weight} at {self._moment.progress:.1%} of the run: {self.weight!r}."
            )
        return weight

    def values(self) -> dict[str, Tensor | float]:
        """Returns what changes over the run, as of now, by the name it is logged under."""
        values: dict[str, Tensor | float] = dict(getattr(self.loss, "values", {}))
        if isinstance(self.weight, Schedule):
            values["weight"] = self.current_weight
        return {**values, **{name: getattr(self.loss, name) for name in self.schedules}}

    def build(self, student: Selected, teacher: Selected, dtypes: Collection[torch.dtype] = ()) -> None:
        """Makes the projector, and the loss's own parameters, for the shapes of a sample.

        Args:
            student: A sample of the student's tensor, or of each of its levels.
            teacher: A sample of the teacher's tensor, or of each of its levels.
            dtypes: Of the student's parameters. The projector has the sample's, unless that comes from autocast.

        Raises:
            ValueError: If the shapes cannot be bridged.
        """
        sample = next(_each(student))
        device, dtype = sample.device, sample.dtype if sample.dtype in dtypes else None
        if self.projector is None:
            align: Align = getattr(self.loss, "align", "none")
            of_student, of_teacher = self.layouts
            bridges = [
                bridge(s, t, align, (of_student.tell(s), of_teacher.tell(t))) for s, t in self._levels(student, teacher)
            ]
            if isinstance(student, Levels):
                self.projector, self.teacher_side = (PerLevel(side) for side in zip(*bridges, strict=True))
            else:
                ((self.projector, self.teacher_side),) = bridges
            self.projector.to(device=device, dtype=dtype)
            self._bridged = True
        if self._lazy:
            self._make_lazy(student, teacher)
        if hasattr(self.loss, "build"):
            with torch.no_grad():
                levels = self._compared(student, teacher)
                self.deeper.extend(copy.deepcopy(self.loss) for _ in levels[1:])
                for loss, (s, t) in zip(self._losses(), levels, strict=True):
                    loss.build(s, t)  # type: ignore[operator]  # as the first of them, which has one
                    loss.to(device)
        self._built = True

    @torch.no_grad()
    def _make_lazy(self, student: Selected, teacher: Selected) -> None:
        """Calls the projector once, in evaluation mode, so that no statistics move."""
        assert self.projector is not None
        restore_modes = remember_modes(self.projector.modules())
        try:
            self.projector.eval()
            self._compared(student, teacher)
        finally:
            restore_modes()

    def _unbuild(self) -> None:
        """Forgets that it was built, so that the next step says it, too."""
        self._built = False
        self.deeper = nn.ModuleList()
        if self._bridged:
            self.projector, self.teacher_side, self._bridged = None, nn.Identity(), False

    def forward(self, student: Any, teacher: Any, labels: Mapping[str, Any]) -> Tensor:
        """Computes the loss, without its weight.

        Args:
            student: What was captured in the student: one value per call of the tapped module.
            teacher: What was captured in the teacher, likewise.
            labels: What the loss may need of the batch, by name.

        Returns:
            The loss, the sum over the levels and the mean over the calls of the tapped modules.
        """
        pairs = self.pairs(student, teacher)
        teaches = torch.is_grad_enabled() and all(level.requires_grad for s, _ in pairs for level in _each(s))
        if torch.is_grad_enabled() and not (teaches or self.unfreezes or self.current_weight == 0):
            raise ValueError(
                f"the student's {self.student.text!r} carries no gradient, so the term would teach nothing. It was "
                "computed under no_grad, by frozen layers, or inside a checkpoint with use_reentrant=True; tap a "
                "layer that learns, or use use_reentrant=False. If it is unfrozen later, give the term a weight that "
                "is 0 until then: weight=schedules.Piecewise([(0.0, 0.0), (0.5, 1.0)], interpolate=False)."
            )
        if not self._built:
            before = {id(p) for p in self.parameters()}
            self.build(*pairs[0])
            if any(id(p) not in before for p in self.parameters()):
                self._unbuild()
                raise RuntimeError(
                    "the term's parameters were made only now, after the optimizer: call Distiller.build(...) with a "
                    "sample before the optimizer is made."
                )
        arguments = {}
        for name, required in self.labels.items():
            if labels.get(name) is not None:
                arguments[name] = labels[name]
            elif required:
                raise ValueError(
                    f"{type(self.loss).__name__} needs {name!r} and the batch gave none. Pass "
                    f"{how_to_give(name)}, a function of the batch, its key or its index; a task adapter says it in "
                    "labels()."
                )
        try:
            overlooked = COUNTS.keys() - self.labels.keys()
            counts = {name: labels[name] for name in overlooked if labels.get(name) is not None}
            losses = [
                self._of_call(*pair, _part(arguments, i, len(pairs)), counts, teaches) for i, pair in enumerate(pairs)
            ]
        except RuntimeError as error:
            s, t = pairs[0]
            error.add_note(
                f"The student's {self.student.text!r} is {_shapes(s)}, the teacher's {self.teacher.text!r} "
                f"{_shapes(t)}."
            )
            if self.projector is not None and not self._bridged:
                error.add_note(
                    f"The projector that was given, {type(self.projector).__name__}, gets the student's tensor and "
                    "returns one like the teacher's: make it for these shapes, or leave it out, and it is built."
                )
            elif next(self.parameters(), None) is not None:
                error.add_note("What a term learned stays with it: for another student or teacher make a new one.")
            elif _shapes(s) != _shapes(t) and getattr(self.loss, "align", "none") != "shape":
                error.add_note(
                    f"{type(self.loss).__name__} gets no projector where these differ. Take a loss that does, FitNet "
                    "for one; in a loss of your own ask for one by the attribute align = 'shape'; or give the term its "
                    "projector."
                )
            raise
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _of_call(
        self,
        student: Selected,
        teacher: Selected,
        labels: Mapping[str, Any],
        overlooked: Mapping[str, Tensor],
        teaches: bool,
    ) -> Tensor:
        """Returns the loss of one call of the tapped modules, the sum over the levels."""
        levels = self._compared(student, teacher)
        for name, label in overlooked.items():
            if any(COUNTS[name].concerns(label, s, t) for s, t in levels):
                raise ValueError(
                    f"the batch has {COUNTS[name].what} that do not count ({name}), and {type(self.loss).__name__} "
                    f"takes no {name}, so it would compare them, too. {COUNTS[name].remedy}"
                )
        learned = [*self._losses()] if self.deeper else [self.loss] * len(levels)
        losses = [
            loss(s, _constant(t), **of_level)
            for loss, (s, t), of_level in zip(learned, levels, _each_level(labels, len(levels)), strict=True)
        ]
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.ndim:
                raise ValueError(f"{type(self.loss).__name__} returned {describe(loss)} and not a scalar; reduce it.")
            if teaches and not loss.requires_grad:
                raise ValueError(
                    f"{type(self.loss).__name__} returned a value without a gradient, so the term would teach nothing. "
                    "Something between the student's tensor and it detaches, counts or compares; the projector, say."
                )
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _compared(self, student: Selected, teacher: Selected) -> list[tuple[Tensor, Tensor]]:
        """Returns what the loss is given of one call, level by level."""
        assert self.projector is not None
        if _of_autocast(next(_each(student))):
            student = _cast(student, self.projector)
        if not self._bridged:  # the user's own, or none that is needed
            return self._levels(self.projector(student), self.teacher_side(teacher))
        projectors = self.projector.levels if isinstance(self.projector, PerLevel) else [self.projector]
        levels = self._levels(student, self.teacher_side(teacher))
        return [(follow(projector, s, t), t) for projector, (s, t) in zip(projectors, levels, strict=True)]

    def _levels(self, student: Selected, teacher: Selected) -> list[tuple[Tensor, Tensor]]:
        """Returns what is compared of one call, level by level.

        Raises:
            ValueError: If the two sides have not the same levels.
        """
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            return [(student, teacher)]
        if isinstance(student, Tensor) or isinstance(teacher, Tensor) or len(student) != len(teacher):
            raise ValueError(
                f"the student's {self.student.text!r} is {_shapes(student)} and the teacher's {self.teacher.text!r} "
                f"{_shapes(teacher)}: levels are compared one by one, so both sides need the same number of them. "
                "Select those that belong together: 'neck[:3]', 'neck[1]'."
            )
        return list(zip(student, teacher, strict=True))

    def pairs(self, student: Any, teacher: Any) -> list[tuple[Selected, Selected]]:
        """Returns what is compared, selected and paired, of what was captured on both sides.

        Raises:
            ValueError: If the calls cannot be paired, or a path does not select a tensor or levels of them.
        """
        students = [self._selected(self.student, value, "student") for value in student]
        teachers = [self._selected(self.teacher, value, "teacher") for value in teacher]
        if len(students) != len(teachers) or not students:
            remedy = "Tap modules that are called equally often."
            if not students or not teachers:
                remedy += (
                    " What was compiled before the taps were there never calls them: torch.compiler.reset() before the "
                    "fit forgets it."
                )
            raise ValueError(
                f"the student's {self.student.text!r} was called {len(students)} times and the teacher's "
                f"{self.teacher.text!r} {len(teachers)} times in one forward pass; the calls cannot be paired. {remedy}"
            )
        return list(zip(students, teachers, strict=True))

    @staticmethod
    def _selected(path: Path, value: Any, side: str) -> Selected:
        selected = path.select(value)
        if isinstance(selected, Tensor) and not selected.is_nested:
            return selected
        if isinstance(selected, Tensor):
            raise ValueError(
                f"the {side}'s {path.text!r} is a nested tensor, in which the padding is left out. "
                "torch.nn.TransformerEncoder hands such from layer to layer in evaluation: make it with "
                "enable_nested_tensor=False, or tap what the encoder itself returns, which is padded."
            )
        if isinstance(selected, Levels) and selected and all(isinstance(level, Tensor) for level in selected):
            return selected
        if selected is None:
            raise ValueError(f"the {side}'s {path.text!r} is None, of which nothing can be selected; tap a module.")
        there = ", ".join(repr(path.text + selector) for selector in _tensors_of(selected))
        items = selected.values() if isinstance(selected, Mapping) else selected
        levels = isinstance(selected, (Mapping, list, tuple)) and all(isinstance(item, Tensor) for item in items)
        all_levels = f", or all of them as levels: '{path.text}[:]'" if levels else ""
        raise ValueError(
            f"the {side}'s {path.text!r} is {describe(selected)}, and a loss compares tensors. Select one: "
            f"{there or repr(path.text + '[0]')}{all_levels}."
        )

    def sides(self, student: Any, teacher: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns every tensor of the student and of the teacher that is compared."""
        students, teachers = zip(*self.pairs(student, teacher), strict=True)
        return [t for selected in students for t in _each(selected)], [t for s in teachers for t in _each(s)]

    def parts(self) -> list[nn.Module]:
        """Returns the modules that a step calls."""
        parts = [self.projector, self.teacher_side, *self._losses()]
        return [part for part in parts if part is not None]

    def extra_repr(self) -> str:
        """Says the wiring."""
        return f"student={self.student.text!r}, teacher={self.teacher.text!r}, weight={self.weight}"


def _tensors_of(value: Any) -> list[str]:
    """Returns how the first tensors in there are selected."""
    if isinstance(value, Mapping):
        return [f"[{key!r}]" for key, item in value.items() if _compares(item)][:5]
    if isinstance(value, (tuple, list)):
        names = [f".{name}" for name in getattr(value, "_fields", ())] or [f"[{i}]" for i in range(len(value))]
        return [name for name, item in zip(names, value, strict=True) if _compares(item)][:5]
    return [f".{name}" for name, item in getattr(value, "__dict__", {}).items() if _compares(item)][:5]


def _compares(item: object) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _each(selected: Selected) -> Iterator[Tensor]:
    return iter([selected] if isinstance(selected, Tensor) else selected)


def _part(labels: Mapping[str, Any], i: int, calls: int) -> dict[str, Any]:
    """Returns what is given to one of several calls: a head that is called for each level has a label's levels."""
    of_call = {name for name, value in labels.items() if isinstance(value, Levels) and len(value) == calls > 1}
    return {name: value[i] if name in of_call else value for name, value in labels.items()}


def _each_level(labels: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Returns what each level's loss is given: of labels that are levels themselves, its own.

    Raises:
        ValueError: If a label has another number of levels.
    """
    for name, value in labels.items():
        if isinstance(value, Levels) and len(value) != count:
            raise ValueError(
                f"{name!r} is there for {len(value)} levels, and the term compares {count}: compare all levels, "
                "'neck[:]', or none."
            )
    return [
        {name: value[i] if isinstance(value, Levels) else value for name, value in labels.items()} for i in range(count)
    ]


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _of_autocast(x: Tensor) -> bool:
    """Tells whether a tensor may come from an autocast that is over, the student's own or that of a step."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))


def _cast(selected: Selected, module: nn.Module) -> Selected:
    dtype = _dtype(module)
    if dtype is None:
        return selected
    return selected.to(dtype) if isinstance(selected, Tensor) else Levels(level.to(dtype) for level in selected)


def _shapes(selected: Selected) -> str:
    if isinstance(selected, Tensor):
        return str(tuple(selected.shape))
    return f"{len(selected)} levels, " + ", ".join(str(tuple(level.shape)) for level in selected)


def _constant(x: Tensor) -> Tensor:
    # What a model computed under inference_mode cannot be saved for a backward; a copy of it can.
    return x.clone() if x.is_inference() else x.detach()


def how_to_give(name: str) -> str:
    """Returns how a callback is given a label of that name."""
    return f"{name}=..." if name in ("target", "index") else f"labels={{{name!r}: ...}}"
