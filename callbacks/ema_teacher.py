"""Self-distillation from the moving average of the student, in a LightningModule that knows nothing of it."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_kd.callbacks.distillation import Distillation

from lightning_kd.attachment import Label
from lightning_kd.schedules import Schedule
from lightning_kd.teachers import EMA
from lightning_kd.teachers.ema import Buffers
from lightning_kd.teachers.precision import Precision
from lightning_kd.term import Term


class EMATeacher(Distillation):
    """Lets the exponential moving average of the student teach it: mean teacher, consistency, self-distillation.

    ``Distillation`` with ``teachers.EMA`` as the teacher. For consistency under different views, ``student_input``
    and ``teacher_input`` transform what the module calls its student with, each for its side.

    Args:
        terms: What is distilled, by name.
        decay: Decay of the average, in [0, 1], or a schedule of it.
        student: Dotted path of the student inside the LightningModule; the module itself unless given.
        target: How to get the labels for losses that need them; ``batch[1]`` unless given.
        task_weight: Factor of the module's own loss, or a schedule of it.
        warm_up: Whether the decay of step t is at most ``(1 + t) / (10 + t)``.
        start_step: Until this optimizer step the teacher is the student itself.
        buffers: ``"average"``, ``"copy"`` or ``"own"`` BatchNorm statistics; see ``teachers.EMA``.
        count: Number of teachers that take turns, epoch by epoch.
        evaluate: Whether validation and checkpoints use the teacher's weights, and the student has them in the end.
        teacher_input: Makes the teacher's arguments out of those that the student is called with.
        student_input: Likewise for the student.
        index: How to get the samples' indices in the data set, for losses with a memory of it.
        labels: How to get what else losses ask for by name, ``{"mask": lambda batch: batch[1] != 255}`` say.
        precision: What the average runs in, ``"bf16"`` say; see ``teachers.EMA``.
        prog_bar: Whether the progress bar shows the terms.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_kd import Term, losses
        >>> callback = EMATeacher({"consistency": Term(losses.KD(temperature=1.0))}, decay=0.99, student="model")
        >>> callback.distiller.teacher.decay
        0.99
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        decay: float | Schedule = 0.999,
        student: str | None = None,
        target: Label | None = None,
        task_weight: float | Schedule = 1.0,
        warm_up: bool = False,
        start_step: int = 0,
        buffers: Buffers = "average",
        count: int = 1,
        evaluate: bool = False,
        teacher_input: Callable[..., Any] | None = None,
        student_input: Callable[..., Any] | None = None,
        index: Label | None = None,
        prog_bar: bool = False,
        labels: Mapping[str, Label] | None = None,
        precision: Precision | None = None,
    ) -> None:
        average = EMA(
            decay,
            warm_up=warm_up,
            start_step=start_step,
            buffers=buffers,
            count=count,
            evaluate=evaluate,
            precision=precision,
        )
        super().__init__(
            average,
            terms,
            student=student,
            target=target,
            task_weight=task_weight,
            teacher_input=teacher_input,
            student_input=student_input,
            index=index,
            prog_bar=prog_bar,
            labels=labels,
        )
