"""AT: where the network looks."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import unit, upcast
from lightning_kd.numbers import is_number


def at(student: Tensor, teacher: Tensor, p: float = 2.0, squared: bool = True, mask: Tensor | None = None) -> Tensor:
    """Return the distance of two normalised attention maps; see :class:`AT`."""
    _check.tensors(student, teacher)
    if student.ndim < 3 or student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be maps (B, C, ...) of "
            "the same resolution; channels may differ. Tap layers that return maps, and let the term's projector align "
            "their size."
        )
    _check.positions(student, teacher, 2, "the attention to the only one is always 1, and the term silently zero.")
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    difference = _attention(student, p) - _attention(teacher, p)
    if here is None:
        return difference.square().mean() if squared else torch.linalg.vector_norm(difference, dim=1).mean()
    if squared:
        return difference.square().sum() / _mask.total(here)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return distance.sum() / _mask.total(here.flatten(1).any(1))


def _attention(feature: Tensor, p: float) -> Tensor:
    """Return the unit vector (B, positions) of ``mean_C |f|^p``."""
    feature = upcast(feature).flatten(2).abs()
    # the result does not change with the feature's scale; without it, |f|^p overflows
    scale = feature.detach().amax((1, 2), keepdim=True).clamp_min(torch.finfo(feature.dtype).tiny)
    return unit((feature / scale).pow(p).mean(1), dim=1)


class AT(nn.Module):
    """Attention transfer: match the spatial energy of two feature maps (Zagoruyko and Komodakis).

    With the attention ``Q = mean_c |f_c|^p`` of a map (B, C, ...) as a vector over positions, one per
    sample::

        squared=True:   mean((Q_s / ||Q_s|| - Q_t / ||Q_t||)^2)     over samples and positions
        squared=False:  mean(||Q_s / ||Q_s|| - Q_t / ||Q_t|| ||)    over samples

    The first is the authors' code and what the published weight of 1000 belongs to; the second is the paper's
    equation 2 without its weight. The attention is averaged over dimension 1, the channels; tokens (B, N, C)
    must be laid out as maps first. A mask takes pixels out of Q before it is normalised. With the masks of objects
    this is also the spatial attention that detectors are distilled by.

    Args:
        p: The exponent, at least 1.
        squared: Mean of squares, or the norm as printed in the paper.

    Returns:
        ``forward(student, teacher, mask=None)``, maps of one resolution with any channels, returns a scalar, zero
        where the attentions are proportional. A mask (B, H, W) is True where a pixel counts.

    Raises:
        ValueError: If the resolutions differ, or there is one position only.

    Source:
        Zagoruyko and Komodakis, Paying More Attention to Attention, arXiv 1612.03928, equation 2.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 8, 4, 4)
        >>> losses.AT()(-3 * teacher, teacher) < 1e-6
        tensor(True)
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "size"

    def __init__(self, p: float = 2.0, squared: bool = True) -> None:
        super().__init__()
        if not (is_number(p) and p >= 1):
            raise ValueError(f"p must be finite and at least 1 (else infinite gradients at 0), got {p!r}.")
        self.p = p
        self.squared = squared

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the distance of two maps' attention."""
        return at(student, teacher, self.p, self.squared, mask)
