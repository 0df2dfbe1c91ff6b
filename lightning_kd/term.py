"""A term: where a loss is applied, and how much it weighs."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.projectors import bridge
from lightning_kd.schedules import Moment, Schedule
from lightning_kd.schedules.base import factor
from lightning_kd.wiring import OUTPUT, Path, describe


class Term(nn.Module):
    """One knowledge that is distilled: a loss, the two outputs that it compares, and its weight.

    Args:
        loss: ``loss(student, teacher) -> scalar``, any module of :mod:`lightning_kd.losses` or your own. A third
            argument of its ``forward`` is taken from the batch by name: ``target`` for the labels.
        weight: Factor of the loss in the total, a schedule of it, or a function of the fraction of the run.
        student: Path of the output in the student: ``"output"`` is what its forward returns, ``"output.logits"``
            selects inside of it, anything else is a module path such as ``"layer3"``.
        teacher: Path of the output in the teacher, likewise.
        projector: What brings the student's tensor to the shape that the loss needs. Where it is not given and
            the loss needs one, it is built from the shapes of a first batch; ``nn.Identity()`` forbids that.

    Raises:
        ValueError: If the weight is negative or not finite, or a path is malformed.
        TypeError: If the loss is not a module.

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
        given: object = loss  # what a caller without a type checker may pass
        if not isinstance(given, nn.Module):
            hint = f" Did you mean {given.__name__}()?" if isinstance(given, type) else ""
            raise TypeError(f"loss is a module, loss(student, teacher) -> scalar; got {given!r}.{hint}")
        bridge_given: object = projector
        if bridge_given is not None and not isinstance(bridge_given, nn.Module):
            raise TypeError(f"projector is a module that maps the student's tensor, or None; got {bridge_given!r}.")
        self.loss = loss
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
        self.at(Moment())

    def mirrored(self) -> "Term":
        """Returns a term of the same kind with the sides' paths exchanged; it learns for itself."""
        fixed = self.projector if isinstance(self.projector, nn.Identity) else None
        term = Term(copy.deepcopy(self.loss), self.weight, self.teacher.text, self.student.text, copy.deepcopy(fixed))
        term.schedules = self.schedules  # one schedule for both
        return term

    @property
    def needs_sample(self) -> bool:
        """Whether the term has to see a sample of both tensors before its parameters can exist."""
        return not self._built and (getattr(self.loss, "align", "none") != "none" or hasattr(self.loss, "build"))

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
            setattr(self.loss, name, value)
        follow = getattr(self.loss, "at", None)
        if follow is not None:
            follow(moment)

    @property
    def current_weight(self) -> float:
        """The weight as of now: at the run's begin, or at the moment that ``at`` was told."""
        if not isinstance(self.weight, Schedule):
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

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Makes the projector, and the loss's own parameters, for the shapes of a sample.

        Args:
            student: A sample of the student's tensor.
            teacher: A sample of the teacher's tensor.

        Raises:
            ValueError: If the shapes cannot be bridged.
        """
        if self.projector is None:
            self.projector, self.teacher_side = bridge(student, teacher, getattr(self.loss, "align", "none"))
            self.projector.to(student.device)
        build = getattr(self.loss, "build", None)
        if build is not None:
            with torch.no_grad():
                build(self.projector(student), self.teacher_side(teacher))
            self.loss.to(student.device)
        self._built = True

    def forward(self, student: Any, teacher: Any, labels: Mapping[str, Any]) -> Tensor:
        """Computes the loss, without its weight.

        Args:
            student: What was captured in the student: one value per call of the tapped module.
            teacher: What was captured in the teacher, likewise.
            labels: What the loss may need of the batch, by name.

        Returns:
            The loss, the mean over the calls of the tapped modules.
        """
        pairs = self.pairs(student, teacher)
        if torch.is_grad_enabled() and not all(s.requires_grad for s, _ in pairs):
            raise ValueError(
                f"the student's {self.student.text!r} carries no gradient, so the term would teach nothing. It was "
                "computed under no_grad, by frozen layers, or inside a checkpoint with use_reentrant=True; tap a "
                "layer that learns, or use use_reentrant=False."
            )
        if not self._built:
            before = {id(p) for p in self.parameters()}
            self.build(*pairs[0])
            if any(id(p) not in before for p in self.parameters()):
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
                    f"{type(self.loss).__name__} needs {name!r} and the batch gave none. Pass {name}=..., a function "
                    "of the batch, its key or its index."
                )
        assert self.projector is not None
        try:
            losses = [self.loss(self.projector(s), _constant(self.teacher_side(t)), **arguments) for s, t in pairs]
        except RuntimeError as error:
            s, t = pairs[0]
            error.add_note(
                f"The student's {self.student.text!r} is {tuple(s.shape)}, the teacher's {self.teacher.text!r} "
                f"{tuple(t.shape)}. What a term learned stays with it: for another student or teacher make a new one."
            )
            raise
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.ndim:
                raise ValueError(f"{type(self.loss).__name__} returned {describe(loss)} and not a scalar; reduce it.")
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def pairs(self, student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
        """Returns the tensors that are compared, selected and paired, of what was captured on both sides.

        Raises:
            ValueError: If the calls cannot be paired, or a path does not select a tensor.
        """
        students = [self._tensor(self.student, value, "student") for value in student]
        teachers = [self._tensor(self.teacher, value, "teacher") for value in teacher]
        if len(students) != len(teachers) or not students:
            remedy = "Tap modules that are called equally often."
            if not students or not teachers:
                remedy += (
                    " A LightningModule that is compiled as a whole must not be called before the fit: "
                    "torch.compiler.reset() forgets what was compiled."
                )
            raise ValueError(
                f"the student's {self.student.text!r} was called {len(students)} times and the teacher's "
                f"{self.teacher.text!r} {len(teachers)} times in one forward pass; the calls cannot be paired. {remedy}"
            )
        return list(zip(students, teachers, strict=True))

    @staticmethod
    def _tensor(path: Path, value: Any, side: str) -> Tensor:
        selected = path.select(value)
        if not isinstance(selected, Tensor):
            raise ValueError(
                f"the {side}'s {path.text!r} is {describe(selected)}, and a loss compares tensors. Select one: "
                f"'{path.text}[0]' or '{path.text}[\"key\"]'."
            )
        return selected

    def extra_repr(self) -> str:
        """Says the wiring."""
        return f"student={self.student.text!r}, teacher={self.teacher.text!r}, weight={self.weight}"


def _constant(x: Tensor) -> Tensor:
    # What a model computed under inference_mode cannot be saved for a backward; a copy of it can.
    return x.clone() if x.is_inference() else x.detach()
