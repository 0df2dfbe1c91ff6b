"""Distillation for a LightningModule that knows nothing of it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_kd.attachment import Attachment, Label, label_sources, refuse_unasked
from lightning_kd.distiller import Distiller
from lightning_kd.schedules import Schedule
from lightning_kd.term import Term


class Distillation(Attachment):
    """Distils a teacher into the student inside of an unmodified LightningModule.

    The module's own ``training_step`` runs as it is. Its student's call is mirrored: the teacher is called with
    the same arguments, once per training batch, and the terms compare what both computed:

    ``loss = task_weight * training_step's loss + sum_k weight_k * term_k(student, teacher)``

    Logged are ``train/loss``, ``train/task``, ``train/<term>`` (without its weight) and ``train/<term>/weight``
    where that is scheduled. After the fit the module is as it was; checkpoints hold the student alone, and what
    projectors learned in the callback's own state.

    Args:
        teacher: A trained model, plain or LightningModule, or any ``lightning_kd.teachers.Teacher``.
        terms: What is distilled, by name.
        student: Dotted path of the student inside the LightningModule; the module itself unless given.
        target: How to get the labels for losses that need them: a function of the batch, a key or an index;
            ``batch[1]`` unless given.
        task_weight: Factor of the module's own loss, or a schedule of it.
        teacher_input: Makes the teacher's arguments out of the student's (another resolution or normalisation).
        student_input: Likewise for the student, where it is to see another (stronger) view.
        index: How to get the samples' indices in the data set, for losses with a memory of it.
        labels: How to get what else losses ask for by name, ``{"mask": lambda batch: batch[1] != 255}`` say.
        prog_bar: Whether the progress bar shows the terms.

    Raises:
        ValueError: If a weight is out of range, there is no term, or a term's name cannot be logged.
        TypeError: If the teacher is not a module or a term not a ``Term``.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_kd import Distillation, Term, losses
        >>> callback = Distillation(teacher=torch.nn.Linear(32, 2), terms={"kd": Term(losses.KD(), weight=0.9)})
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = Trainer(callbacks=[callback], fast_dev_run=True, **quiet)
        >>> trainer.fit(BoringModel())  # doctest: +SKIP
    """

    def __init__(
        self,
        teacher: nn.Module,
        terms: Mapping[str, Term],
        student: str | None = None,
        target: Label | None = None,
        task_weight: float | Schedule = 1.0,
        teacher_input: Callable[..., Any] | None = None,
        index: Label | None = None,
        prog_bar: bool = False,
        student_input: Callable[..., Any] | None = None,
        labels: Mapping[str, Label] | None = None,
    ) -> None:
        super().__init__(
            Distiller(terms, teacher, teacher_input=teacher_input, student_input=student_input),
            student=student,
            labels=label_sources(target, index, labels),
            task_weight=task_weight,
            prog_bar=prog_bar,
        )
        refuse_unasked(labels or {}, self.distiller.labels)
