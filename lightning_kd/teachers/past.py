"""PastSelf: the student of some epochs ago teaches it."""

from lightning_kd.numbers import is_whole
from lightning_kd.schedules import Moment
from lightning_kd.teachers.copies import CopyTeacher
from lightning_kd.teachers.precision import Precision


class PastSelf(CopyTeacher):
    """The student as it was when an earlier epoch ended (PS-KD; Kim et al.).

    In PS-KD the teacher is the student of the previous epoch, whose weight grows over the run::

        loss_t = (1 - a_t) * H(y, p_t) + a_t * H(p_{t-1}, p_t),  a_t = a_T * t / T,  a_T = 0.8

    which is ``Term(losses.KD(temperature=1.0), weight=schedules.Linear(0.0, 0.8))`` with
    ``task_weight=schedules.Linear(1.0, 0.2)``; the divergence and the cross-entropy with soft labels have the same
    gradient. Before the first copy, the teacher is the student that the run began with.

    Args:
        every: Epochs after which the teacher becomes the student of that moment.
        precision: What the teacher runs in, whatever the Trainer's precision: ``"bf16-mixed"`` (or ``"bf16"``) and
            ``"16-mixed"`` are autocast, ``"32-true"`` is none. Unless given: the Trainer's autocast.

    Raises:
        ValueError: If ``every`` is not a positive number of epochs, or there is no such precision.

    Source:
        Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, arXiv 2006.12000,
        equations 3 and 6.

    Example:
        >>> import torch
        >>> student, teacher = torch.nn.Linear(1, 1, bias=False), PastSelf()
        >>> teacher.bind(student, ["output"])
        >>> _ = student.weight.data.add_(1.0)
        >>> teacher.begin_epoch(Moment(epoch=1))
        >>> torch.equal(teacher.model.weight, student.weight)
        True
    """

    def __init__(self, every: int = 1, precision: Precision | None = None) -> None:
        super().__init__(precision=precision)
        if not (is_whole(every) and every >= 1):
            raise ValueError(f"every is a number of epochs, 1 or more; got {every!r}.")
        self.every = every

    def begin_epoch(self, moment: Moment) -> None:
        """Becomes the student of now, if it is time."""
        if moment.epoch and moment.epoch % self.every == 0:
            self.copy_student()
