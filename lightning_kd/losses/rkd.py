"""RKD: distances and angles between the samples of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import full_precision, unit, upcast


def rkd(student: Tensor, teacher: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Return ``distance * L_D + angle * L_A``; see :class:`RKD`."""
    _check.samples(student, teacher, 3, "with two, the one distance is always 1 and there is no angle.")
    s, t = upcast(student).flatten(1), upcast(teacher.detach()).flatten(1)
    if distance == 0 and min(s.shape[1], t.shape[1]) < 2:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: between samples of one number each "
            "angle is 0 or 180 degrees, with no gradient, and without distance nothing is taught. Take features of "
            "more numbers, or distance > 0."
        )
    loss = torch.zeros((), dtype=s.dtype, device=s.device)
    with full_precision(student):
        if distance != 0:
            loss = loss + distance * F.smooth_l1_loss(_distances(s), _distances(t).to(s.dtype))
        if angle != 0:
            loss = loss + angle * F.smooth_l1_loss(_angles(s), _angles(t).to(s.dtype))
    return loss


def _distances(x: Tensor) -> Tensor:
    """Return all distances (B, B) in units of the mean positive one."""
    # through differences: the expanded square loses the small distances, and has no gradient at 0
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = d.sum() / (d > 0).sum().clamp_min(1)
    return d / torch.where(mean > 0, mean, 1.0)


def _angles(x: Tensor) -> Tensor:
    """Return the cosines (B, B, B) at sample i between the directions to j and to k."""
    direction = unit(x.unsqueeze(0) - x.unsqueeze(1))
    return direction @ direction.transpose(1, 2)


class RKD(nn.Module):
    """Relational KD: match distances and angles between the samples of a batch (Park et al.).

    With ``psi_D(i, j) = ||x_i - x_j|| / mean`` (mean over the pairs that differ), and ``psi_A(i, j, k)`` the
    cosine of the angle at x_i between x_j and x_k::

        loss = distance * mean_ij huber(psi_D^s - psi_D^t) + angle * mean_ijk huber(psi_A^s - psi_A^t)

    The paper sums over tuples; the mean over all B^2 and B^3 of them, as in the common implementations, does
    not grow with the batch. Features are flattened, and may differ in everything but the batch size. The
    angles hold B^2 * D + B^3 numbers: give embeddings or pooled features, not large maps.

    Args:
        distance: Weight of the distances; 0 leaves them out.
        angle: Weight of the angles; 0 leaves them out.

    Returns:
        ``forward(student, teacher)``, both (B, ...), returns a scalar, zero at equality and where one is a
        scaled, shifted or rotated copy of the other.

    Raises:
        ValueError: If the batch sizes differ or are below three.

    Source:
        Park et al., Relational Knowledge Distillation, arXiv 1904.05068.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> feature = torch.randn(4, 8)
        >>> losses.RKD()(3 * feature + 1, feature) < 1e-6
        tensor(True)
    """

    def __init__(self, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        _check.weights(distance=distance, angle=angle)
        self.distance = distance
        self.angle = angle

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of two batches' geometry."""
        return rkd(student, teacher, self.distance, self.angle)
