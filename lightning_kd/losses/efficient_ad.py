"""EfficientAD: the part of a feature that a student imitates worst."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast
from lightning_kd.numbers import is_number


def efficient_ad(student: Tensor, teacher: Tensor, mask: Tensor | None = None, hard: float = 0.999) -> Tensor:
    """Return the mean of the squared differences above their quantile; see :class:`EfficientAD`."""
    _check.maps(student, teacher)
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    distance = (upcast(student) - upcast(teacher)).square()
    if here is None:
        distance = distance.flatten(1)
        return distance.topk(_above(distance.shape[1], hard), dim=1).values.mean()
    counts = here.flatten(1).sum(dim=1) * student.shape[1]
    above = counts - (hard * (counts.double() - 1) - 1e-9).ceil().long()
    largest = distance.where(here[:, None], -1.0).flatten(1).topk(_above(student[0].numel(), hard), dim=1).values
    counted = torch.arange(largest.shape[1], device=largest.device) < above[:, None]
    each = largest.where(counted, 0.0).sum(dim=1) / above.clamp_min(1)
    return each.sum() / (counts > 0).sum().clamp_min(1)


def _above(count: int, hard: float) -> int:
    """Return how many are not below the quantile: that is at the place hard * (count - 1) of the sorted ones."""
    return count - math.ceil(hard * (count - 1) - 1e-9)


class EfficientAD(nn.Module):
    """Hard feature loss: the mean of the largest squared differences of student and teacher (Batzner et al.).

    With ``D = (s - t)^2`` of each channel and position, and ``d`` its quantile in a sample::

        loss = mean(D where D >= d)

    Where a normal image is imitated well already, it is left alone: with 0.999 a thousandth of the elements learn. In
    the paper the teacher's features are normalised, channel by channel, by mean and deviation over the training images,
    and batches are of one image; here each sample of a batch has its quantile, and the loss is their mean. ``hard=0``
    is the mean of all. It is the loss between student and teacher alone: ``models.Standardized`` normalises the
    teacher, and ``tasks.EfficientAD`` adds the paper's penalty on other images and its autoencoder.

    Args:
        hard: The quantile, in [0, 1).

    Returns:
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar, zero at equality. With a
        mask (B, H', W'), quantile and mean are those of the pixels where it is True.

    Raises:
        ValueError: If the shapes differ, or the quantile is out of range.

    Source:
        Batzner et al., EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies, arXiv 2303.14535,
        section 3.2.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
        >>> student[..., 0, 0] = 3.0
        >>> losses.EfficientAD()(student, teacher)
        tensor(9.)
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def __init__(self, hard: float = 0.999) -> None:
        super().__init__()
        if not (is_number(hard) and 0.0 <= hard < 1.0):
            raise ValueError(f"hard is a quantile in [0, 1), got {hard!r}.")
        self.hard = hard

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean of the largest squared differences of two maps."""
        return efficient_ad(student, teacher, mask, self.hard)
