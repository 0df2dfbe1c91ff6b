"""EMA: the moving average of the student teaches it."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_kd.numbers import is_number, is_whole
from lightning_kd.schedules import Moment, Schedule
from lightning_kd.teachers.copies import CopyTeacher, copy_tensors, from_first_process, parameters_of
from lightning_kd.teachers.precision import Precision

Buffers = Literal["average", "copy", "own"]


class EMA(CopyTeacher):
    r"""The exponential moving average of the student's weights (mean teacher; Tarvainen and Valpola).

    After every *optimizer* step, however many batches were accumulated for it and on however many devices::

        teacher <- d * teacher + (1 - d) * student

    Args:
        decay: d in [0, 1], or a schedule of it: ``schedules.Cosine(0.996, 1.0)`` is that of BYOL and DINO.
        warm_up: Whether d is ``min(d, (1 + t) / (10 + t))`` in step t, so that the first steps, far from what will
            be, are soon forgotten.
        start_step: Until this optimizer step the teacher is the student itself.
        buffers: What happens to BatchNorm statistics: ``"average"`` averages them like the weights, ``"copy"``
            takes the student's, ``"own"`` lets the teacher's layers normalise by and gather the statistics of what it
            sees itself, as the authors of mean teacher and BYOL do. Buffers of integers (counts) are copied. On several
            devices they are those of the first, as in DDP.
        count: Number of teachers that take turns: with 2, epoch by epoch one of the two is updated and teaches
            (dual temporary teachers).
        evaluate: Whether validation during the fit and checkpoints use the teacher's weights, and the student has
            them when the fit ends.
        precision: What the teacher runs in, whatever the Trainer's precision: ``"bf16-mixed"`` (or ``"bf16"``) and
            ``"16-mixed"`` are autocast, ``"32-true"`` is none; the average is kept in float32. Unless given: the
            Trainer's autocast.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Mean teacher: arXiv 1703.01780, equation in section 2. BYOL: arXiv 2006.07733, section 3.1 and appendix J.
        Dual temporary teachers: Na et al., Switching Temporary Teachers for Semi-Supervised Semantic Segmentation,
        arXiv 2310.18640. Warm-up: TensorFlow's ``ExponentialMovingAverage``.

    Example:
        >>> import torch
        >>> student, teacher = torch.nn.Linear(1, 1, bias=False), EMA(decay=0.9)
        >>> teacher.bind(student, ["output"])
        >>> before = student.weight.item()
        >>> _ = student.weight.data.add_(1.0)
        >>> teacher.update(Moment(step=1))
        >>> round(teacher.model.weight.item() - before, 4)
        0.1
    """

    def __init__(
        self,
        decay: float | Schedule = 0.999,
        warm_up: bool = False,
        start_step: int = 0,
        buffers: Buffers = "average",
        count: int = 1,
        evaluate: bool = False,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(count=count, evaluate=evaluate, precision=precision)
        for end in (decay(0.0), decay(1.0)) if isinstance(decay, Schedule) else (decay,):
            _checked(end)
        if buffers not in ("average", "copy", "own"):
            raise ValueError(f"buffers is 'average', 'copy' or 'own', got {buffers!r}.")
        if not (is_whole(start_step) and is_whole(count) and start_step >= 0 and count >= 1):
            raise ValueError(f"start_step is 0 or more and count 1 or more, got {start_step!r} and {count!r}.")
        self.decay = decay
        self.warm_up = warm_up
        self.start_step = start_step
        self.buffers_policy = buffers
        self.needs_end = isinstance(decay, Schedule)

    def decay_at(self, moment: Moment) -> float:
        """Returns d of the update at a moment of the run."""
        t = moment.step - self.start_step
        if t <= 0:
            return 0.0
        decay = _checked(self.decay.at(moment)) if isinstance(self.decay, Schedule) else self.decay
        return min(decay, (1 + t) / (10 + t)) if self.warm_up else decay

    @torch.no_grad()
    def update(self, moment: Moment) -> None:
        """Moves the teacher whose turn it is towards the student."""
        decay = self.decay_at(moment)
        _average(parameters_of(self.model), parameters_of(self.student), decay)
        own = {id(b) for m in self.model.modules() if self._is_own(m) for b in m.buffers(recurse=False)}
        averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        for ours, theirs in zip(self.model.buffers(), self.student.buffers(), strict=True):
            if id(ours) not in own:
                mean = self.buffers_policy == "average" and ours.is_floating_point()
                for side, buffer in zip(averaged if mean else copied, (ours, theirs), strict=True):
                    side.append(buffer)
        _average(*averaged, decay)
        copy_tensors(*copied)
        from_first_process(list(self.model.buffers()))

    def _is_own(self, module: nn.Module) -> bool:
        return self.buffers_policy == "own" and isinstance(module, _BatchNorm)

    def _set_mode(self) -> None:
        self.model.eval()
        for module in self.model.modules():
            if self._is_own(module):
                module.train()

    def _may_stop_early(self) -> bool:
        return self.buffers_policy != "own"  # layers behind the deepest tap gather statistics, too


def _checked(decay: float) -> float:
    given: object = decay  # what a caller without a type checker may pass
    if not (is_number(given) and 0.0 <= given <= 1.0):
        raise ValueError(f"decay is a number in [0, 1], or a schedule of one; got {decay!r}.")
    return decay


def _average(teacher: list[Tensor], student: list[Tensor], decay: float) -> None:
    if teacher:
        same = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
        torch._foreach_lerp_(teacher, same, 1.0 - decay)
