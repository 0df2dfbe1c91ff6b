"""STFPM: the directions of features, position by position."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import unit, upcast


def stfpm(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over samples and positions of half the squared distance of unit vectors; see :class:`STFPM`."""
    _check.maps(student, teacher)
    _check.direction(student)
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    distance = half_squared_distance(student, teacher)
    return distance.mean() if here is None else distance.sum() / _mask.total(here)


def half_squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``||s / ||s|| - t / ||t|| ||^2 / 2`` of the vectors at each position of maps (B, C, H, W): (B, H, W).

    That is one minus their cosine.

    Example:
        >>> import torch
        >>> from lightning_kd.losses.stfpm import half_squared_distance
        >>> x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
        >>> half_squared_distance(x, -x).item()
        2.0
    """
    difference = unit(upcast(student), dim=1) - unit(upcast(teacher), dim=1)
    return 0.5 * difference.square().sum(1)


class STFPM(nn.Module):
    """Feature matching of student and teacher that makes their difference a detector of anomalies (Wang et al.).

    With ``u(f)`` the vector of a position divided by its length::

        loss = mean over samples and positions of ||u(s) - u(t)||^2 / 2

    which is one minus the cosine of the two. It is for each level of a pyramid, ``"output[:]"``: the term is the sum
    over the levels, whose weights are 1 in the paper. Trained on what is normal alone, the student differs from its
    teacher where it meets what is not.

    The mean is over the batch, too, as in the paper and the authors' code, which leaves the factor 1/2 out; anomalib's
    ``STFPMLoss`` sums over the batch, so that its gradient grows with the batch. A vector of zeros has no direction,
    and no gradient.

    Returns:
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar in [0, 2], zero where each
        vector of the student is a positive multiple of the teacher's. With a mask (B, H', W') the mean is over the
        positions where it is True.

    Raises:
        ValueError: If the shapes differ, or there is one channel only.

    Source:
        Wang et al., Student-Teacher Feature Pyramid Matching for Anomaly Detection, arXiv 2103.04257, eqs. 1 to 3.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 5, 8, 8)
        >>> bool(losses.STFPM()(3 * teacher, teacher) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"
    rowwise = True
    """The pixels of a map are samples: under a mask it is the loss of the rows that count."""

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how far the directions of two maps' vectors are apart."""
        return stfpm(student, teacher, mask)
