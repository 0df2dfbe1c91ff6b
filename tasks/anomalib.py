"""Tasks of anomaly detection as modules of anomalib; imported by who needs them, as anomalib is slow to import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_kd.tasks.anomaly_detection import AnomalyDetection
from lightning_kd.tasks.efficient_ad import EfficientAD
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kd import losses
from lightning_kd.anomalies import Combine, Layers, Weights, grouped, said
from lightning_kd.attachment import Attachment, attachments_of
from lightning_kd.distiller import Distiller
from lightning_kd.extras import late_import
from lightning_kd.meeting import introduce
from lightning_kd.models.efficient_ad import EfficientADStudent, Standardized
from lightning_kd.teachers import Itself
from lightning_kd.term import Term

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule
else:
    AnomalibModule = late_import("anomalib.models.components", "anomalib", "anomaly").AnomalibModule

STUDENT = "model.student."


class AnomalibDistillation(AnomalibModule):
    """A task of anomaly detection, its student and its teacher as a module of anomalib.

    It runs in anomalib's ``Engine`` with its data modules, pre- and post-processors, metrics and visualisers; training
    is that of :class:`~lightning_kd.DistillationModule`: the task's own loss and the terms. A checkpoint holds the
    student; ``load_from_checkpoint`` is given both networks, and takes the teacher as it is.

    Args:
        task: The task, :class:`~lightning_kd.tasks.AnomalyDetection` or one of its kinds.
        student: The student.
        teacher: Its teacher, which stands still; or the student, of which one part imitates another: reverse
            distillation.
        terms: What is distilled, by name.
        optimizer: Makes the optimizer of the student's parameters.
        pre_processor: As anomalib has it: False, True for the default one, or your own.
        post_processor: Likewise.
        evaluator: Likewise.
        visualizer: Likewise.
        teacher_input: Makes what the teacher is called with out of the images, in training and afterwards.

    Raises:
        ModuleNotFoundError: Without anomalib, when this module is imported.
        TypeError: If the task is of another kind.

    Example:
        >>> parts = {name: False for name in ("pre_processor", "post_processor", "evaluator", "visualizer")}
        >>> student, teacher = nn.Conv2d(3, 1, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        >>> terms = {"map": Term(losses.FitNet(), student="output", teacher="output")}
        >>> module = AnomalibDistillation(AnomalyDetection(), student, teacher, terms, torch.optim.AdamW, **parts)
        >>> module.eval()(torch.zeros(2, 3, 16, 16)).anomaly_map.shape
        torch.Size([2, 16, 16])
    """

    model: Any
    left_out = "model.teacher."
    """How the keys begin that no checkpoint holds."""

    def __init__(
        self,
        task: AnomalyDetection,
        student: nn.Module,
        teacher: nn.Module,
        terms: Mapping[str, Term],
        optimizer: Callable[[Any], Optimizer],
        pre_processor: Any = True,
        post_processor: Any = True,
        evaluator: Any = True,
        visualizer: Any = True,
        teacher_input: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        given: object = task  # what a caller without a type checker may pass
        if not isinstance(given, AnomalyDetection):
            raise TypeError(f"task is an AnomalyDetection in anomalib's modules, got {type(given).__name__}.")
        if teacher is not student:
            teacher.requires_grad_(False)
        self.task = task
        self.optimizer = optimizer
        distiller = Distiller(terms, Itself() if teacher is student else teacher, teacher_input, task.knowledge)
        introduce(task, student, distiller.teacher, teacher_input)
        detector = task.deployed(student)
        self.model = Draws(student) if detector is student else detector
        self.attachment = Attachment(distiller, student="model.student", labels=task.labels(), prog_bar=True)

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Saves none: the arguments are networks, and a checkpoint is no code."""

    def configure_callbacks(self) -> list[Callback]:
        """Adds what distils to anomalib's own."""
        there = self._trainer is not None and self.attachment in attachments_of(self._trainer)
        own = super().configure_callbacks()
        return [*([own] if isinstance(own, Callback) else own), *([] if there else [self.attachment])]

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the task's own loss; the terms are added by the attachment."""
        loss = self.task.loss(self.task(self.model.student, batch), batch)
        assert loss is not None  # a task of this kind returns none in evaluation alone
        self.log_dict({f"train/{name}": value for name, value in self.task.values().items()}, batch_size=1)
        return loss

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds maps and scores to the batch, as anomalib's metrics want it."""
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> Any:
        """Makes the optimizer of the student's parameters."""
        return self.optimizer(self.model.student.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the teacher out."""
        super().on_save_checkpoint(checkpoint)
        held = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {key: value for key, value in held.items() if not key.startswith(self.left_out)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the teacher that there is."""
        super().on_load_checkpoint(checkpoint)
        held, own = checkpoint["state_dict"], self.state_dict()
        lacking = {key: value for key, value in own.items() if key.startswith(self.left_out)}
        if getattr(self.model, "teacher", None) is self.model.student:
            lacking = {key: held[STUDENT + key.removeprefix(self.left_out)] for key in lacking}
        checkpoint["state_dict"] = {**held, **lacking}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Asks nothing of the trainer but to skip the sanity check, in which there is no threshold yet."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> Any:
        """Says that it learns from normal images."""
        return late_import("anomalib", "anomalib", "anomaly").LearningType.ONE_CLASS


class StudentTeacherModule(AnomalibDistillation):
    """Where a student differs from its teacher, as a module of anomalib: what is not normal it did not learn.

    Args:
        student: The student.
        teacher: Its teacher, which stands still; or the student, of which one part imitates another: reverse
            distillation.
        levels: Paths of what is compared, in both networks: ``["layer1", "layer2", "layer3"]``; or lists of them, whose
            maps are multiplied.
        teacher_levels: Paths in the teacher, where they are others.
        combine: ``"product"`` of the levels' maps, as STFPM has it, or ``"sum"``.
        terms: What is distilled, by name; ``losses.STFPM`` on each level unless given.
        optimizer: Makes the optimizer of parameters; unless given SGD of 0.4, momentum 0.9, weight decay 1e-4, as the
            code of STFPM's authors has it, whose loss is without the factor 1/2: its steps are twice as long.
        pre_processor: As anomalib has it: False, True for the default one, or your own.
        post_processor: Likewise.
        evaluator: Likewise.
        visualizer: Likewise.
        smoothing: Standard deviation in pixels of a Gaussian that smooths the map: 4 in RD4AD.
        weights: Of the levels in their sum, in lists where the levels are; 1 unless given.
        teacher_input: Makes what the teacher is called with out of the images, in training and afterwards.
        align_corners: How levels are interpolated: False as in STFPM, True as in the code of RD4AD's authors.

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
        weights: Weights | None = None,
        teacher_input: Callable[..., Any] | None = None,
        align_corners: bool = False,
    ) -> None:
        ours, theirs = (chain.from_iterable(grouped(side)) for side in (levels, teacher_levels or levels))
        pairs = list(zip(ours, theirs, strict=True))
        super().__init__(
            AnomalyDetection(levels, teacher_levels, combine, smoothing, weights=weights, align_corners=align_corners),
            student,
            teacher,
            terms or {f"stfpm{i}": Term(losses.STFPM(), student=s, teacher=t) for i, (s, t) in enumerate(pairs)},
            optimizer or _sgd,
            pre_processor,
            post_processor,
            evaluator,
            visualizer,
            teacher_input,
        )


class EfficientADModule(AnomalibDistillation):
    """EfficientAD by this library's terms, as a module of anomalib.

    The teacher's channels are standardized by the training images before the first step, unless they are already, and
    the figures are part of a checkpoint. The quantiles that make the two maps comparable are taken from the normal
    images of a validation before it begins, so that anomalib's thresholds are of the maps that a test will see.

    Args:
        student: The student.
        teacher: What describes patches, :class:`~lightning_kd.models.PatchDescriber` with pretrained weights; wrapped
            in :class:`~lightning_kd.models.Standardized`, unless it is one.
        unrelated: Makes unrelated images of the shape of those that it is given, normalised like them:
            :class:`~lightning_kd.data.UnrelatedImages`. Without it there is no penalty.
        terms: What is distilled, by name; hard features and the autoencoder's unless given, as in the paper.
        optimizer: Makes the optimizer of parameters; unless given Adam of 1e-4 with weight decay 1e-5, a tenth of it in
            the last twentieth of the run.
        pre_processor: As anomalib has it: False, True for the default one, or your own.
        post_processor: Likewise.
        evaluator: Likewise.
        visualizer: Likewise.
        teacher_input: Makes what the teacher is called with out of the images, in training and afterwards.

    Raises:
        ModuleNotFoundError: Without anomalib, when this module is imported.
        ValueError: If there is no normal image to take the figures of.

    Example:
        >>> from lightning_kd.models import PatchDescriber
        >>> student = EfficientADStudent(channels=8, image_size=(64, 64), width=4)
        >>> module = EfficientADModule(student, PatchDescriber(channels=8, width=4), post_processor=False).eval()
        >>> module.model(torch.zeros(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 64, 64])

    Source: Batzner et al., EfficientAD, arXiv 2303.14535, sections 3.2 to 3.4 and algorithm 1.
    """

    left_out = "model.teacher.network."
    task: EfficientAD

    def __init__(
        self,
        student: EfficientADStudent,
        teacher: nn.Module,
        unrelated: Callable[[Tensor], Tensor] | None = None,
        terms: Mapping[str, Term] | None = None,
        optimizer: Callable[[Any], Optimizer] | None = None,
        pre_processor: Any = True,
        post_processor: Any = True,
        evaluator: Any = True,
        visualizer: Any = True,
        teacher_input: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            EfficientAD(unrelated),
            student,
            teacher if isinstance(teacher, Standardized) else Standardized(teacher, student.channels),
            terms
            or {
                "hard": Term(losses.EfficientAD(), student="output.local", teacher="output"),
                "autoencoder": Term(losses.FitNet(), student="output.autoencoder", teacher="output"),
            },
            optimizer or _adam,
            pre_processor,
            post_processor,
            evaluator,
            visualizer,
            teacher_input,
        )

    def configure_optimizers(self) -> Any:
        """Makes the optimizer of the student's parameters, and the paper's schedule of its own one."""
        optimizer = super().configure_optimizers()
        total = self.trainer.estimated_stepping_batches
        if self.optimizer is not _adam or total == float("inf"):
            return optimizer
        late = torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(int(0.95 * total), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": late, "interval": "step"}}

    def on_train_start(self) -> None:
        """Standardizes the teacher's channels."""
        super().on_train_start()
        teacher = self.model.teacher
        if teacher.count:
            return
        teacher.standardize(batch.image[~self.task.target(batch).label] for batch in self._seen("train"))
        if not teacher.count:
            raise ValueError("EfficientAD standardizes its teacher by normal training images, and there is none.")

    @torch.no_grad()
    def on_validation_start(self) -> None:
        """Takes the quantiles of the maps of normal images."""
        super().on_validation_start()
        self.task.begin_validation()
        for batch in self._seen("val"):
            self.task(self.model.student, batch)
        self.task.end_validation(self.model.student)

    def _seen(self, stage: str) -> Iterator[Any]:
        """Yields a stage's batches as the model sees them, of a loader of their own."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None:
            loader = getattr(data, f"{stage}_dataloader")()
        else:
            loader = self.trainer.train_dataloader if stage == "train" else self.trainer.val_dataloaders
        limit = self.trainer.num_training_batches if stage == "train" else self.trainer.num_val_batches[0]
        with isolate_rng():  # the order of the batches is that of a run without
            for batch in islice(loader, None if limit == float("inf") else int(limit)):
                moved = self.trainer.strategy.batch_to_device(batch)
                if isinstance(self.pre_processor, Callback):
                    self.pre_processor.on_validation_batch_start(self.trainer, self, moved, 0)
                yield moved


class Draws(nn.Module):
    """A student that draws maps by itself, and says them as anomalib's models do."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Any:
        """Returns :class:`~lightning_kd.anomalies.AnomalyMaps`; in training what the student returns."""
        output = self.student(images)
        return output if self.training else said(output)


def _sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.4, momentum=0.9, weight_decay=1e-4)


def _adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4, weight_decay=1e-5)
