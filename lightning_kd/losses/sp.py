"""SP: which samples of the batch look alike."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import full_precision, unit, upcast


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``||norm(F_t F_t^T) - norm(F_s F_s^T)||^2 / B^2``; see :class:`SP`."""
    _check.samples(student, teacher, 2, "a similarity needs a pair.")
    with full_precision(student):
        return (_similarity(student) - _similarity(teacher.detach())).square().mean()


def _similarity(feature: Tensor) -> Tensor:
    flat = upcast(feature).flatten(1)
    # The result knows no scale, and squares of squares of a large feature would overflow.
    flat = flat / flat.detach().abs().amax().clamp_min(torch.finfo(flat.dtype).tiny)
    return unit(flat @ flat.T, dim=1)


class SP(nn.Module):
    """Similarity preserving: match the batch's similarity matrices (Tung and Mori).

    With ``F`` (B, D) the flattened features of a batch and every row of ``F F^T`` (B, B) scaled to length 1::

        loss = ||norm(F_t F_t^T) - norm(F_s F_s^T)||_F^2 / B^2

    The two sides may differ in everything but the batch size. As the paper defines it, the loss falls about
    as 1/B; the commonly used weight is 3000, with batches of 64.

    Returns:
        ``forward(student, teacher)``, both (B, ...), returns a scalar, zero at equality.

    Raises:
        ValueError: If the batch sizes differ or are below two.

    Source:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, arXiv 1907.09682.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> feature = torch.randn(4, 8)
        >>> losses.SP()(3 * feature, feature) < 1e-6
        tensor(True)
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of two batches' similarity matrices."""
        return sp(student, teacher)
