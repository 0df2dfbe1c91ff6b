"""DTS: a temperature that falls as the student catches up with the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast
from lightning_kd.losses._wrapped import Wrapped


def gap_temperature(gap: Tensor, low: float, high: float) -> Tensor:
    """Return ``low + (high - low) * gap / (1 + gap)``, ``low`` where the gap is negative; see :class:`DTS`."""
    gap = gap.clamp_min(0.0)
    return low + (high - low) * gap / (1.0 + gap)


def _cross_entropy(logits: Tensor, label: Tensor, here: Tensor | None) -> Tensor:
    if here is None:
        return F.cross_entropy(upcast(logits), label)
    return (F.cross_entropy(upcast(logits), label, reduction="none") * here).sum() / _mask.total(here)


class DTS(Wrapped):
    """Dynamic temperature: any loss with a temperature, soft while the student lags behind and sharp later.

    With the cross entropies CE of student and teacher with the labels, means over samples and positions of the batch::

        gap = max(CE_s - CE_t, 0)
        T = low + (high - low) * gap / (1 + gap)

    No gradient flows through T. A student that knows nothing gets soft labels, one as good as its teacher gets T = low.
    After Rahman et al., and **not checked against the paper's equations**: this is the plainest formula that fits its
    abstract, which says that the temperature follows the gap of the cross entropies, softer early and sharper late. It
    has no state, so a resumed run goes on exactly. Public code by that name lets the temperature also fall along a
    cosine over the run, and averages it over steps; that was left out.

    Logged are ``train/<term>/temperature`` and ``train/<term>/gap``. In several processes each has the gap of its own
    part of the batch.

    Args:
        loss: A loss with a temperature, such as ``KD()`` or ``DKD()``; its own temperature is not used.
        low: Temperature of a student as good as its teacher.
        high: Temperature that a hopeless student comes near to.

    Returns:
        ``forward(student, teacher, target, mask=None)`` takes logits (B, C) or (B, C, ...) and class indices (B) or
        (B, ...), and returns what ``loss`` returns. A mask is passed on if ``loss`` takes one.

    Raises:
        ValueError: If ``loss`` has no temperature, not ``0 < low < high``, or the target holds no class indices.

    Source:
        Rahman et al., Dynamic Temperature Scheduler for Knowledge Distillation, arXiv 2511.13767.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> loss, teacher, labels = losses.DTS(losses.KD()), 9 * torch.eye(10), torch.arange(10)
        >>> _ = loss(torch.zeros(10, 10), teacher, labels)
        >>> round(float(loss.values["temperature"]), 2)  # the gap is log(10) - 0.001
        5.88
        >>> _ = loss(teacher, teacher, labels)
        >>> float(loss.values["temperature"])
        1.0
    """

    def __init__(self, loss: nn.Module, low: float = 1.0, high: float = 8.0) -> None:
        super().__init__(loss, tempers=True)
        self.low, self.high = _check.bounds(low, high)
        self.values: dict[str, Tensor] = {}
        """The temperature of the last call and the gap that it came from; logged, and read by nothing else."""

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the wrapped loss at the temperature of the batch."""
        _check.logits(student, teacher)
        student, teacher, here = _mask.blanked(student, teacher, mask)
        label = _mask.class_target(target, student)
        if here is not None:
            label = label.where(here, 0)
        _check.in_range("target", label, student.shape[1], _check.BY_MASK)
        with torch.no_grad():
            gap = _cross_entropy(student, label, here) - _cross_entropy(teacher, label, here)
            temperature = gap_temperature(gap, self.low, self.high)
        self.values = {"temperature": temperature, "gap": gap}
        return self.call(student, teacher, target, mask, temperature)
