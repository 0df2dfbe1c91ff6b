"""PKD: correlation of features, free of their scale."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import unit, upcast


def pkd(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``mean((z_s - z_t)^2) / 2`` of the features standardised by channel; see :class:`PKD`."""
    _check.maps(student, teacher)
    if student[:, 0].numel() < 2:
        raise ValueError(
            f"a correlation over one position is undefined, got a batch of one map {tuple(student.shape)}."
        )
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    difference = _standard(upcast(student), here) - _standard(upcast(teacher), here)
    count = student[:, 0].numel() if here is None else _mask.total(here)
    return difference.square().sum() / (2 * count * student.shape[1])


def _standard(x: Tensor, here: Tensor | None) -> Tensor:
    """Return (C, positions) with mean 0 and deviation 1 over what counts, and 0 elsewhere."""
    x = x.movedim(1, 0).flatten(1)
    if here is None:
        return math.sqrt(x.shape[1] - 1) * _direction(x - x.mean(1, keepdim=True), x)
    count = _mask.total(here).to(x.dtype)
    centred = torch.where(here.flatten(), x - x.sum(1, keepdim=True) / count, 0.0)
    length: Tensor = (count - 1).sqrt()
    return length * _direction(centred, x)


def _direction(centred: Tensor, x: Tensor) -> Tensor:
    # what remains of a constant channel after its mean is taken off is rounding: no direction
    noise = 1e-6 * torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    return unit(centred, dim=1, eps=noise.clamp_min(1e-12))


class PKD(nn.Module):
    """Pearson distillation: match features standardised by channel, free of their magnitude (Cao et al.).

    With ``z`` the feature with mean 0 and standard deviation 1 in each channel, over samples and positions::

        loss = mean((z_s - z_t)^2) / 2

    For n samples and positions it is ``(n - 1) / n * (1 - r)``, r the mean Pearson correlation of the channels, as
    the deviation is over n - 1. Made for the levels of a detector's neck (FPN), which a one-stage and a two-stage
    detector have at different magnitudes; usual weights are 6 to 10 for each level. A constant channel has no
    direction and no gradient.

    Returns:
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar, zero where each channel of
        the student is a positive multiple of the teacher's, plus a constant. With a mask (B, H', W') deviations and
        mean are over the pixels where it is True.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
        arXiv 2207.02039.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 5, 8, 8)
        >>> bool(losses.PKD()(3 * teacher - 1, teacher) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how far two maps' channels are from perfectly correlated."""
        return pkd(student, teacher, mask)
