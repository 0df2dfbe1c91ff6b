"""Detectors made of a student and its teacher as modules of anomalib; imported by who needs them, as it is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kd import losses
from lightning_kd.anomalies import Combine, Layers, StudentTeacher, grouped
from lightning_kd.attachment import Attachment, attachments_of
from lightning_kd.distiller import Distiller
from lightning_kd.extras import late_import
from lightning_kd.teachers import Itself
from lightning_kd.term import Term

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule
else:
    AnomalibModule = late_import("anomalib.models.components", "anomalib", "anomaly").AnomalibModule

TEACHER = "model.teacher."
"""Keys that no checkpoint holds."""

STUDENT = "model.student."


class StudentTeacherModule(AnomalibModule):
    """A student that is distilled by this library's terms, as a module of anomalib.

    It runs in anomalib's ``Engine`` with its data modules, pre- and post-processors, metrics and visualisers: what is
    not normal is where student and teacher differ. A checkpoint holds the student; ``load_from_checkpoint`` is given
    both networks, and takes the teacher as it is.

    Args:
        student: The student.
        teacher: Its teacher, which stands still; or the student, of which one part imitates another: reverse
            distillation.
        levels: Paths of what is compared, in both networks: ``["layer1", "layer2", "layer3"]``; or lists of them, whose
            maps are multiplied.
        teacher_levels: Paths in the teacher, where they are others.
        combine: ``"product"`` of the levels' maps, as STFPM has it, or ``"sum"``.
        smoothing: Standard deviation in pixels of a Gaussian that smooths the map: 4 in RD4AD.
        terms: What is distilled, by name; ``losses.STFPM`` on each level unless given.
        optimizer: Makes the optimizer of parameters; STFPM's own unless given: SGD of 0.4, momentum 0.9, weight decay
            1e-4.
        pre_processor: As anomalib has it: False, True for the default one, or your own.
        post_processor: Likewise.
        evaluator: Likewise.
        visualizer: Likewise.
        weights: Of the levels in their sum; 1 unless given.
        teacher_input: Makes what the teacher is called with out of the images, in training and afterwards.

    Raises:
        ModuleNotFoundError: Without anomalib, when this module is imported.
        ValueError: If a path is unknown.

    Example:
        >>> from torch import nn
        >>> parts = {name: False for name in ("pre_processor", "post_processor", "evaluator", "visualizer")}
        >>> module = StudentTeacherModule(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), ["output"], **parts).eval()
        >>> module(torch.zeros(2, 3, 16, 16)).anomaly_map.shape
        torch.Size([2, 16, 16])
    """

    model: StudentTeacher

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        levels: Layers,
        teacher_levels: Layers | None = None,
        combine: Combine = "product",
        terms: Mapping[str, Term] | None = None,
        optimizer: Callable[[Any], Optimizer] | None = None,
        pre_processor: Any = True,
        post_processor: Any = True,
        evaluator: Any = True,
        visualizer: Any = True,
        smoothing: float = 0.0,
        weights: Sequence[float] | None = None,
        teacher_input: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        if teacher is not student:
            teacher.requires_grad_(False)
        self.model = StudentTeacher(
            student, teacher, levels, teacher_levels, combine, smoothing, teacher_input, weights
        )
        self.optimizer = optimizer
        ours, theirs = (chain.from_iterable(grouped(side)) for side in (levels, teacher_levels or levels))
        pairs = list(zip(ours, theirs, strict=True))
        terms = terms or {f"stfpm{i}": Term(losses.STFPM(), student=s, teacher=t) for i, (s, t) in enumerate(pairs)}
        distiller = Distiller(terms, Itself() if teacher is student else teacher, teacher_input)
        self.attachment = Attachment(distiller, student="model.student", prog_bar=True)

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Saves none: the arguments are networks, and a checkpoint is no code."""

    def configure_callbacks(self) -> list[Callback]:
        """Adds what distils to anomalib's own."""
        there = self._trainer is not None and self.attachment in attachments_of(self._trainer)
        own = super().configure_callbacks()
        return [*([own] if isinstance(own, Callback) else own), *([] if there else [self.attachment])]

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the student on normal images; the terms are added by the attachment."""
        output = self.model.student(batch.image)
        first: Tensor = output if isinstance(output, Tensor) else next(_tensors(output))
        return first.sum() * 0.0

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds maps and scores to the batch, as anomalib's metrics want it."""
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> Optimizer:
        """Makes the optimizer of the student's parameters."""
        parameters = self.model.student.parameters()
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.SGD(parameters, lr=0.4, momentum=0.9, weight_decay=1e-4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the teacher out."""
        super().on_save_checkpoint(checkpoint)
        held = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {key: value for key, value in held.items() if not key.startswith(TEACHER)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the teacher that there is."""
        super().on_load_checkpoint(checkpoint)
        held = checkpoint["state_dict"]
        if self.model.teacher is self.model.student:
            own = {TEACHER + key.removeprefix(STUDENT): held[key] for key in held if key.startswith(STUDENT)}
        else:
            own = {key: value for key, value in self.state_dict().items() if key.startswith(TEACHER)}
        checkpoint["state_dict"] = {**held, **own}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Asks nothing of the trainer but to skip the sanity check, in which there is no threshold yet."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> Any:
        """Says that it learns from normal images."""
        return late_import("anomalib", "anomalib", "anomaly").LearningType.ONE_CLASS


def _tensors(value: Any) -> Any:
    for item in value.values() if isinstance(value, Mapping) else value:
        if isinstance(item, Tensor):
            yield item
        else:
            yield from _tensors(item)
