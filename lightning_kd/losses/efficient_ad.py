"""EfficientAD: the part of a feature that a student imitates worst."""

import math
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast


def efficient_ad(student: Tensor, teacher: Tensor, mask: Tensor | None = None, hard: float = 0.999) -> Tensor:
    """Return the mean of the squared differences above their quantile; see :class:`EfficientAD`."""
    _check.maps(student, teacher)
    student, teacher, _ = _mask.blanked(student, teacher.detach(), mask)
    distance = (upcast(student) - upcast(teacher)).square().flatten(1)
    count = distance.shape[1]
    # The quantile is at the place hard * (count - 1) of the sorted ones: so many are not below it.
    above = count - math.ceil(hard * (count - 1) - 1e-9)
    return distance.topk(above, dim=1).values.mean()


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
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar, zero at equality. Where a
        mask (B, H', W') is False, differences are 0, and none is among the largest.

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
        if not 0.0 <= hard < 1.0:
            raise ValueError(f"hard is a quantile in [0, 1), got {hard!r}.")
        self.hard = hard

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean of the largest squared differences of two maps."""
        return efficient_ad(student, teacher, mask, self.hard)
